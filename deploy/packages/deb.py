"""`python -m deploy.packages.deb`: a Debian package with Drover and everything that it imports in /opt/drover.

The libraries are those of this environment, whose files pip has checked against the hashes in requirements.lock;
nothing is fetched. The same checkout and environment give the same package, byte for byte: times are those of the last
commit (or $SOURCE_DATE_EPOCH), names are sorted, owners are root, byte code is compiled with fixed hashes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import click
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OPT = Path("opt/drover")
PYTHON = f"python3.{sys.version_info.minor}"
SITE = OPT / "lib" / PYTHON / "site-packages"
LEFT_OUT = frozenset({"direct_url.json", "REQUESTED"})
"""They say where a library came from on the machine that builds."""
DOCS = ("README.md", "CHANGELOG.md", "LICENSE", "docs")
DEPENDS = (
    f"{PYTHON}, python3-minimal, systemd (>= 252), iproute2, qemu-system-x86 (>= 1:8.2), qemu-utils, "
    "qemu-system-common (>= 1:8.2)"
)
CONTROL = """\
Package: drover
Version: {version}
Architecture: amd64
Section: admin
Priority: optional
Maintainer: Drover <drover@localhost>
Installed-Size: {kib}
Depends: {depends}
Recommends: swtpm, ovmf
Description: moves running virtual machines between hosts
 Agent, API, coordinator and command line, with a Python environment of their own
 below /opt/drover. Nothing is started before it has a file in /etc/drover.
"""
LAUNCHER = """\
#!/{python} -I
import sys
from {module} import main
sys.exit(main())
"""
LAUNCHERS = {"drover": "orchestrator.cli.main", "drover-guests-here": "agents.host.remaining"}


def libraries() -> list[metadata.Distribution]:
    """Everything that Drover needs here, itself left out, by name. Raises PackageNotFoundError."""
    found: dict[str, metadata.Distribution] = {}

    def need(name: str) -> None:
        distribution = metadata.distribution(name)
        key = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if key in found:
            return
        found[key] = distribution
        for text in distribution.requires or []:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                need(wanted.name)

    # What the checkout asks for: an editable install may say what an earlier one asked for.
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        need(Requirement(text).name)
    return [found[key] for key in sorted(found)]


def copy_libraries(root: Path, distributions: Iterable[metadata.Distribution]) -> None:
    """Their files, without what was compiled or written for this machine."""
    for distribution in distributions:
        for file in distribution.files or []:
            source = Path(str(distribution.locate_file(file)))
            outside = ".." in file.parts or "__pycache__" in file.parts
            if outside or file.name in LEFT_OUT or not source.is_file():
                continue
            target = root / SITE / str(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.name == "RECORD":
                target.write_text(_record(source.read_text()))
            else:
                shutil.copyfile(source, target)
                target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def _record(text: str) -> str:
    """The list of files, of those only that are in the package."""
    lines = text.splitlines(keepends=True)
    return "".join(
        sorted(
            line
            for line in lines
            if "__pycache__" not in line and ".." not in line and Path(line.partition(",")[0]).name not in LEFT_OUT
        )
    )


def build_wheel(out: Path, epoch: int) -> Path:
    """Drover's wheel, which is also what a client of the API installs."""
    before = set(out.glob("*.whl"))
    for old in before:
        old.unlink()
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return next(iter(out.glob("drover-*.whl")))


def _unpack(wheel: Path, root: Path) -> None:
    """The product. The lab stays behind, and so do the commands that it adds."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.startswith("deploy/"):
                archive.extract(name, root / SITE)
    points = next(iter((root / SITE).glob("drover-*.dist-info/entry_points.txt")))
    lines = points.read_text().splitlines(keepends=True)
    points.write_text("".join(line for line in lines if "= deploy." not in line))
    record = points.with_name("RECORD")
    record.write_text("".join(line for line in record.read_text().splitlines(True) if not line.startswith("deploy/")))


def _environment(root: Path) -> None:
    """What makes /opt/drover a virtual environment of the system's Python."""
    (root / OPT / "bin").mkdir(parents=True)
    for name in ("python3", PYTHON):
        (root / OPT / "bin" / name).symlink_to(f"/usr/bin/{PYTHON}")
    (root / OPT / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    for name, module in LAUNCHERS.items():
        path = root / OPT / "bin" / name
        path.write_text(LAUNCHER.format(python=OPT / "bin" / "python3", module=module))
        path.chmod(0o755)
    (root / "usr/bin").mkdir(parents=True, exist_ok=True)
    (root / "usr/bin/drover").symlink_to("/opt/drover/bin/drover")


def _compile(root: Path) -> None:
    """Byte code beside the sources: services cannot write it, and start in a third of the time with it."""
    python = f"/usr/bin/{PYTHON}" if Path(f"/usr/bin/{PYTHON}").exists() else sys.executable
    command = [python, "-I", "-m", "compileall", "-q", "-s", str(root), "-p", "/"]
    command += ["--invalidation-mode", "unchecked-hash", str(root / SITE)]
    # Some libraries carry files that are no Python of this version: those have none.
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}, check=False, capture_output=True)


def _docs(root: Path) -> None:
    target = root / "usr/share/doc/drover"
    target.mkdir(parents=True, exist_ok=True)
    for name in DOCS:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target / source.name)


def _settle(root: Path, epoch: int) -> int:
    """The same modes and times everywhere; the size in KiB."""
    size = 0
    for path in sorted(root.rglob("*"), reverse=True):
        if not path.is_symlink():
            if path.is_dir():
                path.chmod(0o755)
            else:
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
                size += path.stat().st_size
        os.utime(path, (epoch, epoch), follow_symlinks=False)
    return size // 1024


def epoch_of() -> int:
    """The time that everything in the package has: $SOURCE_DATE_EPOCH, else the last commit's."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return int(given)
    command = ["git", "log", "-1", "--format=%ct"]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def build(out: Path, version: str, distributions: Iterable[metadata.Distribution] | None = None) -> Path:
    """Makes the package below `out`, and returns it; nothing else is left there but the wheel. `distributions`: other
    libraries than those that Drover needs."""
    out.mkdir(parents=True, exist_ok=True)
    epoch = epoch_of()
    root = out / "root"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(HERE / "root", root)
    _environment(root)
    copy_libraries(root, libraries() if distributions is None else distributions)
    _unpack(build_wheel(out, epoch), root)
    _docs(root)
    _compile(root)
    control = root / "DEBIAN"
    shutil.copytree(HERE / "debian", control)
    kib = _settle(root, epoch)
    (control / "control").write_text(CONTROL.format(version=version, kib=kib, depends=DEPENDS))
    os.utime(control / "control", (epoch, epoch))
    package = out / f"drover_{version}_amd64.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Zzstd", "-z6", "--threads-max=1", "--build", str(root), str(package)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    shutil.rmtree(root)
    return package


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "build" / "packages")
@click.option("--version", default="", help="Of the package; default: that of the project, and revision 1.")
@click.option("--wheel", is_flag=True, help="The wheel alone.")
def main(out: Path, version: str, wheel: bool) -> None:
    """Build the Debian package."""
    if wheel:
        out.mkdir(parents=True, exist_ok=True)
        made = build_wheel(out, epoch_of())
    else:
        made = build(out.resolve(), version or f"{metadata.version('drover')}-1")
    click.echo(f"{made}  {made.stat().st_size / 1e6:.1f} MB  sha256 {hashlib.sha256(made.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
