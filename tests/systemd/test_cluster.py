"""`make test-systemd`: the packages on three hosts with a real systemd each, and guests that outlive their agents."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.lab.workload import Workload, boot_of
from deploy.packages import deb
from tests.systemd.hosts import CommandFailed, Host, Hosts, booted

ROOT = Path(__file__).resolve().parents[2]
LINUX = ROOT / "build" / "linux"
IMAGE = ROOT / "build" / "guest.elf"
REPORT = ROOT / "build" / "test-systemd.json"
MOST_COMMANDS = 15
GUESTS, MOVING = 12, 4
ENDS = {"SUCCEEDED", "FAILED", "CANCELLED"}
AGENT = "drover-agent.service"
WORKLOAD = boot_of(Workload(static_mib=24, dirty_mib=1, dirty_pages_per_s=1), seed=1).append
TWELVE = f"""\
defaults:
  memory: 64MiB
  boot: {{kernel: guest.elf, append: {WORKLOAD}}}
guests: [{{name: web, count: {GUESTS}}}]
"""
SLOWLY = "6Mbit"
"""Of a guest's 24 MiB that makes more than 30 s in pre-copy: the agent is gone before they are over."""

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not os.environ.get("DROVER_LONG"), reason="make test-systemd"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can boot a systemd"),
]

ZOOKEEPER_UNIT = """\
[Unit]
Description=stands in for Debian's zookeeperd, which the machine that tests does not have
[Service]
ExecStart=java -Xmx128m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Djava.net.preferIPv4Stack=true \
    -Dzookeeper.jmx.log4j.disable=true -cp /usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar \
    org.apache.zookeeper.server.quorum.QuorumPeerMain /etc/zookeeper/conf/zoo.cfg
"""
ZOO_CFG = """\
tickTime=2000
initLimit=10
syncLimit=5
dataDir=/var/lib/zookeeper
clientPort=2181
admin.enableServer=false
"""


def readme_commands() -> list[tuple[str, str]]:
    """The host and the command of each line of README's section."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## On your own hosts") :]
    block = section.split("```")[1]
    return [(found[1], found[2]) for line in block.strip().splitlines() if (found := re.match(r"([\w-]+)# (.*)", line))]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions, from the same checkout. $DROVER_DEBS: a directory to make them in once."""
    out = Path(os.environ.get("DROVER_DEBS") or tmp_path_factory.mktemp("packages"))
    made: list[Path] = []
    for version in ("0.1.0-1", "0.1.0-2"):
        path = out / f"drover_{version}_amd64.deb"
        made.append(path if path.exists() else deb.build(out, version))
    return made[0], made[1]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with booted(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made


def _zookeeperd(host: Host) -> None:
    """What the package would have brought."""
    host.put("/etc/zookeeper/conf/zoo.cfg", ZOO_CFG.encode())
    host.put("/etc/systemd/system/zookeeper.service", ZOOKEEPER_UNIT.encode())
    host.sh("mkdir -p /var/lib/zookeeper && ln -sfn /etc/zookeeper/conf/myid /var/lib/zookeeper/myid")
    host.sh("systemctl daemon-reload")


def _images(host: Host) -> None:
    """For want of a kernel in /boot the lab's Linux, where it could be had, else the lab's own guest."""
    linux = LINUX / "linux-vmlinuz"
    host.put("/srv/drover/images/vmlinuz", (linux if linux.exists() else IMAGE).read_bytes())
    host.put("/srv/drover/images/initrd.img", (LINUX / "linux-initrd").read_bytes() if linux.exists() else b"0")
    host.put("/srv/drover/images/guest.elf", IMAGE.read_bytes())


def _without_kvm(host: Host) -> None:
    host.sh("sed -i '/^accelerator/d' /etc/drover/agent.yaml && echo 'accelerator: tcg' >> /etc/drover/agent.yaml")


def _on(hosts: Hosts, where: str) -> list[Host]:
    return hosts.hosts if where == "every" else [host for host in hosts.hosts if host.name == where]


def _carry_out(hosts: Hosts, where: str, command: str) -> None:
    """As it stands, but for what a machine without network, KVM and a kernel of its own cannot have."""
    chosen = _on(hosts, where)
    if command == "apt-get install -y zookeeperd":
        for host in chosen:
            _zookeeperd(host)
    elif command.startswith("install -D -m 644 /boot/"):
        for host in chosen:
            _images(host)
    else:
        if command.endswith("--now drover-agent"):
            for host in chosen:
                _without_kvm(host)
        if command == "drover health":  # the control plane takes some seconds to come up
            hosts[1].wait(command, 180)
        if len(chosen) > 1:
            hosts.every(command, 300)
        else:
            chosen[0].sh(command, timeout_s=300)


@pytest.fixture(scope="module")
def cluster(hosts: Hosts, packages: tuple[Path, Path]) -> Hosts:
    """Made by the commands of README, in the order in which they stand there."""
    commands = readme_commands()
    assert 5 < len(commands) <= MOST_COMMANDS
    for host in hosts.hosts:
        host.put(f"/root/{packages[0].name}", packages[0].read_bytes())
    took: list[dict[str, Any]] = []
    begun = time.monotonic()
    for where, command in commands:
        before = time.monotonic()
        _carry_out(hosts, where, command.replace("./drover_", "/root/drover_"))
        took.append({"where": where, "command": command, "took_s": round(time.monotonic() - before, 1)})
    _report("commands", {"commands": took, "count": len(commands), "took_s": round(time.monotonic() - begun, 1)})
    return hosts


def _report(name: str, content: dict[str, Any]) -> None:
    known = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    REPORT.write_text(json.dumps({**known, name: content}, indent=1) + "\n")


def drover(hosts: Hosts, words: str, timeout_s: float = 120.0) -> Any:
    """What a command of the CLI answers as JSON, on the host with the API."""
    return json.loads(hosts[1].sh(f"drover {words} -o json", timeout_s=timeout_s).stdout)


def owners(hosts: Hosts) -> dict[str, tuple[str, str]]:
    """Owner and state of each guest that there is, by name."""
    guests = drover(hosts, "guest list")["guests"]
    return {each["name"]: (each["host"], each["run_state"]) for each in guests}


VMMS = "grep -lzaE '^-name$' /proc/[0-9]*/cmdline 2>/dev/null | grep -oE '[0-9]+'; true"


def vmms(host: Host) -> dict[int, tuple[str, str]]:
    """Guest and control group of each VMM on the host, by its number there."""
    found: dict[int, tuple[str, str]] = {}
    for pid in map(int, host.sh(VMMS).stdout.split()):
        try:
            words = (host.root / f"proc/{pid}/cmdline").read_bytes().split(b"\0")
            group = (host.root / f"proc/{pid}/cgroup").read_text().strip()
        except OSError:
            continue
        if b"-name" in words and words[0].startswith(b"qemu-system"):
            name = words[words.index(b"-name") + 1].decode().removeprefix("guest=")
            found[pid] = (name, group.rpartition("::")[2])
    return found


def test_the_first_guest_has_moved(cluster: Hosts) -> None:
    assert owners(cluster)["first"] == ("host-2", "RUNNING")
    assert [name for name, _ in vmms(cluster[2]).values()] == ["first"]
    assert vmms(cluster[1]) == {}


def test_each_guest_has_a_scope_of_its_own(cluster: Hosts) -> None:
    ((_, group),) = vmms(cluster[2]).values()
    assert re.search(
        r"drover-guests\.slice/drover-guests-[0-9a-f]{16}\.slice/drover-guests-[0-9a-f]{16}-vmm-\w+\.scope$", group
    )
    assert "drover-agent" not in group


def test_services_are_who_they_should_be(cluster: Hosts) -> None:
    for unit, user in (("drover-api", "drover"), ("drover-coordinator", "drover"), ("drover-agent", "root")):
        pid = cluster[1].main_pid(unit)
        assert cluster[1].sh(f"ps -o user= -p {pid}").stdout.strip() == user
    limits = (cluster[1].root / f"proc/{cluster[1].main_pid(AGENT)}/limits").read_text()
    files = re.search(r"Max open files\s+(\d+)\s+(\d+)", limits)
    assert files
    # A machine that lets nobody raise its own limit keeps the unit below it.
    assert int(files[2]) == min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1]), limits


# --- guests outlive their agents --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twelve(cluster: Hosts) -> Hosts:
    """Twelve guests on host-1."""
    cluster[1].put("/root/twelve.yaml", TWELVE.encode())
    cluster[1].sh("drover guest run /root/twelve.yaml --host host-1 --timeout 120", timeout_s=300)
    _all_run(cluster)
    return cluster


def _all_run(hosts: Hosts) -> None:
    """Every guest runs where its record says, in one VMM, once nothing moves any more."""
    give_up_at = time.monotonic() + 240
    while True:
        said = {name: found for name, found in owners(hosts).items() if name.startswith("web-")}
        there = {
            host.name: sorted(name for name, _ in vmms(host).values() if name.startswith("web-"))
            for host in hosts.hosts
        }
        told = {host: sorted(name for name, (owner, _) in said.items() if owner == host) for host in there}
        if len(said) == GUESTS and there == told and {state for _, state in said.values()} == {"RUNNING"}:
            return
        if time.monotonic() >= give_up_at:
            raise AssertionError(f"records: {said}, processes: {there}")
        time.sleep(1)


def _blow(host: Host, how: str, packages: tuple[Path, Path]) -> None:
    before = host.main_pid(AGENT)
    assert before
    if how == "restart":
        host.sh(f"systemctl restart {AGENT}")
    elif how == "stop":
        host.sh(f"systemctl stop {AGENT}")
        assert host.sh(f"systemctl is-active {AGENT}", check=False).stdout.strip() != "active"
        host.sh(f"systemctl start {AGENT}")
    elif how == "kill":
        host.sh(f"kill -9 {before}")
    else:
        host.put(f"/root/{packages[1].name}", packages[1].read_bytes())
        host.sh(f"dpkg -i /root/{packages[1].name}", timeout_s=400)
        assert host.sh("dpkg-query -W -f '${Version}' drover").stdout == "0.1.0-2"
    host.wait(f"p=$(systemctl show -P MainPID {AGENT}); [ $p != 0 ] && [ $p != {before} ]", 60)


@pytest.mark.parametrize("how", ["restart", "stop", "kill", "upgrade"])
def test_guests_outlive_their_agent(twelve: Hosts, packages: tuple[Path, Path], how: str) -> None:
    """Four of the twelve are on their way when it happens to the host that they leave; the others do not notice."""
    hosts = twelve
    source = max(hosts.hosts, key=lambda host: sum(name.startswith("web-") for name, _ in vmms(host).values()))
    before = {pid: name for pid, (name, _) in vmms(source).items() if name.startswith("web-")}
    moving = sorted(before.values())[:MOVING]
    target = next(host.name for host in hosts.hosts if host is not source)
    migrations = _set_out(hosts, moving, target)
    begun = time.monotonic()
    _blow(source, how, packages)
    took_s = time.monotonic() - begun
    after = vmms(source)
    stayed = {pid: name for pid, name in before.items() if name not in moving}
    assert {pid: after[pid][0] for pid in stayed if pid in after} == stayed, "their processes are the same"
    hosts[1].wait("drover health", 180)  # after an upgrade of host-1 coordinator and API are new as well
    ends = [_ended(hosts, migration) for migration in migrations]
    _all_run(hosts)
    ended_s = time.monotonic() - begun
    _report(how, {"guests": len(before), "took_s": round(took_s, 1), "ended_s": round(ended_s, 1), "moving": ends})
    assert all(end["phase"] == "SUCCEEDED" for end in ends), ends


def _set_out(hosts: Hosts, names: list[str], target: str) -> list[str]:
    """Migrations of these guests, all of them in pre-copy."""
    one = f"drover migrate $g --to {target} --max-bandwidth {SLOWLY} --precopy-timeout 200s -o json"
    made = hosts[1].sh(
        f"for g in {' '.join(names)}; do {one} > /tmp/$g.json & done; wait; cat /tmp/*.json; rm /tmp/*.json"
    )
    migrations = re.findall(r'^  "name": "(\w+)"', made.stdout, re.MULTILINE)
    assert len(migrations) == len(names), made
    give_up_at = time.monotonic() + 60
    while True:
        listed = drover(hosts, "migration list")["migrations"]
        phases = {each["name"]: each["phase"] for each in listed if each["name"] in migrations}
        if set(phases.values()) == {"PRECOPY"}:
            return migrations
        assert not set(phases.values()) & ENDS, phases
        assert time.monotonic() < give_up_at, phases
        time.sleep(0.2)


def _ended(hosts: Hosts, migration: str) -> dict[str, Any]:
    give_up_at = time.monotonic() + 240
    while True:
        found = drover(hosts, f"migration show {migration}")
        if found["phase"] in ENDS or time.monotonic() >= give_up_at:
            reasons = [each["reason"] for each in found["attempts"] if each["reason"]]
            return {"phase": found["phase"], "attempts": found["attempt"], "reasons": reasons}
        time.sleep(1)


def test_the_package_is_not_removed_while_guests_run(twelve: Hosts) -> None:
    host = max(twelve.hosts, key=lambda each: len(vmms(each)))
    before = vmms(host)
    for command in ("dpkg -r drover", "apt-get remove -y drover"):
        with pytest.raises(CommandFailed, match="runs here"):
            host.sh(command)
    assert host.sh("dpkg-query -W -f '${db:Status-Status}' drover").stdout == "installed"
    assert host.main_pid(AGENT)
    assert vmms(host) == before


def test_without_guests_the_package_goes(twelve: Hosts) -> None:
    """And leaves what an operator may want back."""
    host = twelve[3]
    host_name = host.name
    twelve[1].sh(f"drover evacuate {host_name} --watch", timeout_s=400)
    assert vmms(host) == {}
    host.sh("dpkg -r drover", timeout_s=200)
    assert host.sh(f"systemctl is-active {AGENT}", check=False).stdout.strip() != "active"
    assert (host.root / "etc/drover/agent.yaml").exists()
    assert not (host.root / "opt/drover/bin/drover").exists()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
def test_the_whole_package_is_the_same_each_time(packages: tuple[Path, Path], tmp_path: Path) -> None:
    # What was kept in a directory of the tester's may be of an older checkout.
    first = deb.build(tmp_path / "first", "0.1.0-1") if os.environ.get("DROVER_DEBS") else packages[0]
    assert deb.build(tmp_path / "again", "0.1.0-1").read_bytes() == first.read_bytes()
