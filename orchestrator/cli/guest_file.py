"""The guest file: guests as an operator writes them, in YAML (docs/guest-file.md has every key and an example of each).

`load` reads files and tells everything that is wrong with them at once, with file, line and field; what it returns is
sound for `CreateGuest`, apart from what only the cluster knows (names taken, room).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, Protocol, cast, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import ErrorDetails

from orchestrator.cli import marked_yaml, units
from orchestrator.cli.exits import CliError, Exit
from orchestrator.cli.marked_yaml import Marked, Path, YamlError
from orchestrator.core.guest import guest_errors
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
    OnHostDeath,
    ShimKind,
    Tpm,
)

ENTRY_POINTS = "drover.guest_file"
MAX_COUNT = 1000
MAX_FILE_BYTES = 256 << 10
"""Of a file that a guest file names; what may be in it is less."""
_MERGED = ("boot", "cloud_init", "cpu", "display", "labels", "policy")
"""Defaults and a guest's own values are put together key by key here, and below keys that other packages add; elsewhere
the guest's own take their place."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a guest file."""

    file: str
    line: int
    """From 1; 0 when it concerns the file as a whole."""
    field: str
    """Such as `guests[0].devices[1].shim`; empty when it concerns the file as a whole."""
    message: str

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        field = f"{self.field}: " if self.field else ""
        return f"{self.file}{line}: {field}{self.message}"


class GuestFileError(Exception):
    """Everything that is wrong with the files; no guest of them is to be created."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


# --- what may stand in it ---------------------------------------------------------------------------------------------


def _size(parse: Callable[[str], int]) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


Mib = Annotated[int, _size(units.parse_mib)]
"""Whole MiB, or a size with a unit."""
_Bytes = Annotated[int, _size(units.parse_bytes)]
_Text = Annotated[str, Field(max_length=4096)]


def _as_text(value: Any) -> Any:
    """Options are text to whoever reads them: what YAML takes for a number or a truth value is written out again."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


_Option = Annotated[str, BeforeValidator(_as_text)]


class Model(BaseModel):
    """A mapping of a guest file: unknown keys and values of another kind are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _as(model: type[Model]) -> PlainValidator:
    """Of a type that only exists at run time."""
    return PlainValidator(model.model_validate)


def model_of(record: type[Any], **types: Any) -> type[Model]:
    """A model with the fields of a record of the core, so that a new one can be written in a file at once.

    The defaults stay the record's own: what a file leaves out is not set in the model.
    """
    hints = get_type_hints(record)
    definitions: dict[str, Any] = {
        each.name: (types.get(each.name, hints[each.name]), None) for each in known_fields(record)
    }
    return create_model(record.__name__, __base__=Model, **definitions)


_Boot = model_of(Boot, firmware=Literal["direct", "bios", "uefi"])
_Cpu = model_of(Cpu)
_Tpm = model_of(Tpm, version=_Option)
_Display = model_of(Display)
_Policy = model_of(MigrationPolicy, on_timeout=Literal["abort", "suspend"])


class _Device(Model):
    name: _Text
    shim: Literal["companion", "net", "vfio", "external"]
    dma: _Text = "none"
    initial_bytes: _Bytes = 0
    stop_copy_bytes: _Bytes = 0
    dirty_bytes_per_s: _Bytes = 0
    driver: _Text = ""
    options: dict[str, _Option] = Field(default_factory=dict[str, str])

    def spec(self) -> DeviceSpec:
        given = self.model_dump(include=set(_Device.model_fields) - {"shim"}, exclude_unset=True)
        return DeviceSpec(**given, shim=ShimKind(self.shim))


class _Disk(Model):
    name: _Text
    pool: _Text
    image: _Text = ""
    format: Literal["raw", "qcow2"] = "qcow2"
    size: _Bytes = 0
    cache: Literal["none", "writeback"] = "none"
    read_only: bool = False
    boot: bool = False
    iothread: bool = False
    base: _Text = ""
    base_format: Literal["raw", "qcow2"] = "qcow2"

    def spec(self) -> DiskSpec:
        """An image without a name gets one that no other guest has; `${name}` in it is the guest's."""
        return DiskSpec(
            name=self.name,
            pool=self.pool,
            image=self.image or f"{_OWN_NAME}-{self.name}.{self.format}",
            format=DiskFormat(self.format),
            size_bytes=self.size,
            cache=DiskCache(self.cache),
            read_only=self.read_only,
            boot=self.boot,
            iothread=self.iothread,
            base=self.base,
            base_format=DiskFormat(self.base_format),
        )


class _Nic(Model):
    name: _Text
    network: _Text
    mac: _Text = ""
    queues: int = 1
    mtu: int = 0

    def spec(self) -> NicSpec:
        return NicSpec(self.name, self.network, self.mac.lower(), self.queues, self.mtu)


class _CloudInit(Model):
    user_data: str = ""
    meta_data: str = ""
    network_config: str = ""


_OWN_NAME = "${name}"


class _Guest(Model):
    name: _Text
    count: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    memory: Mib = 0
    max_memory: Mib = 0
    vcpus: int = 0
    max_vcpus: int = 0
    machine: _Text = ""
    cpu: Annotated[Model, _as(_Cpu)] = Model()
    boot: Annotated[Model, _as(_Boot)] = Model()
    disks: list[_Disk] = Field(default_factory=list[_Disk])
    nics: list[_Nic] = Field(default_factory=list[_Nic])
    tpm: Annotated[Model, _as(_Tpm)] | None = None
    cloud_init: _CloudInit | None = None
    system_uuid: _Text = ""
    display: Annotated[Model, _as(_Display)] = Model()
    extra_args: list[_Text] = Field(default_factory=list[str])
    devices: list[_Device] = Field(default_factory=list[_Device])
    labels: dict[str, _Text] = Field(default_factory=dict[str, str])
    policy: Annotated[Model, _as(_Policy)] = Model()
    on_host_death: Literal["leave", "restart"] = "leave"

    @model_validator(mode="before")
    @classmethod
    def _is_mapping(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("must be a mapping with at least a name, such as {name: web-1, memory: 64MiB}")
        return cast("dict[str, Any]", value)

    def spec(self) -> GuestSpec:
        given = self.model_dump(
            include={"name", "vcpus", "max_vcpus", "machine", "labels", "system_uuid"}, exclude_unset=True
        )
        if "memory" in self.model_fields_set:
            given["memory_mib"] = self.memory
        if "max_memory" in self.model_fields_set:
            given["max_memory_mib"] = self.max_memory
        policy = self.policy.model_dump(exclude_unset=True)
        if "on_timeout" in policy:
            policy["on_timeout"] = OnTimeout(policy["on_timeout"])
        boot = self.boot.model_dump(exclude_unset=True)
        if "firmware" in boot:
            boot["firmware"] = Firmware(boot["firmware"])
        return GuestSpec(
            **given,
            boot=Boot(**boot),
            cpu=Cpu(**self.cpu.model_dump(exclude_unset=True)),
            disks=tuple(disk.spec() for disk in self.disks),
            nics=tuple(nic.spec() for nic in self.nics),
            tpm=Tpm(**self.tpm.model_dump(exclude_unset=True)) if self.tpm is not None else None,
            display=Display(**self.display.model_dump(exclude_unset=True)),
            extra_args=tuple(self.extra_args),
            devices=tuple(device.spec() for device in self.devices),
            policy=MigrationPolicy(**policy),
            on_host_death=OnHostDeath(self.on_host_death),
        )


# --- keys that other packages add ------------------------------------------------------------------------------------


class Key(Protocol):
    """A key of a guest that another package adds: an entry point of the group `drover.guest_file`, named as the key."""

    model: type[Model]
    """What may stand below it."""

    def apply(self, spec: GuestSpec, given: Model) -> tuple[GuestSpec, Sequence[tuple[str, str]]]:
        """The guest with what the key means, and what is wrong: a field of the guest and a sentence.

        Called for guests that have the key, after everything else of them was read.
        """
        ...


class DeviceKey(Protocol):
    """A key of a device that another package adds: an entry point of the same group, named `devices.` and the key."""

    def apply(self, device: DeviceSpec, given: Any, beside: FilePath) -> tuple[DeviceSpec, Sequence[tuple[str, str]]]:
        """The device with what the key means, as a rule an option, and what is wrong: a place in `given`, such as
        `asks[0].at` or nothing, and a sentence.

        `given` is whatever YAML made of the value; `beside`: the guest file's directory. May read files there.
        """
        ...


_OF_DEVICES = "devices."


@cache
def _added() -> Mapping[str, Any]:
    """Of the installed packages; a key of our own cannot be taken. Raises CliError when one cannot be loaded."""
    found: dict[str, Any] = {}
    ours = {*_Guest.model_fields, *(f"{_OF_DEVICES}{name}" for name in _Device.model_fields)}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        if entry.name in ours:
            continue
        try:
            found[entry.name] = entry.load()()
        except ModuleNotFoundError:
            continue  # promised by an installation that has not all of its packages
        except Exception as error:
            said = f"the key {entry.name} of guest files cannot be loaded from {entry.value}: {error}"
            raise CliError(Exit.FAILED, said, hint="install the package that it comes from again") from error
    return found


@cache
def added_keys() -> Mapping[str, Key]:
    """Keys of a guest that the installed packages add. Raises CliError when one cannot be loaded."""
    return {name: key for name, key in _added().items() if not name.startswith(_OF_DEVICES)}


@cache
def added_device_keys() -> Mapping[str, DeviceKey]:
    """Keys of a device that the installed packages add. Raises CliError when one cannot be loaded."""
    return {name.removeprefix(_OF_DEVICES): key for name, key in _added().items() if name.startswith(_OF_DEVICES)}


@cache
def _device_model() -> type[_Device]:
    added: dict[str, Any] = dict.fromkeys(added_device_keys(), (Any, None))
    return create_model("Device", __base__=_Device, **added)


@cache
def _guest_model() -> type[_Guest]:
    added: dict[str, Any] = {name: (Annotated[Model, _as(key.model)], Model()) for name, key in added_keys().items()}
    devices: Any = list[_device_model()]
    added["devices"] = (devices, Field(default_factory=list[_Device]))
    return create_model("Guest", __base__=_Guest, **added)


# --- reading ----------------------------------------------------------------------------------------------------------


def load(files: Iterable[tuple[str, str]]) -> list[GuestSpec]:
    """Guests of several files, each given as its name and its text, in the order in which they stand there.

    What their keys name is looked for beside the guest file. Raises GuestFileError with everything that is wrong.
    """
    problems: list[Problem] = []
    specs: list[GuestSpec] = []
    places: dict[str, str] = {}
    for file, text in files:
        reader = _FileReader(file)
        specs += reader.read(text)
        for name, path in reader.names:
            if name in places:
                reader.add((*path, "name"), f"the name {name!r} is taken by the guest in {places[name]}")
            places.setdefault(name, f"{file}:{reader.document.line(path)}")
        problems += sorted(reader.problems, key=lambda problem: problem.line)
    if problems:
        raise GuestFileError(problems)
    return specs


class _FileReader:
    """Reads one file and gathers what is wrong with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.document = Marked(None)
        self.problems: list[Problem] = []
        self.names: list[tuple[str, Path]] = []
        """Of all guests, also of those that something is wrong with."""

    def add(self, path: Path, message: str, line: int = 0) -> None:
        where = line or self.document.line(path)
        self.problems.append(Problem(self.name, where, _dotted(path), message))

    def read(self, text: str) -> list[GuestSpec]:
        """The guests that are sound."""
        try:
            self.document = marked_yaml.parse(text)
        except YamlError as error:
            self.add((), error.message, error.line)
            return []
        for path, line, message in self.document.wrong:
            self.add(path, message, line)
        found: list[GuestSpec] = []
        for path, entry in self._entries():
            self.names += [(name, path) for name in _names(entry.value)]
            found += self._guest(path, entry)
        return found

    def _entries(self) -> list[tuple[Path, Marked]]:
        """Each guest's values, put together with the defaults, and its place in the file."""
        top: object = self.document.value
        if not isinstance(top, dict):
            self.add((), "a guest file is a mapping: one guest (name: ...), or guests: with a list of them")
            return []
        keys = cast("dict[str, Any]", top)
        if "guests" not in keys and "defaults" not in keys:
            return [((), self.document)]
        for key in keys.keys() - {"guests", "defaults"}:
            self.add((key,), _unknown(key, ["guests", "defaults"], " (a guest's own keys stand below guests)"))
        defaults = self._defaults(keys)
        guests = keys.get("guests")
        if not isinstance(guests, list) or not guests:
            self.add(("guests",), "must be a list of guests, with at least one")
            return []
        places: list[Path] = [("guests", index) for index in range(len(cast("list[Any]", guests)))]
        return [(path, _merged(defaults, self.document.part(path))) for path in places]

    def _defaults(self, keys: dict[str, Any]) -> Marked:
        """Checked once, here, so that a mistake in them is not told once per guest."""
        if keys.get("defaults") is None:
            return Marked({})
        defaults = self.document.part(("defaults",))
        shared: object = defaults.value
        if not isinstance(shared, dict):
            self.add(("defaults",), "must be a mapping with keys of a guest")
            return Marked({})
        values = cast("dict[str, Any]", shared)
        for key in ("name", "count"):
            if values.pop(key, None) is not None:
                self.add(("defaults", key), "cannot be shared: it belongs to each guest")
        try:
            _guest_model().model_validate({**values, "name": "name"})
        except ValidationError as error:
            for path, message in _told(error):
                self.add(("defaults", *path), message)
                values.pop(cast(str, path[0]), None)
        return defaults

    def _guest(self, path: Path, entry: Marked) -> list[GuestSpec]:
        """The guests that one entry stands for; none when anything is wrong with it."""

        def wrong(place: Path, message: str) -> None:
            self.add((*path, *place), message, entry.line(place))

        before = len(self.problems)
        try:
            guest = _guest_model().model_validate(entry.value)
        except ValidationError as error:
            for place, message in _told(error):
                wrong(place, message)
            return []
        spec, added = self._with_added(guest, self._with_device_keys(guest, wrong))
        spec = self._with_cloud_init(guest, spec, wrong)
        for field, message in (*guest_errors(_named(spec, guest.name)), *added):
            wrong(_parsed(_in_file(field)), message)
        if guest.count is not None:
            for index, disk in enumerate(spec.disks):
                if _OWN_NAME not in disk.image and not disk.read_only:
                    said = f"would be the image of {guest.count} guests, and has one writer: write {_OWN_NAME} into it"
                    wrong(("disks", index, "image"), said)
        if len(self.problems) > before:
            return []
        return [_named(spec, name) for name in _numbered(guest.name, guest.count)]

    def _with_cloud_init(self, guest: _Guest, spec: GuestSpec, wrong: Callable[[Path, str], None]) -> GuestSpec:
        """The guest with the files of its NoCloud data source: each is given as text, or as the name of a file beside
        the guest file."""
        if guest.cloud_init is None:
            return spec
        texts: dict[str, str] = {}
        for field, given in guest.cloud_init.model_dump().items():
            try:
                texts[field] = _text_of(given, FilePath(self.name).parent)
            except ValueError as error:
                wrong(("cloud_init", field), str(error))
                texts[field] = "unreadable"
        files = CloudInit(texts["user_data"], texts["meta_data"], texts["network_config"])
        return replace(spec, cloud_init=files)

    @staticmethod
    def _with_added(guest: _Guest, spec: GuestSpec) -> tuple[GuestSpec, list[tuple[str, str]]]:
        """The guest with what keys of other packages make of it, and what is wrong with them."""
        wrong: list[tuple[str, str]] = []
        for name, key in added_keys().items():
            if name in guest.model_fields_set:
                spec, problems = key.apply(spec, getattr(guest, name))
                wrong += problems
        return spec, wrong

    def _with_device_keys(self, guest: _Guest, wrong: Callable[[Path, str], None]) -> GuestSpec:
        """The guest with what keys of other packages make of its devices."""
        spec = guest.spec()
        devices = list(spec.devices)
        for index, model in enumerate(guest.devices):
            for name, key in added_device_keys().items():
                if name not in model.model_fields_set:
                    continue
                devices[index], problems = key.apply(devices[index], getattr(model, name), FilePath(self.name).parent)
                for field, message in problems:
                    wrong(("devices", index, name, *_parsed(field)), message)
        return replace(spec, devices=tuple(devices))


def _text_of(given: str, beside: FilePath) -> str:
    """Raises ValueError with what is wrong with the file."""
    if not given or "\n" in given or given.startswith("#"):
        return given
    path = beside / given
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        text = data.decode()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {path}: {said}; write the name of a file, or the text itself (| ...)") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    return text


def _named(spec: GuestSpec, name: str) -> GuestSpec:
    """The guest under this name, its images as well."""
    disks = tuple(replace(disk, image=disk.image.replace(_OWN_NAME, name)) for disk in spec.disks)
    return replace(spec, name=name, disks=disks)


def _in_file(field: str) -> str:
    """The key of a guest file for a field of the specification."""
    if field.startswith(("memory_mib", "max_memory_mib")):
        return field.replace("_mib", "", 1)
    return field.removesuffix("_bytes") if field.startswith("disks[") else field


def _merged(defaults: Marked, own: Marked) -> Marked:
    """A guest's own values over the defaults. Each keeps the line on which it stands."""
    value: object = own.value
    if not isinstance(value, dict):
        return own
    mine = cast("dict[str, Any]", value)
    shared = cast("dict[str, Any]", defaults.value)
    both = {**shared, **mine}
    replaced = [(key,) for key in mine]
    for key in (*_MERGED, *added_keys()):
        if isinstance(shared.get(key), dict) and isinstance(mine.get(key), dict):
            both[key] = {**shared[key], **mine[key]}
            replaced.remove((key,))
            replaced += [(key, inner) for inner in mine[key]]
    inherited = {
        path: line
        for path, line in defaults.lines.items()
        if path and not any(path[: len(place)] == place for place in replaced)
    }
    return Marked(both, {**inherited, **own.lines})


def _numbered(name: str, count: int | None) -> list[str]:
    return [name] if count is None else [f"{name}-{number}" for number in range(1, count + 1)]


def _names(entry: Any) -> list[str]:
    """The names that an entry stands for, as far as it can be read."""
    keys = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    name, count = keys.get("name"), keys.get("count")
    sane = isinstance(count, int) and 1 <= count <= MAX_COUNT
    return _numbered(name, count if sane else None) if isinstance(name, str) else []


# --- saying what is wrong ---------------------------------------------------------------------------------------------


def _told(error: ValidationError) -> list[tuple[Path, str]]:
    """Each problem once, where it is, in our words."""
    found: dict[Path, str] = {}
    for details in error.errors(include_url=False):
        path = tuple(step for step in details["loc"] if step not in _UNION_BRANCHES)
        found.setdefault(path, _sentence(details, path))
    return list(found.items())


_UNION_BRANCHES = frozenset({"dict[str,any]", "constrained-str", "constrained-int"})
"""pydantic names the branch of a union that it tried; that is no part of the file."""

_WANTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "string_type": "must be text (in quotes, if it looks like something else)",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}


def _sentence(details: ErrorDetails, path: Path) -> str:
    kind, given = details["type"], details["input"]
    context = details.get("ctx", {})
    match kind:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return _unknown(str(path[-1]), _keys(path[:-1]))
        case "literal_error":
            return f"must be {context['expected']}, not {_short(given)}"
        case "greater_than_equal" | "less_than_equal":
            return f"must be between 1 and {MAX_COUNT}, not {_short(given)}"
        case "value_error":
            return str(context["error"])
        case _ if kind in _WANTED:
            return f"{_WANTED[kind]}, not {_short(given)}"
        case _:
            return f"{details['msg'][:1].lower()}{details['msg'][1:]}, not {_short(given)}"


def _short(value: Any) -> str:
    text = {True: "true", False: "false", None: "nothing"}.get(value) if isinstance(value, bool | None) else None
    text = text or repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _keys(path: Path) -> list[str]:
    """Of the mapping at this place of a guest."""
    models: dict[Path, type[Model]] = {
        **{(name,): key.model for name, key in added_keys().items()},
        ("boot",): _Boot,
        ("cpu",): _Cpu,
        ("disks",): _Disk,
        ("nics",): _Nic,
        ("tpm",): _Tpm,
        ("cloud_init",): _CloudInit,
        ("display",): _Display,
        ("policy",): _Policy,
        ("devices",): _device_model(),
    }
    return list(models.get(path[:1], _guest_model()).model_fields)


def _unknown(key: str, known: list[str], otherwise: str = "") -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"there is no such key; did you mean {close[0]}?"
    return f"there is no such key; there are {', '.join(known)}{otherwise}"


def _dotted(path: Path) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


_STEP = re.compile(r"\['([^']*)'\]|\[(\d+)\]|([^.\[]+)")


def _parsed(field: str) -> Path:
    """ "devices[0].name" as a path."""
    found = cast("list[tuple[str, str, str]]", _STEP.findall(field))
    return tuple(int(index) if index else quoted or word for quoted, index, word in found)
