"""A libvirt domain that is taken over: its XML becomes a guest in a cluster of real parts, which runs on its image with
its card's address, and moves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.cli.exits import Exit
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.cluster import Cluster, make_config, missing, running_cluster, short_directory

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.qemu,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]
MAC = "52:54:00:00:00:08"
DOMAIN = f"""
<domain type='kvm'>
  <name>old-1</name><uuid>eeeeeeee-1111-4222-8333-abcdefabcdef</uuid>
  <memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type><boot dev='hd'/></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='/srv/vm/old-1.raw'/><target dev='vda' bus='virtio'/>
    </disk>
    <interface type='bridge'><mac address='{MAC}'/><source bridge='br0'/><model type='virtio'/></interface>
  </devices>
</domain>
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    directory = short_directory()
    try:
        with running_cluster(make_config(directory, hosts=2)) as cluster:
            yield cluster
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def command_line(name: str) -> list[str]:
    """Of the one VMM of the guest."""
    found: list[list[str]] = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode().split("\0")
        except OSError:
            continue
        if f"guest={name}" in words:
            found.append(words)
    (only,) = found
    return only


def test_a_domain_is_taken_over_and_moves(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROVER_API", cluster.api)
    pool = cluster.layout.dir / "pools" / "shared"
    image = pool / "old-1.raw"
    image.write_bytes(os.urandom(4096))
    os.truncate(image, 16 << 20)
    (tmp_path / "old-1.xml").write_text(DOMAIN)
    given = ["--pool", "/srv/vm=shared", "--network", "br0=lab"]
    assert main.run(["import", "libvirt", str(tmp_path / "old-1.xml"), *given]) == Exit.OK
    (tmp_path / "old-1.yaml").write_text(capsys.readouterr().out)
    before = image.read_bytes()

    assert main.run(["guest", "run", str(tmp_path / "old-1.yaml"), "--host", "host-1"]) == Exit.OK
    assert main.run(["guest", "check", "old-1"]) == Exit.OK
    assert "it could move to host-2 now" in capsys.readouterr().out
    assert main.run(["migrate", "old-1", "--to", "host-2", "--watch"]) == Exit.OK
    words = " ".join(command_line("old-1"))
    assert f"mac={MAC}" in words
    assert str(image) in words
    assert "-cpu qemu64,enforce" in words
    assert "-uuid eeeeeeee-1111-4222-8333-abcdefabcdef" in words
    with OrchestratorClient(cluster.api) as client:
        guest = client.get_guest("old-1")
        assert guest.host == "host-2"
        assert guest.spec.labels["libvirt-uuid"] == "eeeeeeee-1111-4222-8333-abcdefabcdef"
        client.stop_guest("old-1")
    assert image.read_bytes() == before, "the image is the guest's own, and nobody else wrote to it"
