"""Which files a guest has as its kernel and initrd, or begins with: only those that the host's operator put there."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from agents.engine.base import ImageNotFound
from orchestrator.core.naming import file_error
from orchestrator.core.records import Boot, Tpm


@dataclass(frozen=True, slots=True)
class Images:
    """The boot images of this host."""

    default: Path | None = None
    """The kernel of guests that name none."""
    directory: Path | None = None
    """What guests may name. Symbolic links in it are the operator's word, wherever they lead."""

    def kernel(self, boot: Boot) -> Path:
        """Raises ImageNotFound: no such image here, or none is named and there is no default."""
        if boot.kernel:
            return self._named("kernel", boot.kernel)
        if self.default is None:
            raise ImageNotFound(
                "the guest names no kernel (boot.kernel), and this host's configuration has no default (guest_image)"
            )
        if not self.default.is_file():
            raise ImageNotFound(f"this host's default kernel (guest_image) is missing: there is no file {self.default}")
        return self.default

    def initrd(self, boot: Boot) -> Path | None:
        """None: the guest wants none. Raises ImageNotFound when it is not here."""
        return self._named("initrd", boot.initrd) if boot.initrd else None

    def nvram(self, boot: Boot) -> Path:
        """UEFI variables that a guest begins with. Raises ImageNotFound when they are not here."""
        return self._named("nvram", boot.nvram)

    def tpm_state(self, tpm: Tpm) -> Path:
        """The state that a guest's TPM begins with. Raises ImageNotFound when it is not here."""
        return self._named("state", tpm.state, "tpm")

    def _named(self, what: str, name: str, of: str = "boot") -> Path:
        # The API refused a bad name long ago; this is what stands between a record and the files of the host.
        if wrong := file_error(name, "this host's directory of images"):
            raise ImageNotFound(f"{of}.{what} {wrong}")
        if self.directory is None:
            raise ImageNotFound(
                f"the guest names the image {name!r} ({of}.{what}), and this host's configuration has none (images)"
            )
        path = self.directory / name
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            said = f"this host cannot read the image {name!r} ({of}.{what})"
            raise ImageNotFound(f"{said}: {path}: {error.strerror}") from None
        if not regular:
            raise ImageNotFound(f"the image {name!r} ({of}.{what}) of this host is no regular file: {path}")
        return path
