"""The guest file: what it means, and that everything that is wrong with it is told at once, where it stands."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from deploy.lab.devices.scenario_text import parse_scenario
from deploy.lab.workload import Workload, boot_of
from orchestrator.cli import guest_file
from orchestrator.cli.guest_file import GuestFileError, load
from orchestrator.core.policy import MigrationPolicy, OnTimeout
from orchestrator.core.record import known_fields
from orchestrator.core.records import (
    Boot,
    CloudInit,
    Cpu,
    DeviceSpec,
    DiskCache,
    DiskFormat,
    DiskSpec,
    Display,
    Firmware,
    GuestSpec,
    NicSpec,
    ShimKind,
    Tpm,
)

DOCS = Path(__file__).resolve().parents[2] / "docs" / "guest-file.md"


def read(text: str, file: str = "guests.yaml") -> list[GuestSpec]:
    return load([(file, text)])


def problems(text: str, file: str = "guests.yaml") -> list[str]:
    with pytest.raises(GuestFileError) as caught:
        read(text, file)
    return [str(problem) for problem in caught.value.problems]


# --- what it means ----------------------------------------------------------------------------------------------------


def test_a_name_is_enough_and_everything_else_is_the_core_s_default() -> None:
    assert read("name: web-1") == [GuestSpec("web-1")]


def test_every_key_arrives() -> None:
    (spec,) = read(
        """
name: gpu-1
memory: 1GiB
vcpus: 2
machine: q35
boot: {kernel: vmlinuz-6.1, initrd: initrd.img, append: "console=ttyS0 id=${uuid}"}
devices:
  - {name: flows, shim: companion, initial_bytes: 64KiB, stop_copy_bytes: 512, dirty_bytes_per_s: 1KiB}
  - {name: eth0, shim: net}
labels: {tier: gpu}
policy: {max_attempts: 9, on_timeout: suspend, auto_converge: true}
"""
    )
    assert spec == GuestSpec(
        name="gpu-1",
        memory_mib=1024,
        vcpus=2,
        machine="q35",
        boot=Boot("vmlinuz-6.1", "initrd.img", "console=ttyS0 id=${uuid}"),
        devices=(
            DeviceSpec("flows", ShimKind.COMPANION, "none", 65_536, 512, 1024),
            DeviceSpec("eth0", ShimKind.NET),
        ),
        labels={"tier": "gpu"},
        policy=MigrationPolicy(max_attempts=9, on_timeout=OnTimeout.SUSPEND, auto_converge=True),
    )


def test_every_key_of_hardware_arrives(tmp_path: Path) -> None:
    (tmp_path / "user.yaml").write_text("#cloud-config\npackages: [nginx]\n")
    (spec,) = read(
        """
name: shop-db
cpu: {model: Nehalem}
boot: {firmware: uefi}
disks:
  - {name: root, pool: fast, size: 20GiB, boot: true}
  - {name: data, pool: shared, image: "${name}.raw", format: raw, cache: writeback}
  - {name: seed, pool: iso, image: seed.iso, format: raw, read_only: true}
nics:
  - {name: eth0, network: prod, mac: "52:54:00:AB:34:56", queues: 2, mtu: 9000}
tpm: {version: 2.0}
cloud_init: {user_data: user.yaml, meta_data: "#x"}
extra_args: ["-device virtio-rng-pci"]
display: {vnc: true}
""",
        str(tmp_path / "g.yaml"),
    )
    assert spec == GuestSpec(
        name="shop-db",
        cpu=Cpu("Nehalem"),
        boot=Boot(firmware=Firmware.UEFI),
        disks=(
            DiskSpec("root", "fast", "shop-db-root.qcow2", size_bytes=20 << 30, boot=True),
            DiskSpec("data", "shared", "shop-db.raw", DiskFormat.RAW, cache=DiskCache.WRITEBACK),
            DiskSpec("seed", "iso", "seed.iso", DiskFormat.RAW, read_only=True),
        ),
        nics=(NicSpec("eth0", "prod", "52:54:00:ab:34:56", 2, 9000),),
        tpm=Tpm(),
        cloud_init=CloudInit("#cloud-config\npackages: [nginx]\n", "#x"),
        extra_args=("-device virtio-rng-pci",),
        display=Display(vnc=True),
    )


def test_guests_of_one_entry_have_images_of_their_own() -> None:
    text = "{{name: w, count: 2, disks: [{{name: root, pool: fast, size: 1GiB{}}}]}}"
    assert [spec.disks[0].image for spec in read(text.format(""))] == ["w-1-root.qcow2", "w-2-root.qcow2"]
    (said,) = problems(text.format(", image: one.qcow2"))
    assert "disks[0].image: would be the image of 2 guests" in said


def test_mistakes_in_hardware_stand_where_they_were_made() -> None:
    assert problems(
        """
name: a
cpu: {modell: x}
boot: {firmware: efi}
disks:
  - {name: root, pool: fast, sizes: 1GiB}
  - {name: root}
nics: [{name: eth0, network: prod, que: 1}]
tpm: {versions: 1}
cloud_init: {users_data: x}
"""
    ) == [
        "guests.yaml:3: cpu.modell: there is no such key; did you mean model?",
        "guests.yaml:4: boot.firmware: must be 'direct', 'bios' or 'uefi', not 'efi'",
        "guests.yaml:6: disks[0].sizes: there is no such key; did you mean size?",
        "guests.yaml:7: disks[1].pool: is missing",
        "guests.yaml:8: nics[0].que: there is no such key; did you mean queues?",
        "guests.yaml:9: tpm.versions: there is no such key; did you mean version?",
        "guests.yaml:10: cloud_init.users_data: there is no such key; did you mean user_data?",
    ]
    *others, unread = problems(
        """
name: a
workload: {}
disks:
  - {name: root, pool: fast, size: 1000}
cloud_init:
  user_data: nowhere.yaml
"""
    )
    assert others == [
        "guests.yaml:3: workload: is for the lab's own image, which has no disks and is booted directly",
        "guests.yaml:5: disks[0].size: must be between 1 MiB and 64 TiB, not 1000 bytes",
    ]
    assert unread.startswith("guests.yaml:7: cloud_init.user_data: cannot read nowhere.yaml: No such file or directory")


@pytest.mark.parametrize(("record", "path"), [(Boot, "boot"), (MigrationPolicy, "policy")])
def test_each_field_of_the_core_can_be_written(record: type, path: str) -> None:
    """A field that is new in the core needs no change here."""
    default = record()
    values = {field.name: getattr(default, field.name) for field in known_fields(record)}
    text = yaml.safe_dump({"name": "g", path: {k: getattr(v, "value", v) for k, v in values.items()}})
    assert read(text) == [GuestSpec("g")]


@pytest.mark.parametrize(("written", "mib"), [("64", 64), ("64MiB", 64), ("2GiB", 2048), ("1024KiB", 1), ("'96'", 96)])
def test_sizes(written: str, mib: int) -> None:
    text = f"name: g\nworkload: {{dirty_mib: {written}}}\nmemory: 4GiB"
    assert read(text)[0].boot == boot_of(Workload(dirty_mib=mib))


def test_defaults_are_shared_and_a_guest_s_own_keys_win_one_by_one() -> None:
    first, second = read(
        """
defaults:
  memory: 128
  workload: {dirty_mib: 8, static_mib: 2}
  devices: [{name: a, shim: net}]
  labels: {owner: me}
guests:
  - name: one
    workload: {dirty_mib: 16}
    labels: {tier: web}
  - name: two
    memory: 256
    devices: []
"""
    )
    assert (first.memory_mib, first.boot) == (128, boot_of(Workload(dirty_mib=16, static_mib=2)))
    assert first.labels == {"owner": "me", "tier": "web"}
    assert [device.name for device in first.devices] == ["a"]
    assert (second.memory_mib, second.devices) == (256, ())
    assert second.boot == boot_of(Workload(dirty_mib=8, static_mib=2))


def test_the_lab_s_workload_writes_the_command_line_of_its_image() -> None:
    (spec,) = read(
        "name: g\nmemory: 64\n"
        "workload: {dirty_mib: 16MiB, dirty_pages_per_s: 10, static_mib: 4, heartbeat_hz: 20, doorbell_hz: 5}\n"
        "devices: [{name: a, shim: companion}, {name: b, shim: vfio}, {name: c, shim: vfio}]\n"
    )
    assert spec.boot == boot_of(Workload(16, 10, 4, 20, 5), spec.devices)
    assert "dev=1 pci=2" in spec.boot.append
    kept = read("name: g\nboot: {kernel: other.elf}\nworkload: {}")[0].boot
    assert (kept.kernel, kept.append) == ("other.elf", boot_of(Workload()).append)
    told = problems("name: g\nboot: {append: quiet}\nworkload: {}")
    assert told == [
        "guests.yaml:3: workload: writes the guest's command line, and so does boot.append: leave one of them out"
    ]


@pytest.mark.parametrize("field", [field.name for field in known_fields(Workload)])
def test_each_field_of_a_workload_can_be_written(field: str) -> None:
    assert read(f"name: g\nworkload: {{{field}: 10}}")[0].boot == boot_of(replace(Workload(), **{field: 10}))


def test_without_the_lab_there_is_no_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    no_keys: dict[str, guest_file.Key] = {}
    monkeypatch.setattr(guest_file, "added_keys", lambda: no_keys)
    guest_file._guest_model.cache_clear()
    try:
        (told,) = problems("name: g\nworkload: {dirty_mib: 3}")
        assert told.startswith("guests.yaml:2: workload: there is no such key; there are name, count")
    finally:
        guest_file._guest_model.cache_clear()


def test_count_numbers_the_guests() -> None:
    assert [spec.name for spec in read("guests: [{name: web, count: 3}, {name: db, count: 1}]")] == [
        *("web-1", "web-2", "web-3"),
        "db-1",
    ]


def test_an_inline_scenario_becomes_the_text_that_the_device_reads() -> None:
    (spec,) = read("name: g\ndevices: [{name: d, shim: companion, scenario: {asks: [{at: freeze, times: 2}]}}]")
    (ask,) = parse_scenario(spec.devices[0].options["scenario"]).asks
    assert (ask.at, ask.times) == ("freeze", 2)


def test_a_scenario_file_is_found_beside_the_guest_file(tmp_path: Path) -> None:
    (tmp_path / "late.yaml").write_text("asks: [{at: final_query}]\n")
    text = "name: g\ndevices: [{name: d, shim: companion, scenario: late.yaml}]"
    assert read(text, str(tmp_path / "g.yaml"))[0].devices[0].options == {"scenario": "asks: [{at: final_query}]\n"}


def test_files_are_read_together() -> None:
    assert [spec.name for spec in load([("a.yaml", "name: a"), ("b.yaml", "name: b")])] == ["a", "b"]
    with pytest.raises(GuestFileError, match=r"^b.yaml:1: name: the name 'a' is taken by the guest in a.yaml:1$"):
        load([("a.yaml", "name: a"), ("b.yaml", "name: a")])


# --- what is wrong with it --------------------------------------------------------------------------------------------


def test_everything_is_told_at_once_in_the_order_of_the_lines() -> None:
    assert problems(
        """\
defaults:
  memory: 64MiB
  vcpu: 2
guests:
  - name: web
    vcpus: two
    labels: {n: 1}
    devices:
      - {name: flows, shim: compannion}
      - name: x
        initial_bites: 64KiB
  - name: Db
    memory: 3
    policy: {on_timeout: never, max_attempts: 0}
  - name: web
    count: 2
  - name: web-2
"""
    ) == [
        "guests.yaml:3: defaults.vcpu: there is no such key; did you mean vcpus?",
        "guests.yaml:6: guests[0].vcpus: must be a whole number, not 'two'",
        "guests.yaml:7: guests[0].labels.n: must be text (in quotes, if it looks like something else), not 1",
        "guests.yaml:9: guests[0].devices[0].shim: must be 'companion', 'net', 'vfio' or 'external', not 'compannion'",
        "guests.yaml:10: guests[0].devices[1].shim: is missing",
        "guests.yaml:11: guests[0].devices[1].initial_bites: there is no such key; did you mean initial_bytes?",
        "guests.yaml:14: guests[1].policy.on_timeout: must be 'abort' or 'suspend', not 'never'",
        "guests.yaml:17: guests[3].name: the name 'web-2' is taken by the guest in guests.yaml:15",
    ]


def test_what_the_core_says_is_told_with_line_and_field() -> None:
    told = problems(
        """\
name: Web_1
memory: 8
workload:
  heartbeat_hz: 1000
devices:
  - name: d
    shim: companion
    dma: full
policy:
  max_attempts: 0
"""
    )
    assert [one.partition(" must")[0].rstrip(":") for one in told] == [
        "guests.yaml:1: name",
        "guests.yaml:2: memory",
        "guests.yaml:4: workload.heartbeat_hz",
        "guests.yaml:8: devices[0].dma: a companion device",
        "guests.yaml:10: policy.max_attempts",
    ]


def test_a_default_that_is_wrong_is_told_once_and_where_it_stands() -> None:
    assert problems("defaults:\n  memory: lots\nguests: [{name: a}, {name: b}]") == [
        "guests.yaml:2: defaults.memory: must be a number of MiB or a size such as 64MiB or 1GiB, not 'lots'"
    ]
    told = problems("defaults:\n  workload:\n    heartbeat_hz: 5000\nguests: [{name: a}]")
    assert told == ["guests.yaml:3: guests[0].workload.heartbeat_hz: must be between 1 and 100, not 5000"]


def test_a_wrong_scenario_is_told_with_the_line_in_the_guest_file() -> None:
    (told,) = problems("name: g\ndevices:\n- name: d\n  shim: companion\n  scenario:\n    asks:\n    - at: freezing\n")
    assert told.startswith("guests.yaml:7: devices[0].scenario.asks[0].at: must be one of precopy, gate_open")


def test_a_wrong_scenario_file_is_named(tmp_path: Path) -> None:
    text = "name: g\ndevices: [{name: d, shim: companion, scenario: late.yaml}]"
    file = str(tmp_path / "g.yaml")
    (told,) = problems(text, file)
    assert told.startswith(f"{file}:2: devices[0].scenario: cannot read {tmp_path}/late.yaml: No such file")
    (tmp_path / "late.yaml").write_text("asks: 7\n")
    (told,) = problems(text, file)
    assert told.startswith(f"{file}:2: devices[0].scenario: {tmp_path}/late.yaml: asks: must be a list")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ": a guest file is a mapping: one guest (name: ...), or guests: with a list of them"),
        ("[]", ":1: a guest file is a mapping: one guest (name: ...), or guests: with a list of them"),
        ("guests: []", ":1: guests: must be a list of guests, with at least one"),
        ("defaults: {memory: 64}", ":1: guests: must be a list of guests, with at least one"),
        ("memory: 64", ":1: name: is missing"),
        ("guests: [5]", ":1: guests[0]: must be a mapping with at least a name"),
        ("name: a\nmemory: 64\nmemory: 65", ":3: memory: stands here twice (first in line 2)"),
        ("name: a\nmemory: 64MB", ":2: memory: must be a number of MiB or a size such as 64MiB or 1GiB, not '64MB'"),
        (
            "name: a\nmemory: 1.5KiB",
            ":2: memory: must be a number of MiB or a size such as 64MiB or 1GiB, and come to a",
        ),
        ("name: a\nmemory: 1.5", ":2: memory: must be a whole number, not 1.5"),
        ("name: a\nmemory: true", ":2: memory: must be a whole number, not true"),
        ("name: a\nmemory:", ":2: memory: must be a whole number, not nothing"),
        ("name: a\ncount: 0", ":2: count: must be between 1 and 1000, not 0"),
        ("name: 7", ":1: name: must be text (in quotes, if it looks like something else), not 7"),
        ("name: a\ndevices: {}", ":2: devices: must be a list, not {}"),
        ("name: a\nworkload: 3", ":2: workload: must be a mapping, not 3"),
        ("name: a\nworkload: {dirty_mb: 3}", ":2: workload.dirty_mb: there is no such key; did you mean dirty_mib?"),
        ("name: a\nboot: vmlinuz", ":2: boot: must be a mapping, not 'vmlinuz'"),
        ("name: a\nboot: {kernl: v}", ":2: boot.kernl: there is no such key; did you mean kernel?"),
        ("name: a\nboot:\n  initrd: /etc/shadow", ":3: boot.initrd: must be the name, not a path, of a file in"),
        ("name: a\nguests: [{name: b}]", ":1: name: there is no such key; there are guests, defaults (a guest's own"),
        ("defaults: {name: x}\nguests: [{name: b}]", ":1: defaults.name: cannot be shared: it belongs to each guest"),
        ("name: a\n<<: {memory: 3}", ":2: merge keys (<<) are not read here: use defaults"),
        ("name: a\n---\nname: b", ":2: not YAML: expected a single document in the stream but found another"),
        ("name: 'a", ":1: not YAML: while scanning a quoted scalar found unexpected end of stream"),
        ("name: a\nlabels: &x {l: *x}", ":2: a value that contains itself"),
        ("name: a\nlabels: {n: 2024-13-45}", ":2: labels.n: month must be in 1..12"),
        ("name: !!python/object:os.system a", ":1: name: could not determine a constructor for the tag"),
        ("? [a, b]\n: c\nname: a", ":1: a key must be a word"),
        ('name: a\nx: "\x00"', ": not YAML: unacceptable character #x0000"),
    ],
)
def test_wrong_files(text: str, told: str) -> None:
    assert [one for one in problems(text) if one.startswith(f"guests.yaml{told}")]


def test_aliases_of_aliases_do_not_eat_the_machine() -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 9):
        text += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    (told,) = problems(text)
    assert "more than 100000 values" in told


def test_a_line_is_told_for_a_value_that_came_by_an_alias() -> None:
    assert problems("guests:\n- name: a\n  labels: &l {n: 1}\n- name: b\n  labels: *l\n") == [
        "guests.yaml:3: guests[0].labels.n: must be text (in quotes, if it looks like something else), not 1",
        "guests.yaml:3: guests[1].labels.n: must be text (in quotes, if it looks like something else), not 1",
    ]


# --- the page about it ------------------------------------------------------------------------------------------------

_EXAMPLE = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", _EXAMPLE.findall(DOCS.read_text()))
def test_the_examples_of_the_documentation_are_read(example: str, tmp_path: Path) -> None:
    (tmp_path / "late.yaml").write_text("asks: [{at: freeze}]\n")
    assert read(example, str(tmp_path / "example.yaml"))


def test_the_documentation_names_every_key_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)`.* \|(.*)\|$", DOCS.read_text(), re.MULTILINE))
    for record in (Workload, Boot, MigrationPolicy):
        for field in known_fields(record):
            if field.name == "backoff_max_ms":
                continue  # stands in the row of the initial one
            told, default = rows[field.name], getattr(record(), field.name)
            assert told.strip(" `").split(",")[0] == str(getattr(default, "value", default)).lower(), field.name
    names = [
        name
        for model in (guest_file._Guest, guest_file._Device, guest_file._Disk, guest_file._Nic, guest_file._CloudInit)
        for name in model.model_fields
    ]
    assert not set(names) - set(rows)
