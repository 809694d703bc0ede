"""What the lab adds to guest files: the key `workload`."""

from __future__ import annotations

from dataclasses import replace

from deploy.lab.workload import Workload, boot_of, workload_problems
from orchestrator.cli.guest_file import Mib, Model, model_of
from orchestrator.core.records import GuestSpec


class WorkloadKey:
    """See `orchestrator.cli.guest_file.Key`; found by the entry point `workload` of the group `drover.guest_file`."""

    model: type[Model] = model_of(Workload, dirty_mib=Mib, static_mib=Mib)

    @staticmethod
    def apply(spec: GuestSpec, given: Model) -> tuple[GuestSpec, list[tuple[str, str]]]:
        """The guest with a command line for the lab's image, and what is wrong, by field of the guest."""
        workload = Workload(**given.model_dump(exclude_unset=True))
        bad = [(f"workload.{key}", said) for key, said in workload_problems(workload, spec.memory_mib)]
        if spec.boot.append:
            bad.append(("workload", "writes the guest's command line, and so does boot.append: leave one of them out"))
        return replace(spec, boot=replace(spec.boot, append=boot_of(workload, spec.devices).append)), bad
