"""`drover import libvirt`: domains as virt-install and virt-manager make them become the guests beside them, and of
no domain a word is lost without one of ours."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import pytest
import yaml

from orchestrator.cli import guest_file, importing, main
from orchestrator.cli.accounted import Said
from orchestrator.cli.exits import Exit
from orchestrator.cli.libvirt_xml import Choices, Imported, ImportRefused, convert
from orchestrator.cli.plain_xml import MAX_BYTES, MAX_DEPTH, MAX_NODES, Node, XmlError, parse

DOMAINS = Path(__file__).parent / "libvirt"
NAMES = sorted(path.stem for path in DOMAINS.glob("*.xml"))


def expected(name: str) -> dict[str, Any]:
    return yaml.safe_load((DOMAINS / f"{name}.yaml").read_text())


def choices(name: str) -> Choices:
    given = dict(expected(name)["choices"])
    given["without"] = tuple(given.get("without", ()))
    return Choices(**given)


def lines(said: tuple[Said, ...]) -> list[str]:
    return [f"{each.path}: {each.text}" for each in said]


def outcome(data: bytes, given: Choices) -> dict[str, Any]:
    """Everything that an operator is told of a domain."""
    try:
        done = convert(data, given)
    except ImportRefused as error:
        return {"refused": lines(error.problems)}
    return {"guest": done.guest, "left_out": lines(done.left_out)}


@pytest.mark.parametrize("name", NAMES)
def test_a_domain_becomes_the_guest_that_is_written_down(name: str) -> None:
    found = outcome((DOMAINS / f"{name}.xml").read_bytes(), choices(name))
    if os.environ.get("DROVER_WRITE_GOLDEN"):
        written = {"choices": expected(name)["choices"], **found}
        (DOMAINS / f"{name}.yaml").write_text(yaml.safe_dump(written, sort_keys=False, width=118))
    assert found == {key: value for key, value in expected(name).items() if key != "choices"}


@pytest.mark.parametrize("name", [name for name in NAMES if "guest" in expected(name)])
def test_what_was_imported_can_be_run(name: str) -> None:
    done = convert((DOMAINS / f"{name}.xml").read_bytes(), choices(name))
    (spec,) = guest_file.load([("guest", yaml.safe_dump(done.guest, sort_keys=False))])
    assert spec.name == done.guest["name"]
    assert [nic.mac for nic in spec.nics] == [nic["mac"] for nic in done.guest.get("nics", [])]
    assert all(not disk.size_bytes for disk in spec.disks), "an image is never made anew for a guest that has one"


# --- nothing is lost in silence ---------------------------------------------------------------------------------------


def written(node: Node) -> bytes:
    names = {"{http://libvirt.org/schemas/domain/qemu/1.0}": "qemu:"}

    def name(tag: str) -> str:
        for uri, prefix in names.items():
            tag = tag.replace(uri, prefix)
        return re.sub(r"{.*}", "", tag)

    def text(node: Node, top: bool = False) -> str:
        declared = " xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'" if top else ""
        attributes = "".join(f" {name(key)}={quoteattr(value)}" for key, value in node.attributes.items())
        inner = escape(node.text) + "".join(map(text, node.children))
        return f"<{name(node.tag)}{attributes}{declared}>{inner}</{name(node.tag)}>"

    return text(node, True).encode()


def places(top: Node) -> Iterator[tuple[int, ...]]:
    """Of every element that is the document's own."""

    def below(node: Node, place: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if node.tag == "metadata":
            return
        yield place
        for number, child in enumerate(node.children):
            yield from below(child, (*place, number))

    yield from below(top, ())


def at(top: Node, place: tuple[int, ...]) -> Node:
    for number in place:
        top = top.children[number]
    return top


def made(name: str) -> tuple[Node, Choices, Imported]:
    top = parse((DOMAINS / f"{name}.xml").read_bytes())
    given = choices(name)
    return top, given, convert(written(top), given)


IMPORTED = [name for name in NAMES if "guest" in expected(name)]


@pytest.mark.parametrize("name", IMPORTED)
def test_what_is_not_known_is_refused_wherever_it_stands(name: str) -> None:
    top, given, _ = made(name)
    for place in places(top):
        for kind in ("element", "attribute", "namespace"):
            changed = copy.deepcopy(top)
            node = at(changed, place)
            if kind == "element":
                node.children.append(Node("unheard-of", 0, {"a": "b"}))
            elif kind == "attribute":
                node.attributes["unheard-of"] = "yes"
            else:
                node.children.append(Node("qemu:unheard-of", 0))
            if any(f"{step}" in given.without for step in _paths(top, place)):
                continue  # the operator does without all of it
            with pytest.raises(ImportRefused) as refused:
                convert(written(changed), given)
            assert any("unheard-of" in each.path and "not known" in each.text for each in refused.value.problems), place


def _paths(top: Node, place: tuple[int, ...]) -> list[str]:
    found = [f"/{top.tag}"]
    for depth in range(len(place)):
        node = at(top, place[: depth + 1])
        found.append(f"{found[-1]}/{node.tag}")
    return found


@pytest.mark.parametrize("name", IMPORTED)
def test_an_element_cannot_hide_behind_another_of_its_name(name: str) -> None:
    top, given, _ = made(name)
    before = outcome(written(top), given)
    for place in places(top):
        if not place or at(top, place).tag in ("boot", "feature"):
            continue  # said twice they say nothing else
        changed = copy.deepcopy(top)
        at(changed, place[:-1]).children.insert(place[-1], copy.deepcopy(at(top, place)))
        covered = {said.split(": ")[0] for said in before["left_out"]}
        if any(
            path in covered or any(known.startswith(f"{path}[") for known in covered) for path in _paths(top, place)
        ):
            continue  # one of several things that are left out as a whole
        assert outcome(written(changed), given) != before, place


@pytest.mark.parametrize("name", IMPORTED)
def test_every_word_is_used_or_told_or_what_is_so_here_anyway(name: str) -> None:
    """Another value in any attribute or text that is read is refused, or changes what the operator is told."""
    top, given, _ = made(name)
    before = outcome(written(top), given)
    covered = {said.split(": ")[0] for said in before["left_out"]}
    for place in places(top):
        node = at(top, place)
        paths = _paths(top, place)
        told = [re.sub(r"\[\d+\]", "", path) for path in covered]
        if any(path in told for path in paths[1:]) and paths[-1] != "/domain/cpu":
            continue
        for key in [*node.attributes, *(["text()"] if node.text else [])]:
            if f"{paths[-1]}/{key if key == 'text()' else '@' + key}" in told or f"{paths[-1]}/@{key}" in given.without:
                continue
            if any(path.startswith("/domain/cpu") for path in paths) and given.cpu:
                continue  # told as a whole: the operator named another one
            changed = copy.deepcopy(top)
            if key == "text()":
                at(changed, place).text = "17"
            else:
                at(changed, place).attributes[key] = "17"
            assert outcome(written(changed), given) != before, f"{paths[-1]}/{key}"


# --- XML that is not to be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]><domain><name>&x;</name></domain>', "document type"),
        ('<!DOCTYPE d [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><domain>&b;</domain>', "document type"),
        ("<domain><name>&x;</name></domain>", "not XML"),
        ("<domain>", "not XML"),
        ("", "not XML"),
        ("\x00\x01", "not XML"),
        ("<?xml version='1.0' encoding='nonsense'?><domain/>", "not XML"),
        ("<a>" * (MAX_DEPTH + 1) + "</a>" * (MAX_DEPTH + 1), "deep"),
        ("<a>" + "<b/>" * MAX_NODES + "</a>", "elements"),
        ("<a>" + " " * MAX_BYTES + "</a>", "bytes"),
        ("<domstatus state='running'><domain/></domstatus>", "running domain"),
        ("<network><name>default</name></network>", "not a <domain>"),
    ],
)
def test_xml_that_is_a_trap_or_no_domain(text: str, said: str) -> None:
    with pytest.raises(XmlError, match=said):
        convert(text.encode(), Choices())


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_guest_file_and_says_what_is_not_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--pool", "/var/lib/libvirt/images/=fast", "--network", "default=prod", "--cpu", "Nehalem"]
    assert main.run(["import", "libvirt", str(DOMAINS / "virt_install_linux.xml"), *given]) == Exit.OK
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out) == expected("virt_install_linux")["guest"]
    assert "devices/sound" in printed.err
    assert "cpu: the CPU is Nehalem, as asked" in " ".join(printed.err.split())
    assert "keep it from being started there again" in " ".join(printed.err.split())

    assert main.run(["import", "libvirt", str(DOMAINS / "virt_install_linux.xml"), *given, "-o", "json"]) == Exit.OK
    document = json.loads(capsys.readouterr().out)
    assert document["guest"] == expected("virt_install_linux")["guest"]
    assert {each["path"] for each in document["left_out"]} >= {"/domain/devices/sound"}
    assert all(each["line"] > 0 and each["why"] for each in document["left_out"])


def test_what_only_the_operator_knows_is_asked_for_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(DOMAINS / "virt_install_linux.xml")
    assert main.run(["import", "libvirt", file]) == Exit.REFUSED
    said = " ".join(capsys.readouterr().err.split())
    assert "--pool /var/lib/libvirt/images=POOL" in said
    assert "--network default=NETWORK" in said
    assert "--cpu" in said
    line = next(number for number, text in enumerate(Path(file).read_text().splitlines(), 1) if "<disk " in text)
    assert f"{file}:{line}: /domain/devices/disk[1]/source/@file" in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere.xml"], Exit.USAGE, "cannot read nowhere.xml"),
        (["x.xml", "web-1"], Exit.USAGE, "x.xml is a file"),
        (["qemu:///system"], Exit.USAGE, "name the domain"),
        (["qemu:///system", "--", "-x"], Exit.USAGE, "name the domain"),
        (["x.xml", "--pool", "fast"], Exit.USAGE, "THERE=HERE"),
    ],
)
def test_a_command_line_that_cannot_be_meant(
    arguments: list[str], code: Exit, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["import", "libvirt", *arguments]) == code
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("sleep 60 & wait", "did not answer within 0.5 s"),  # as one that waits for its ssh
        ("yes '<domain>' 2>&1", "has more than"),
        ("yes error >&2", "did not answer within 0.5 s"),
    ],
)
@pytest.mark.timeout(30)
def test_virsh_is_given_its_time_and_its_room_and_no_more(
    does: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "virsh"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(importing, "VIRSH_S", 0.5 if "0.5" in said else 10.0)
    assert main.run(["import", "libvirt", "qemu+ssh://old/system", "web-1"]) in (Exit.UNREACHABLE, Exit.USAGE)
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_domain_is_asked_of_virsh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "virsh"
    program.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n'
        f'case "$*" in *missing*) echo "error: failed to get domain" >&2; exit 1;; esac\n'
        f"cat {DOMAINS}/direct_kernel.xml\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = ["--pool", "/var/tmp/rg/run=fast", "--network", "brg=prod"]
    assert main.run(["import", "libvirt", "qemu:///system", "lv1", *options]) == Exit.OK
    assert yaml.safe_load(capsys.readouterr().out) == expected("direct_kernel")["guest"]
    asked = (tmp_path / "asked").read_text().split()
    assert asked == "--quiet --readonly --connect qemu:///system dumpxml --inactive --domain lv1".split()
    assert main.run(["import", "libvirt", "qemu:///system", "missing", *options]) == Exit.NOT_FOUND
    assert "failed to get domain" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert main.run(["import", "libvirt", "qemu:///system", "lv1", *options]) == Exit.UNREACHABLE
    assert "cannot run virsh" in capsys.readouterr().err
