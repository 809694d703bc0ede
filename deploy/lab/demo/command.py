"""`drover demo`: stage, evacuate, check, judge; whatever happens, the demo's cluster is gone at the end."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import statistics
import textwrap
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from deploy.lab.commands.base import LabCommand
from orchestrator.cli import units
from orchestrator.cli.exits import CliError, Ended, Exit
from orchestrator.cli.output import Printer, note

if TYPE_CHECKING:
    from deploy.lab.cluster.evidence import NoiseFloor
    from deploy.lab.demo.checks import Checks
    from deploy.lab.demo.disks import Taken
    from deploy.lab.demo.incidents import Incidents
    from deploy.lab.demo.judge import GuestReport, Role, Run
    from deploy.lab.demo.serial import Words
    from deploy.lab.peer.client import Peer

SOURCE = "host-1"
WIDTH = 110
PEER_EVERY_MS = 5.0
PEER_S = 30.0
"""Until a guest that beats has answered its peer."""
PATIENCE = "90s"
"""Total time of each migration, so that the evacuation ends, well or badly."""
_EXPLAINED = r"^attempt|stood still"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Stopped(BaseException):
    """Ctrl-C, SIGTERM or the end of the terminal. Nobody on the way may take it for an ordinary Ctrl-C."""


@click.command(cls=LabCommand)
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the demo's own cluster.  [default: ~/.drover-demo]",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("build/demo-report.json"),
    show_default=True,
    help="The report; the guests' own words and all logs are kept beside it.",
)
@click.option(
    "--guests",
    "guest_files",
    type=click.Path(dir_okay=False, path_type=Path),
    multiple=True,
    help="Other guests.  [default: those of deploy/lab/demo]",
)
@click.option("--qemu", default="", metavar="BINARY|VERSION", help="As of `drover up`.")
def demo(directory: Path | None, report: Path, guest_files: tuple[Path, ...], qemu: str) -> None:
    """Empty a host of real guests, and let the guests prove what became of them.

    Starts a cluster of its own with four hosts and fourteen guests on one of them, two of which are Linux with a disk
    each. On the way devices ask for late ACKs, the operator pauses a guest and policy suspends one. Exit code 0: every
    promise was kept, 1: one was not, and each is told in one sentence. Nothing is left running at any end, Ctrl-C
    included.
    """
    from deploy.lab.demo import staging

    directory = directory or Path.home() / ".drover-demo"
    staging.refuse_running(directory)
    if not guest_files and (why := staging.without_linux(directory)):
        note(f"drover: without the Linux guests: {why}")
    Demo(directory, report.resolve(), guest_files or staging.guest_files(qemu, directory), qemu).perform()


class Demo:
    """One performance."""

    def __init__(self, directory: Path, report: Path, guest_files: Sequence[Path], qemu: str) -> None:
        self._directory = directory
        self._report = report
        self._guest_files = guest_files
        self._qemu = qemu
        self._printer = Printer("table")
        self._elapsed_s: dict[str, float] = {}

    def perform(self) -> None:
        """Raises Ended(FAILED) when a promise was broken, Ended(INTERRUPTED), and CliError when the stage fell down."""
        from deploy.lab.cluster import commands
        from deploy.lab.cluster.console_client import ConsoleError

        with _stoppable():
            try:
                self._perform()
            except BaseException as error:
                _ignore_signals()
                commands.down(self._directory)
                if isinstance(error, _Stopped):
                    note("drover: interrupted; nothing is left of the demo's cluster")
                    raise Ended(Exit.INTERRUPTED) from None
                if isinstance(error, ConsoleError):
                    raise CliError(Exit.FAILED, str(error)) from None
                raise

    def _perform(self) -> None:
        from deploy.lab.demo.checks import Checks
        from deploy.lab.demo.incidents import Incidents

        self._report.unlink(missing_ok=True)
        roles = self._stage()
        with self._peer_of(roles) as peer, Incidents(self._directory, roles) as incidents:
            with self._step("evacuation"):
                self._evacuate()
                incidents.await_last_news()
            quiet_until_ns = time.monotonic_ns()
            checks = Checks(self._directory, roles, incidents, peer)
            with self._step("checks"):
                checks.run(SOURCE)
            self._tell_incidents(incidents, len(roles))
            self._explain(roles)
        with self._step("down"):
            left, words, images = self._strike(checks)
        self._judge(roles, incidents, checks, words, left, quiet_until_ns, images)

    @contextlib.contextmanager
    def _step(self, name: str) -> Generator[None]:
        began = time.monotonic()
        yield
        self._elapsed_s[name] = time.monotonic() - began

    def _type(self, command: str, remark: str = "") -> None:
        """Show what an operator would type."""
        from rich.text import Text

        line = Text("$ ", style="dim").append(command, style="not dim bold")
        self._printer.show(line.append(f"  # {remark}", style="dim") if remark else line)

    # --- stage --------------------------------------------------------------------------------------------------------

    def _stage(self) -> list[Role]:
        from deploy.lab.demo import staging
        from deploy.lab.demo.judge import RoleError, role_of

        specs = staging.read_guests(self._guest_files)
        try:
            roles = [role_of(spec) for spec in specs]
        except RoleError as error:
            raise CliError(Exit.USAGE, str(error)) from None
        with self._step("up"):
            self._type(f"drover up --hosts {staging.HOSTS}{f' --qemu {self._qemu}' if self._qemu else ''}")
            staging.raise_cluster(self._directory, self._qemu)
        with self._step("guests"):
            files = " ".join(str(_near(path)) for path in self._guest_files)
            self._type(f"drover guest run {files} --host {SOURCE}")
            staging.run_guests(self._directory, specs, SOURCE)
        self._tell_roles(roles)
        return roles

    def _tell_roles(self, roles: Sequence[Role]) -> None:
        devices = sum(bool(role.devices) for role in roles)
        memory_mib = sum(role.memory_mib for role in roles)
        guests = units.count(len(roles), "guest")
        self._printer.show(f"{guests} on {SOURCE} with {memory_mib} MiB, {devices} of them with devices of their own:")
        for role in roles:
            if story := _story(role):
                self._printer.show(f"  {role.name:<12} {story}")

    @contextlib.contextmanager
    def _peer_of(self, roles: Sequence[Role]) -> Generator[Peer]:
        """Outside of all hosts, in the guests' network, and talking with those that have a card in it."""
        from deploy.lab.cluster.layout import CLUSTER_VARIABLE, Layout
        from deploy.lab.demo import staging
        from deploy.lab.peer.client import Peer, PeerError

        layout = Layout.of(self._directory)
        watched = [role.name for role in roles if role.linux]
        place = layout.management_namespace if watched else None
        with Peer(place, {CLUSTER_VARIABLE: str(layout.dir)}) as peer:
            try:
                for name, address in staging.addresses(self._directory, watched).items():
                    peer.watch(name, address, PEER_EVERY_MS)
                for name in watched:
                    peer.await_answers(name, PEER_S)
            except PeerError as error:
                raise CliError(Exit.FAILED, str(error)) from None
            yield peer

    # --- evacuation ---------------------------------------------------------------------------------------------------

    def _evacuate(self) -> None:
        """How it ended is judged later."""
        from orchestrator.cli import evacuation

        self._type(f"drover evacuate {SOURCE} --watch --total-timeout {PATIENCE}")
        arguments = [SOURCE, "--watch", "--total-timeout", PATIENCE, "--dir", str(self._directory)]
        with contextlib.suppress(Ended):
            evacuation.evacuate.main(arguments, prog_name="drover evacuate", standalone_mode=False)

    def _tell_incidents(self, incidents: Incidents, guests: int) -> None:
        for name, pause in incidents.pauses.items():
            at_s = (pause.asked_ns - incidents.began_ns) / 1e9
            acks = f"the ACK of {', '.join(pause.pending)} was pending"
            self._type(f"drover guest pause {name}", f"meanwhile, at {at_s:.1f} s: in pre-copy, while {acks}")
            self._type(f"drover guest resume {name}", "after its arrival")
        self._type("drover guest verify ...", f"each of the {guests} checks all of its memory")

    def _explain(self, roles: Sequence[Role]) -> None:
        """All of it beside the report, the gist here."""
        from orchestrator.cli.explain import explain

        latest = max(roles, key=lambda role: role.late_acks, default=None)
        if latest is None or not latest.late_acks:
            return
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            arguments = ["--guest", latest.name, "--dir", str(self._directory)]
            explain.main(arguments, prog_name="drover explain", standalone_mode=False)
        self._explanation.parent.mkdir(parents=True, exist_ok=True)
        self._explanation.write_text(told.getvalue())
        command = f"drover explain --guest {latest.name} | grep -E '{_EXPLAINED}'"
        self._type(command, f"all of it: {_near(self._explanation)}")
        for line in told.getvalue().splitlines():
            if re.search(_EXPLAINED, line):
                self._printer.show(textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False))

    # --- end ----------------------------------------------------------------------------------------------------------

    @property
    def _serial(self) -> Path:
        return self._report.parent / "demo-serial"

    @property
    def _logs(self) -> Path:
        return self._report.parent / "demo-logs"

    @property
    def _disks(self) -> Path:
        return self._report.parent / "demo-disks"

    @property
    def _explanation(self) -> Path:
        return self._report.parent / "demo-explain.txt"

    def _strike(self, checks: Checks) -> tuple[list[str], dict[str, Words], dict[str, tuple[Taken, ...]]]:
        """End the cluster, keep what the guests said and wrote; what is left of the cluster, and that."""
        from deploy.lab.cluster import commands
        from deploy.lab.cluster.layout import Layout
        from deploy.lab.demo import disks, serial

        layout = Layout.of(self._directory)
        self._type("drover down")
        commands.down(self._directory, keep=("serial", "logs", "hosts", "pools"))
        serial.keep(layout, self._serial, self._logs)
        self._disks.mkdir(parents=True, exist_ok=True)
        owners = {role: checks.answers[role.name].owner for role in checks.roles if role.name in checks.answers}
        images = {
            role.name: disks.take(layout, owner, role.name, role.disks, self._disks)
            for role, owner in owners.items()
            if role.disks
        }
        return commands.down(self._directory), serial.read(self._serial), images

    def _judge(
        self,
        roles: Sequence[Role],
        incidents: Incidents,
        checks: Checks,
        words: dict[str, Words],
        left: Sequence[str],
        quiet_until_ns: int,
        images: dict[str, tuple[Taken, ...]],
    ) -> None:
        from deploy.lab.demo import report
        from deploy.lab.demo.judge import Run, broken_promises

        guests, mishaps = _reports(roles, incidents, checks, words)
        guests = [_with_images(guest, images.get(guest.role.name, ())) for guest in guests]
        run = Run(
            source=SOURCE,
            evacuation_phase=checks.evacuation_phase,
            safe_to_power_off=checks.safe_to_power_off,
            noise=_noise(incidents, words, quiet_until_ns),
            leftovers=tuple(left),
            mishaps=(*incidents.mishaps, *checks.mishaps, *mishaps),
        )
        broken = broken_promises(run, guests)
        elapsed_s = self._elapsed_s
        report.write(
            self._report,
            report.document(run, guests, words, broken, elapsed_s=elapsed_s, beside=self._report.parent),
        )
        report.show(self._printer, run, guests)
        self._verdict(run, guests, broken)

    def _verdict(self, run: Run, guests: Sequence[GuestReport], broken: Sequence[str]) -> None:
        steps = ", ".join(f"{name} {units.seconds(took_s)}" for name, took_s in self._elapsed_s.items())
        late = sum(guest.late_acks for guest in guests)
        downtimes = [guest.downtime_ms for guest in guests if guest.downtime_ms is not None]
        self._printer.show(
            "",
            f"{units.seconds(sum(self._elapsed_s.values()))} in all: {steps}",
            f"report: {_near(self._report)}; what the guests said: {_near(self._serial)}/; logs: {_near(self._logs)}/",
        )
        if broken:
            for sentence in broken:
                note(f"BROKEN  {sentence}")
            raise Ended(Exit.FAILED)
        if downtimes:
            self._printer.show(
                f"downtime: median {statistics.median(downtimes):.0f} ms, at most {max(downtimes):.0f} ms "
                f"(noise floor ±{run.noise.p95_ms or 0:.0f} ms); aborts for a late ACK: {late}"
            )
        self._printer.show(f"every promise was kept: {len(guests)} guests moved off {run.source}, nothing is left")


def _reports(
    roles: Sequence[Role], incidents: Incidents, checks: Checks, words: dict[str, Words]
) -> tuple[list[GuestReport], list[str]]:
    """A report per guest that was ever heard, and a sentence for each that was not."""
    from deploy.lab.demo.incidents import Sight
    from deploy.lab.demo.judge import Answer, Sightings, report_on

    found: list[GuestReport] = []
    unheard: list[str] = []
    for role in roles:
        said = words.get(role.name)
        if said is None:
            unheard.append(f"nothing was ever heard of {role.name}")
            continue
        sight = incidents.sights.get(role.name, Sight())
        seen = Sightings(
            tuple(sight.aborts_ns),
            incidents.pauses.get(role.name),
            checks.consoles.get(role.name, ()),
            checks.outages.get(role.name),
        )
        answer = checks.answers.get(role.name, Answer())
        found.append(report_on(role, SOURCE, answer, seen, said.logs, said.period_ns))
    return found, unheard


def _with_images(guest: GuestReport, images: Sequence[Taken]) -> GuestReport:
    """Its images judged by the newest promise that it was heard to make."""
    from deploy.lab.demo.disks import judge

    promised = guest.evidence.device_rings
    return replace(guest, images=tuple(judge(image, guest.answer.uuid, promised) for image in images))


def _noise(incidents: Incidents, words: dict[str, Words], until_ns: int) -> NoiseFloor:
    """Of this run: beats of guests that wait for their turn or have arrived, while others move."""
    from deploy.lab.cluster.evidence import noise_floor

    still = [
        (log, window, words[name].period_ns or 0.0)
        for name, sight in incidents.sights.items()
        if name in words and name not in incidents.pauses and words[name].period_ns
        for window in sight.left_alone(incidents.began_ns, until_ns)
        for log in words[name].logs
    ]
    return noise_floor(still)


def _story(role: Role) -> str:
    """What is in store for it; empty when it just moves."""
    from deploy.lab.demo.judge import OPERATOR, POLICY

    device = ", ".join(role.devices)
    if role.late_acks:
        times = "once" if role.late_acks == 1 else f"{role.late_acks} times in a row"
        return f"its device {device} will ask for another ACK when the guest has stopped already, {times}"
    if role.stopped_by == OPERATOR:
        return f"the operator will pause it in pre-copy, while the ACK of {device} is pending"
    if role.stopped_by == POLICY:
        return f"does not converge: policy will suspend it, while the ACK of {device} is pending"
    if role.linux:
        return "Linux: a peer outside talks with it over UDP and one TCP connection"
    return ""


def _near(path: Path) -> str:
    """As somebody in the working directory would write it."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


# --- signals ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stoppable() -> Generator[None]:
    """The first signal raises _Stopped, once; later ones are ignored while everything is taken down."""

    def stop(*_: object) -> NoReturn:
        _ignore_signals()
        raise _Stopped

    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number in _SIGNALS:
            if previous[number] is not signal.SIG_IGN:  # `nohup` is respected
                signal.signal(number, stop)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
