"""What QEMU is started with: which files it gets as kernel and initrd, and what it is told of devices inside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agents.engine.base import EngineError, VmmSpec
from agents.engine.boot_images import Images
from agents.engine.qemu.process import Launch, command_line, environment
from orchestrator.core.records import Boot, DeviceSpec, GuestSpec, ShimKind

UUID = "6b1f3f2a-9d1c-4a51-8a3e-0d6f3c1b2a49"


@pytest.fixture
def images(tmp_path: Path) -> Images:
    """A host with a default kernel, a directory of images, and a secret beside it."""
    (tmp_path / "default.elf").touch()
    (tmp_path / "secret").touch()
    directory = tmp_path / "images"
    directory.mkdir()
    (directory / "vmlinuz").touch()
    (directory / "initrd.img").touch()
    (directory / "folder").mkdir()
    (directory / "current").symlink_to("vmlinuz")
    (directory / "gone").symlink_to("no-such-file")
    return Images(tmp_path / "default.elf", directory)


def told(images: Images, boot: Boot) -> dict[str, str]:
    spec = VmmSpec(UUID, "s", GuestSpec("web", boot=boot), Path("/x"), Path("/x/con"), None)
    words = command_line(Launch("q", images, "tcg", reconnect_ms=True), spec, incoming=False)
    return {word: words[n + 1] for n, word in enumerate(words) if word in ("-kernel", "-initrd", "-append")}


def test_a_guest_that_names_no_image_gets_the_default(images: Images, tmp_path: Path) -> None:
    assert told(images, Boot()) == {"-kernel": str(tmp_path / "default.elf"), "-append": ""}


def test_named_images_come_from_the_directory(images: Images, tmp_path: Path) -> None:
    found = told(images, Boot("current", "initrd.img", "root=/dev/sda1 id=${uuid},${name} $5"))
    assert found == {
        "-kernel": str(tmp_path / "images" / "current"),
        "-initrd": str(tmp_path / "images" / "initrd.img"),
        "-append": f"root=/dev/sda1 id={UUID},web $5",
    }


@pytest.mark.parametrize("name", ["../secret", "/etc/shadow", "..", ".", "-kernel", "vmlinuz,/etc/shadow", "a\nb"])
@pytest.mark.parametrize("field", ["kernel", "initrd"])
def test_a_path_never_reaches_qemu_not_even_from_the_ledger(images: Images, field: str, name: str) -> None:
    with pytest.raises(EngineError, match=rf"boot\.{field} must be the name"):
        told(images, replace(Boot(), **{field: name}))


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing", "No such file"), ("gone", "No such file"), ("folder", "no regular file")],
)
def test_an_image_that_is_not_here_is_named(images: Images, name: str, said: str) -> None:
    with pytest.raises(EngineError, match=said) as caught:
        told(images, Boot(initrd=name))
    assert f"the image {name!r} (boot.initrd)" in str(caught.value)


def test_a_host_that_offers_no_images_says_so(images: Images, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"configuration has none \(images\)"):
        told(replace(images, directory=None), Boot(kernel="vmlinuz"))
    with pytest.raises(EngineError, match=r"no default \(guest_image\)"):
        told(replace(images, default=None), Boot())
    with pytest.raises(EngineError, match="there is no file"):
        told(replace(images, default=tmp_path / "not-built.elf"), Boot())
    assert told(replace(images, default=None), Boot(kernel="vmlinuz"))["-kernel"].endswith("/images/vmlinuz")


def test_a_device_inside_the_vmm_is_never_left_out_in_silence(images: Images, tmp_path: Path) -> None:
    guest = GuestSpec("g", devices=(DeviceSpec("nic", ShimKind.VFIO),))
    spec = VmmSpec("guest-1", "s", guest, Path("/x"), Path("/x/con"), None)
    launch = Launch("qemu-system-x86_64", images, "tcg", reconnect_ms=True)
    with pytest.raises(EngineError, match="no device process"):
        environment(launch, spec)
    spec = replace(spec, vfio_path=Path("/x/s.vfio"))
    with pytest.raises(EngineError, match="need the preload"):
        environment(launch, spec)
    preload = tmp_path / "preload.so"
    preload.touch()
    assert environment(replace(launch, vfio_preload=preload), spec) == {
        "LD_PRELOAD": str(preload),
        "DROVER_VFIO": "1:/x/s.vfio",
    }
    words = command_line(launch, spec, incoming=False)
    (described,) = [word for word in words if word.startswith("vfio-pci,")]
    assert "id=vfio-nic,fd=401" in described
