"""The screen of a guest on its host: where it is served, and a password of the moment for whoever may look."""

from __future__ import annotations

import secrets
import string

from agents.engine.base import Displaying, EngineError
from agents.guest.copies import Copy
from orchestrator.core.agent import DisplayAddress
from orchestrator.core.endpoint import join_address, parse_ip
from orchestrator.core.errors import DroverError, RefusalReason

VALID_S = 60
"""A password lets viewers in for so long; who is in stays."""
_LETTERS = string.ascii_letters + string.digits
_LENGTH = 8
"""VNC looks at no more."""


async def opened(own: Copy) -> DisplayAddress:
    """Of the copy that is the guest. Raises DISPLAY_NOT_AVAILABLE."""
    spec, vmm = own.files.spec, own.vmm
    if not spec.display.vnc:
        hint = "`display: {vnc: true}` in its guest file gives it one at its next start"
        raise DroverError(RefusalReason.DISPLAY_NOT_AVAILABLE, f"guest {spec.name} has no screen: {hint}")
    if not isinstance(vmm, Displaying):
        raise DroverError(
            RefusalReason.DISPLAY_NOT_AVAILABLE, f"the engine of guest {spec.name}'s host serves no screens"
        )
    password = "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH))
    try:
        at = await vmm.open_display(password, VALID_S)
    except EngineError as error:
        raise DroverError(RefusalReason.DISPLAY_NOT_AVAILABLE, f"the screen of guest {spec.name}: {error}") from error
    config = own.files.config
    if at.endpoint is None:
        return DisplayAddress(config.host, socket=str(at.socket))
    everywhere = parse_ip(at.endpoint.ip).is_unspecified
    address = join_address(config.address if everywhere else at.endpoint.ip, at.endpoint.port)
    return DisplayAddress(config.host, address=address, password=password, password_valid_s=VALID_S)
