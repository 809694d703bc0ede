"""Placement: the reason for each host, the choice, and what a plan promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core.compatibility import ack_mode, not_by
from orchestrator.core.errors import RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.offers import Offer, for_another_life, local_disks
from orchestrator.core.placement import (
    GuestInput,
    HostInput,
    HostView,
    Need,
    choose,
    host_views,
    judge,
    need_for,
    obstacles,
    pack,
    plan,
)
from orchestrator.core.records import (
    Boot,
    Cordon,
    Cpu,
    DiskCache,
    DiskSpec,
    Display,
    Firmware,
    GuestSpec,
    HostFeature,
    HostRecord,
    HostSpace,
    Network,
    NicSpec,
    Pool,
    PoolFence,
    PoolKind,
    Reservation,
    Reservations,
    Tpm,
)

NEED = Need("g", "web", "h1", 100, "pc")


def view(name: str, memory: int = 1000, **other: object) -> HostView:
    return HostView(HostRef(name, "b"), memory, **other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (view("h1"), RefusalReason.INVALID_ARGUMENT),
        (view("h2", cordoned=True, cordon_reason="disk"), RefusalReason.HOST_CORDONED),
        (view("h2", machine_types=("q35",)), RefusalReason.MACHINE_TYPE_MISMATCH),
        (view("h2", accelerator="kvm"), RefusalReason.MACHINE_TYPE_MISMATCH),
        (view("h2", used_mib=500, reserved_mib=401), RefusalReason.NO_CAPACITY),
        (view("h2", live=False), RefusalReason.HOST_NOT_LIVE),
    ],
)
def test_each_obstacle_has_its_reason(host: HostView, reason: RefusalReason) -> None:
    verdict = judge(host, NEED, source=view("h1", accelerator="tcg"))
    assert (verdict.eligible, verdict.reason) == (False, reason)
    assert verdict.message


# --- engines of two versions --------------------------------------------------------------------------------------

OLD = ("pc", "pc-i440fx-9.2", "pc-i440fx-10.0", "q35")
NEW = ("pc", "pc-i440fx-10.0", "pc-i440fx-11.1", "q35")


def old(name: str) -> HostView:
    aliases = {"pc": "pc-i440fx-10.0"}
    return view(name, machine_types=OLD, switchover_ack="legacy", machine_aliases=aliases, engine="qemu 10.0.2")


def new(name: str) -> HostView:
    aliases = {"pc": "pc-i440fx-11.1"}
    return view(name, machine_types=NEW, switchover_ack="per-device", machine_aliases=aliases, engine="qemu 11.1.3")


@pytest.mark.parametrize("inside", [False, True])
def test_a_machine_that_both_engines_have_moves_both_ways(inside: bool) -> None:
    """Also with devices inside the VMM: for a machine type of before 11.1, 11.1 counts ACKs as its predecessors did."""
    need = Need("g", "web", "h1", 100, "pc-i440fx-10.0", inside)
    assert judge(new("h2"), need, source=old("h1")).eligible
    assert judge(old("h2"), need, source=new("h1")).eligible


def test_a_machine_that_one_engine_lacks_does_not_move_and_is_told_what_would_help() -> None:
    verdict = judge(old("h2"), Need("g", "web", "h1", 100, "pc-i440fx-11.1"), source=new("h1"))
    assert verdict.reason is RefusalReason.MACHINE_TYPE_MISMATCH
    assert verdict.message == (
        "h2 does not offer machine type pc-i440fx-11.1 (its qemu 10.0.2 has none): "
        "web can go there once it is started anew as pc-i440fx-10.0"
    )


def test_an_alias_is_another_machine_in_another_version() -> None:
    verdict = judge(new("h2"), Need("g", "web", "h1", 100, "pc"), source=old("h1"))
    assert verdict.reason is RefusalReason.MACHINE_TYPE_MISMATCH
    assert verdict.message == (
        "machine type pc is pc-i440fx-10.0 on h1 and pc-i440fx-11.1 on h2: start web anew as pc-i440fx-10.0"
    )
    assert judge(old("h2"), Need("g", "web", "h1", 100, "pc"), source=old("h1")).eligible


def test_ways_of_counting_acks_matter_to_devices_inside_the_vmm_alone() -> None:
    source = view("h1", switchover_ack="legacy")
    assert judge(view("h2", switchover_ack="none"), NEED, source=source).eligible
    verdict = judge(view("h2", switchover_ack="none"), replace(NEED, inside=True), source=source)
    assert verdict.reason is RefusalReason.MACHINE_TYPE_MISMATCH
    assert "legacy on h1, none on h2" in verdict.message


@pytest.mark.parametrize(
    ("engine", "machine", "mode"),
    [
        ("legacy", "pc-i440fx-10.0", "legacy"),
        ("per-device", "pc-i440fx-11.0", "legacy"),
        ("per-device", "pc-q35-2.9", "legacy"),
        ("per-device", "pc-i440fx-11.1", "per-device"),
        ("per-device", "pc-q35-12.0", "per-device"),
        ("per-device", "pc", "per-device"),
        ("none", "pc-i440fx-7.2", "none"),
    ],
)
def test_the_machine_type_decides_how_an_engine_counts(engine: str, machine: str, mode: str) -> None:
    assert ack_mode(engine, machine) == mode


def test_exactly_enough_memory_is_enough() -> None:
    assert judge(view("h2", memory=100), NEED).eligible
    assert not judge(view("h2", memory=99), NEED).eligible


def test_most_memory_left_wins_and_shunned_hosts_come_last() -> None:
    hosts = [view("h1"), view("h2", 500), view("h3", 900)]
    first, second = choose(hosts, NEED), choose(hosts, NEED, avoid=["h3"])
    assert first.destination == HostRef("h3", "b")
    assert second.destination == HostRef("h2", "b")
    only = choose(hosts, NEED, avoid=["h2", "h3"])
    assert only.destination == HostRef("h3", "b")


def test_a_silent_host_that_would_do_makes_the_answer_transient() -> None:
    choice = choose([view("h1"), view("h2", live=False)], NEED)
    assert choice.destination is None
    assert choice.transient
    assert not choose([view("h1"), view("h2", 10)], NEED).transient


def test_a_refusal_grows_with_the_reasons_and_not_with_the_hosts() -> None:
    few = choose([view("h1"), view("h2", 10), view("h3", cordoned=True)], NEED)
    assert few.message == "no host can take web (100 MiB): h2 has 10 MiB free, web needs 100 MiB; h3 is cordoned"
    hosts = [view("h1"), *(view(f"s{n:03}", 10) for n in range(200))]
    hosts += [view("z", cordoned=True, cordon_reason="w" * 1000)]
    many = choose(hosts, NEED)
    assert obstacles(many.verdicts) == {
        RefusalReason.NO_CAPACITY: 200,
        RefusalReason.HOST_CORDONED: 1,
    }
    assert len(many.message) < 600
    assert "201 hosts (200 NO_CAPACITY, 1 HOST_CORDONED), among them: s000 has 10 MiB free" in many.message
    assert "z is cordoned" in many.message
    assert len(many.verdicts) == 202


@pytest.mark.parametrize(
    ("others", "reason", "passing"),
    [
        ([view("h2", cordoned=True), view("h3", cordoned=True)], RefusalReason.HOST_CORDONED, True),
        ([view("h2", machine_types=("q35",))], RefusalReason.MACHINE_TYPE_MISMATCH, False),
        ([view("h2", live=False)], RefusalReason.HOST_NOT_LIVE, True),
        ([view("h2", used_mib=950), view("h3", cordoned=True)], RefusalReason.NO_CAPACITY, True),
        ([view("h2", 99, cordoned=True), view("h3", machine_types=("q35",))], RefusalReason.NO_CAPACITY, True),
        ([], RefusalReason.NO_CAPACITY, True),
    ],
)
def test_the_only_reason_is_the_reason_and_time_may_mend_what_is_passing(
    others: list[HostView], reason: RefusalReason, passing: bool
) -> None:
    choice = choose([view("h1"), *others], NEED)
    assert (choice.destination, choice.reason, choice.passing) == (None, reason, passing)


def test_a_preferred_host_is_taken_if_it_can_be_and_is_not_shunned() -> None:
    hosts = [view("h1"), view("h2", 500), view("h3", 900)]
    assert choose(hosts, NEED, prefer="h2").destination == HostRef("h2", "b")
    assert choose(hosts, NEED, prefer="h2", avoid=["h2"]).destination == HostRef("h3", "b")
    assert choose([*hosts[:1], view("h2", 50), hosts[2]], NEED, prefer="h2").destination == HostRef("h3", "b")


def test_a_packing_that_exists_is_found() -> None:
    needs = [Need(f"g{n}", f"g{n}", "s", mib) for n, mib in enumerate([6, 4, 4])]
    assert pack([view("s", 100, cordoned=True), view("a", 8), view("b", 6)], needs) == {"g0": "b", "g1": "a", "g2": "a"}


def test_memory_is_spread_where_that_suffices() -> None:
    needs = [Need(f"g{n}", f"g{n}", "s", 100) for n in range(4)]
    places = pack([view("s"), view("a"), view("b")], needs)
    assert sorted(places.values()) == ["a", "a", "b", "b"]


def test_a_promise_to_the_migration_itself_is_not_in_its_way() -> None:
    (h1,) = host_views([host("h1", m=100, other=50)], [], but="m")
    assert (h1.reserved_mib, h1.arrivals) == (50, 1)


def test_unknown_destination_is_named() -> None:
    choice = choose([view("h1")], NEED, wanted="h9")
    assert choice.reason is RefusalReason.NOT_FOUND
    assert "h9" in choice.message


def test_plan_counts_arrivals_and_keeps_order() -> None:
    needs = [Need(f"g{n}", f"g{n}", "h1", mib) for n, mib in enumerate([100, 400, 300, 300])]
    planned = plan([view("h1"), view("h2", 500), view("h3", 500)], needs)
    assert [p.need.guest for p in planned] == ["g0", "g1", "g2", "g3"]
    assert [p.choice.destination is not None for p in planned] == [True, True, True, False]


def host(name: str, **promised: int) -> HostInput:
    record = HostRecord(name, "b", "c", "p", 1000, 1000)
    return HostInput(record, True, Cordon(), Reservations(memory_mib=promised))


def guest(uuid: str, record: GuestRecord) -> GuestInput:
    return GuestInput(uuid, record, GuestSpec(uuid, 100))


def test_a_committed_guest_takes_memory_at_both_ends_but_not_twice() -> None:
    here, there = HostRef("h1", "b"), HostRef("h2", "b")
    moved = GuestRecord("a", Ownership.COMMITTED, there, migration="m", attempt=1, inc="i", source=here)
    h1, h2 = host_views([host("h1"), host("h2", m=100)], [guest("a", moved)])
    assert (h1.used_mib, h2.used_mib, h2.reserved_mib, h2.arrivals) == (100, 100, 0, 0)


def test_an_open_guest_takes_memory_at_its_source_and_is_promised_at_its_destination() -> None:
    here, there = HostRef("h1", "b"), HostRef("h2", "b")
    moving = GuestRecord("a", Ownership.OPEN, here, migration="m", attempt=1, destination=there)
    h1, h2 = host_views([host("h1"), host("h2", m=100)], [guest("a", moving)])
    assert (h1.used_mib, h2.used_mib, h2.reserved_mib, h2.arrivals) == (100, 0, 100, 1)


def test_crashed_and_gone_guests_take_nothing() -> None:
    here = HostRef("h1", "b")
    (h1,) = host_views([host("h1")], [guest(p, GuestRecord(p, p, here)) for p in (Ownership.CRASHED, Ownership.GONE)])
    assert h1.used_mib == 0


# --- hardware -----------------------------------------------------------------------------------------------------

SHOP = GuestSpec(
    "shop",
    memory_mib=100,
    machine="pc",
    cpu=Cpu("Nehalem"),
    boot=Boot(firmware=Firmware.UEFI),
    disks=(
        DiskSpec("root", "fast", "root", size_bytes=6 << 30),
        DiskSpec("swap", "fast", "swap", size_bytes=1 << 30),
        DiskSpec("data", "shared", "data", size_bytes=99 << 30),
    ),
    nics=(NicSpec("eth0", "prod", mtu=1500),),
    tpm=Tpm(),
    extra_args=("-device virtio-rng-pci",),
)
WHOLE = HostRecord(
    "h2",
    "b",
    "c:1",
    "p:1",
    1000,
    1000,
    pools=(Pool("fast", PoolKind.LOCAL, free_bytes=8 << 30), Pool("shared", PoolKind.SHARED_FILE)),
    networks=(Network("prod"),),
    cpu_models=("Nehalem", "qemu64"),
    firmware={"uefi_code": "a1"},
    extra_args=("-device virtio-rng-pci",),
    features=(
        HostFeature.HARDWARE,
        HostFeature.TPM,
        HostFeature.DISK_THREADS,
        HostFeature.SCREENS,
        HostFeature.TAKEN_STATE,
    ),
)


def judged(
    record: HostRecord, spec: GuestSpec = SHOP, *, resv: Reservations | None = None, space: HostSpace | None = None
) -> tuple[RefusalReason | None, str]:
    """What stands against the guest on `record`, coming from a host that has everything."""
    inputs = [
        HostInput(replace(WHOLE, name="h1"), True, Cordon(), Reservations()),
        HostInput(record, True, Cordon(), resv or Reservations(), space=space),
    ]
    source, host = host_views(inputs, [])
    verdict = judge(host, need_for(spec, guest="g", source="h1"), source=source)
    return verdict.reason, verdict.message


def test_a_host_with_everything_takes_a_guest_with_hardware() -> None:
    assert judged(WHOLE) == (None, "")


@pytest.mark.parametrize(
    ("changes", "reason", "said"),
    [
        ({"features": ()}, RefusalReason.FEATURE_NOT_AVAILABLE, "h2's agent is of a version"),
        ({"pools": WHOLE.pools[:1]}, RefusalReason.POOL_NOT_FOUND, "h2 has no pool shared"),
        (
            {"pools": (WHOLE.pools[0], Pool("shared", PoolKind.LOCAL, free_bytes=1 << 40))},
            RefusalReason.POOL_NOT_FOUND,
            "pool shared is local on h2 and shared-file on h1",
        ),
        ({"networks": ()}, RefusalReason.NETWORK_NOT_FOUND, "h2 has no network prod"),
        (
            {"networks": (Network("prod", mtu=9000),)},
            RefusalReason.NETWORK_NOT_FOUND,
            "network prod has an MTU of 9000 on h2 and of 1500 on h1",
        ),
        ({"cpu_models": ("qemu64",)}, RefusalReason.CPU_NOT_AVAILABLE, "h2 cannot give all of the CPU model Nehalem"),
        ({"firmware": {}}, RefusalReason.FIRMWARE_NOT_AVAILABLE, "h2 has no UEFI firmware"),
        ({"firmware": {"uefi_code": "b2"}}, RefusalReason.FIRMWARE_NOT_AVAILABLE, "another build than that of h1"),
        ({"features": (HostFeature.HARDWARE,)}, RefusalReason.TPM_NOT_AVAILABLE, "h2 has no program"),
        ({"extra_args": ()}, RefusalReason.EXTRA_ARGS_NOT_ALLOWED, "h2 does not allow '-device virtio-rng-pci'"),
    ],
)
def test_what_a_host_lacks_is_named(changes: dict[str, Any], reason: RefusalReason, said: str) -> None:
    found, message = judged(replace(WHOLE, **changes))
    assert found is reason
    assert said in message


def test_block_volumes_need_a_fence_or_somebody_s_word() -> None:
    spec = replace(SHOP, disks=(DiskSpec("root", "vg", "root"),))

    def with_pool(**changes: Any) -> RefusalReason | None:
        return judged(replace(WHOLE, pools=(Pool("vg", PoolKind.BLOCK, **changes),)), spec)[0]

    assert with_pool() is RefusalReason.POOL_NOT_FENCED
    assert with_pool(fence=PoolFence.PR) is None
    assert with_pool(accepts_no_locks=True) is None


def test_a_disk_that_cannot_go_along_as_it_is_described_is_no_fault_of_the_host() -> None:
    def moved(**changes: Any) -> RefusalReason | None:
        return judged(WHOLE, replace(SHOP, disks=(replace(DiskSpec("root", "fast", "root"), **changes),)))[0]

    assert moved(size_bytes=1 << 20) is None
    assert moved() is RefusalReason.DISK_NOT_MIGRATABLE, "nobody could make its image there"
    assert moved(read_only=True) is None
    assert moved(size_bytes=1 << 20, iothread=True) is RefusalReason.DISK_NOT_MIGRATABLE, "QEMU could abort in it"
    assert moved(pool="shared", iothread=True) is None
    assert moved(pool="shared") is None
    assert moved(pool="shared", cache=DiskCache.WRITEBACK) is RefusalReason.DISK_NOT_MIGRATABLE
    (fresh,) = host_views([HostInput(WHOLE, True, Cordon(), Reservations())], [])
    born = replace(SHOP, disks=(DiskSpec("root", "fast", "root"),))
    assert judge(fresh, need_for(born, guest="g")).eligible, "it may be started on an image that is there"


def test_the_image_that_a_disk_lies_on_is_there_with_the_same_content() -> None:
    disk = DiskSpec("root", "fast", "root", size_bytes=1 << 20, base="debian.qcow2")
    need = need_for(replace(SHOP, disks=(disk,)), guest="g", source="h1")

    def said(here: str, there: str) -> tuple[RefusalReason | None, str]:
        inputs = [
            HostInput(
                replace(WHOLE, name=name),
                True,
                Cordon(),
                Reservations(),
                space=HostSpace({"fast": 8 << 30}, {"fast": {"debian.qcow2": digest}} if digest else {}),
            )
            for name, digest in (("h1", here), ("h2", there))
        ]
        source, host = host_views(inputs, [])
        verdict = judge(host, need, source=source)
        return verdict.reason, verdict.message

    assert said("a1", "a1") == (None, "")
    found, message = said("a1", "b2")
    assert found is RefusalReason.BASE_NOT_AVAILABLE
    assert "has another content on h2 (b2) than on h1 (a1)" in message
    found, message = said("a1", "")
    assert found is RefusalReason.BASE_NOT_AVAILABLE
    assert "pool fast of h2 has no base debian.qcow2" in message


def test_a_thread_for_a_disk_needs_an_agent_that_knows_it() -> None:
    spec = replace(SHOP, disks=(DiskSpec("root", "shared", "root", iothread=True),))
    older = replace(WHOLE, features=(HostFeature.HARDWARE, HostFeature.TPM))
    assert judged(older, spec)[0] is RefusalReason.FEATURE_NOT_AVAILABLE
    assert judged(WHOLE, spec)[0] is None


def test_a_screen_needs_an_agent_that_knows_it() -> None:
    spec = replace(SHOP, display=Display(vnc=True))
    older = replace(WHOLE, features=tuple(each for each in WHOLE.features if each != HostFeature.SCREENS))
    assert judged(older)[0] is None
    assert judged(older, spec)[0] is RefusalReason.FEATURE_NOT_AVAILABLE
    assert judged(WHOLE, spec)[0] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"system_uuid": "eeeeeeee-1111-4222-8333-abcdefabcdef"},
        {"boot": Boot(firmware=Firmware.UEFI, nvram="g.fd")},
        {"tpm": Tpm(state="g.permall")},
    ],
)
def test_what_a_guest_had_elsewhere_needs_an_agent_that_takes_it_over(changes: dict[str, Any]) -> None:
    spec = replace(SHOP, **changes)
    older = replace(WHOLE, features=tuple(each for each in WHOLE.features if each != HostFeature.TAKEN_STATE))
    assert judged(older)[0] is None
    assert judged(older, spec)[0] is RefusalReason.FEATURE_NOT_AVAILABLE
    assert judged(WHOLE, spec)[0] is None


def test_room_in_local_pools_is_what_is_free_less_what_is_promised() -> None:
    small = HostSpace({"fast": (7 << 30) - 1, "gone": 1})
    assert judged(WHOLE, space=HostSpace({"fast": 7 << 30}))[0] is None
    found, message = judged(WHOLE, space=small)
    assert (found, message) == (
        RefusalReason.POOL_FULL,
        "pool fast of h2 has 7167 MiB free, the disks of shop need 7168 MiB",
    )
    promised = Reservations.of({"m": Reservation(64, {"fast": (1 << 30) + 1})})
    assert judged(WHOLE, resv=promised)[0] is RefusalReason.POOL_FULL
    assert promised.each() == {"m": Reservation(64, {"fast": (1 << 30) + 1})}
    assert judged(WHOLE, resv=Reservations.of({}))[0] is None


def test_a_cpu_of_the_hosts_own_moves_to_equal_hosts_only() -> None:
    spec = replace(SHOP, cpu=Cpu("max"))

    def going(here: str, there: str) -> tuple[RefusalReason | None, str]:
        """From a host where it is `there` to one where it is `here`."""

        def at(name: str, words: str) -> HostInput:
            definitions = {"max": words} if words else {}
            return HostInput(replace(WHOLE, name=name, cpu_definitions=definitions), True, Cordon(), Reservations())

        source, host = host_views([at("h1", there), at("h2", here)], [])
        verdict = judge(host, need_for(spec, guest="g", source="h1"), source=source)
        return verdict.reason, verdict.message

    assert going("avx lm qemu=10.0.2", "avx lm qemu=10.0.2") == (None, "")
    found, message = going("avx lm qemu=10.0.2", "lm qemu=11.1.3 sse4a")
    assert found is RefusalReason.CPU_NOT_AVAILABLE
    assert "(more: avx, qemu=10.0.2; less: qemu=11.1.3, sse4a): start it anew with a named model" in message
    for here, there in (("", "lm"), ("lm", ""), ("", "")):
        assert going(here, there)[0] is RefusalReason.CPU_NOT_AVAILABLE


def test_a_guest_without_hardware_asks_nothing_of_it() -> None:
    assert judged(replace(WHOLE, features=(), pools=()), GuestSpec("web", machine="pc")) == (None, "")


def test_what_dies_with_its_host_is_known_and_never_made_anew() -> None:
    assert local_disks(SHOP, WHOLE) == ["disk root", "disk swap"]
    shared = replace(SHOP, disks=SHOP.disks[2:])
    assert local_disks(shared, WHOLE) == []
    assert [disk.size_bytes for disk in for_another_life(shared).disks] == [0]
    assert replace(for_another_life(shared), disks=shared.disks) == shared


def test_a_guest_stays_with_its_engine() -> None:
    """libvirt's hosts and QEMU's do not speak to each other, however alike they are."""
    by_libvirt, by_qemu = view("h2", engine="libvirt 11.3.0"), view("h3", engine="qemu 10.0.2")
    source = view("h1", engine="libvirt 11.3.0")
    refused = judge(by_qemu, NEED, source=source)
    assert (refused.eligible, refused.reason) == (False, RefusalReason.MACHINE_TYPE_MISMATCH)
    assert "one engine only" in refused.message
    assert judge(by_libvirt, NEED, source=source).eligible
    assert judge(by_qemu, NEED).eligible, "at its birth it may be either's"


def test_a_host_that_runs_libvirt_names_what_of_a_guest_it_does_not_give() -> None:
    by_libvirt = view("h2", engine="libvirt 11.3.0")
    refused = judge(by_libvirt, need_for(SHOP, guest="g"))
    assert (refused.eligible, refused.reason) == (False, RefusalReason.FEATURE_NOT_AVAILABLE)
    for thing in ("firmware uefi", "CPU model Nehalem"):
        assert thing in refused.message
    assert "disk" not in refused.message
    assert judge(by_libvirt, need_for(GuestSpec("plain", memory_mib=100, machine="pc"), guest="g")).eligible


def test_a_host_that_runs_libvirt_gives_disks_of_shared_pools_only() -> None:
    pools = {"nfs": Pool("nfs", PoolKind.SHARED_FILE), "fast": Pool("fast", PoolKind.LOCAL)}
    pools["vg"] = Pool("vg", PoolKind.BLOCK)
    by_libvirt = view(
        "h2", engine="libvirt 11.3.0", offer=Offer("h2", pools, features=frozenset({HostFeature.HARDWARE}))
    )
    plain = GuestSpec("plain", memory_mib=100, machine="pc")

    def said(*disks: DiskSpec) -> str:
        return judge(by_libvirt, need_for(replace(plain, disks=disks), guest="g")).message

    assert said(DiskSpec("root", "nfs", "root")) == ""
    assert "disk root in the local pool fast" in said(DiskSpec("root", "fast", "root"))
    assert "disk root on a volume of pool vg" in said(DiskSpec("root", "vg", "root"))
    assert "disk root on the base img" in said(DiskSpec("root", "nfs", "root", base="img"))
    assert "disk root with a thread of its own" in said(DiskSpec("root", "nfs", "root", iothread=True))
    assert "has no pool gone" in said(DiskSpec("root", "gone", "root"))


def test_a_refusal_by_libvirt_s_hosts_stays_short() -> None:
    said = not_by("libvirt 11.3.0", "many", [f"disk d{number}" for number in range(16)])
    assert "disk d7 and 8 more" in said
    assert not_by("qemu 10.0.2", "many", ["disk d1"]) == not_by("libvirt", "many", []) == ""
