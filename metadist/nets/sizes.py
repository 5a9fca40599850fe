"""The one refusal all families share: images too small for the net."""

from __future__ import annotations

from metadist.errors import UserError


def at_least(name: str, size: int, least: int) -> None:
    """Raises UserError if images of ``size`` x ``size`` pixels are smaller than the net can take."""
    if size < least:
        raise UserError(
            f"net.name={name} can't take {size}x{size} images: it needs {least}x{least} at least (data.size={least} resizes)"
        )
