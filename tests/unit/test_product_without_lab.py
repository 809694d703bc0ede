"""The product works where the lab (deploy/) is not installed, and `drover` takes commands from whoever adds them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click
import pytest

from orchestrator.cli import main, plugins
from orchestrator.cli.exits import Exit

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("agents", "orchestrator", "protos")


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the product alone, as a wheel without deploy/ would put it on the path."""
    root = tmp_path_factory.mktemp("product")
    for package in PRODUCT:
        (root / package).symlink_to(ROOT / package)
    return root


def run(product: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """python WORDS, with this environment's libraries and the product; the checkout itself is not on the path."""
    program = (
        f"import sys, runpy; sys.path[:] = [p for p in sys.path if p not in ('', {str(ROOT)!r})]; "
        f"sys.path.insert(0, {str(product)!r}); import importlib.util as u; assert u.find_spec('deploy') is None; "
        "sys.argv[:] = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(
        command, cwd=product, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("module", ["orchestrator.cli.main", "agents", "orchestrator.api", "orchestrator.coordinator"])
def test_every_part_of_the_product_starts_without_the_lab(product: Path, module: str) -> None:
    ran = run(product, module, "--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "usage" in ran.stdout.lower()


def test_every_module_of_the_product_can_be_imported_without_the_lab(product: Path) -> None:
    program = product / "imports.py"
    program.write_text(
        "import importlib, pkgutil, sys\n"
        f"for package in {PRODUCT!r}:\n"
        "    for found in pkgutil.walk_packages([f'{sys.argv[1]}/{package}'], f'{package}.'):\n"
        "        if not found.name.endswith('__main__'):\n"
        "            importlib.import_module(found.name)\n"
        "            print(found.name)\n"
    )
    ran = run(product, "imports", str(product))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert {"agents.agent", "agents.shims.companion", "orchestrator.cli.main"} <= set(ran.stdout.split())


@pytest.mark.parametrize("package", ["orchestrator", "agents"])
def test_the_product_knows_nothing_of_what_the_labs_devices_can_be_told(package: str) -> None:
    """Scenarios, late ACKs on demand and chaos are the lab's: options and instructions to the product. It only knows
    the role of somebody who may send such instructions."""
    role = re.compile(r'CHAOS = "chaos"|Role\.CHAOS|_CHAOS\b')
    words = re.compile(r"scenario|chaos|inject_late|InjectLate|InjectAck", re.IGNORECASE)
    told = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(role.sub("", line))
    ]
    assert told == []


def test_without_the_lab_its_commands_are_not_offered_and_say_why(product: Path) -> None:
    shown = run(product, "orchestrator.cli.main", "--help").stdout
    assert "evacuate" in shown
    assert "A cluster on this machine" not in shown
    ran = run(product, "orchestrator.cli.main", "up", "--hosts", "3")
    assert ran.returncode == Exit.FAILED
    assert "the command up cannot be loaded from deploy.lab" in ran.stderr


# --- commands that packages add ---------------------------------------------------------------------------------------


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package is installed that adds `drover hello`, `drover host polish` and two commands that cannot be had."""
    (tmp_path / "vendor_tool.py").write_text(
        "import click\n"
        "@click.command(short_help='Greet.')\n"
        "@click.argument('whom')\n"
        "def hello(whom): click.echo(f'hello {whom}')\n"
        "@click.command('polish')\n"
        "def polish(): click.echo('it shines')\n"
        "hello.section = 'Courtesy'\n"
        "number = 7\n"
    )
    info = tmp_path / "vendor_tool-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vendor-tool\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[drover.commands]\n"
        "hello = vendor_tool:hello\n"
        "migrate = vendor_tool:hello\n"
        "host.polish = vendor_tool:polish\n"
        "broken = vendor_tool:nothing\n"
        "number = vendor_tool:number\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.offered.cache_clear()
    yield
    plugins.offered.cache_clear()


@pytest.mark.usefixtures("added")
def test_a_package_adds_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["hello", "world"]) == Exit.OK
    assert main.run(["host", "polish"]) == Exit.OK
    assert capsys.readouterr().out == "hello world\nit shines\n"
    assert main.run(["--help"]) == Exit.OK
    shown = capsys.readouterr().out
    assert "Courtesy:\n  hello" in shown
    assert shown.index("Moving guests") < shown.index("Courtesy")
    assert "Cannot be loaded from vendor_tool:nothing" in shown
    assert main.run(["host", "--help"]) == Exit.OK
    assert "polish" in capsys.readouterr().out


@pytest.mark.usefixtures("added")
def test_a_package_cannot_take_the_place_of_a_command_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["migrate", "--help"]) == Exit.OK
    assert "Move GUEST to another host" in capsys.readouterr().out
    assert main.run(["host.polish"]) == Exit.USAGE


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize(("name", "why"), [("broken", "AttributeError"), ("number", "it is no click command")])
def test_a_command_that_cannot_be_loaded_says_so(name: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([name, "--any", "words"]) == Exit.FAILED
    told = capsys.readouterr().err
    assert f"the command {name} cannot be loaded from vendor_tool:" in told
    assert why in told


def test_an_installation_that_names_no_plugins_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plugins, "offered", dict[str, metadata.EntryPoint])
    assert main.run(["up"]) == Exit.USAGE
    told = capsys.readouterr().err
    assert told.startswith("drover: no such command 'up'\n")
    assert "make venv" in told
    assert main.run(["guest", "serial", "web"]) == Exit.USAGE
    assert main.run(["--help"]) == Exit.OK


def test_our_own_commands_never_look_at_what_is_installed() -> None:
    program = (
        "import sys; from orchestrator.cli import main, plugins; code = main.run(['migration', 'list', '--help']); "
        "print(code, plugins.offered.cache_info().currsize)"
    )
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert ran.stdout.splitlines()[-1] == "0 0"


def test_this_installation_knows_the_lab() -> None:
    """Fails in an environment that was installed from an older pyproject.toml: `make venv`."""
    lab = {
        "up",
        "down",
        "status",
        "demo",
        "chaos",
        "host.power-cycle",
        "host.power-on",
        "guest.serial",
        "guest.verify",
    }
    assert lab <= plugins.offered().keys()
    context = click.Context(main.root)
    for place in lab:
        group = main.root
        for word in place.split("."):
            found = group.get_command(context, word)
            assert found is not None
            assert not found.hidden
            group = found if isinstance(found, click.Group) else group
