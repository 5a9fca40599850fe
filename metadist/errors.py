"""The two faults a program of this project ends with. Both print one line; neither shows a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake, found before any work: what was given, what is allowed, how to mend it. Exit code 2."""


class RunError(Exception):
    """A fault met on the way (disk full, worker lost). Exit code 1; nothing on disk is lost."""


class Lost(RunError):
    """Another worker went away: nothing is wrong here, and another try may work."""


def unknown(what: str, given: object, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not one of ``allowed``, with the nearest one."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return UserError(f"{what}={given} is unknown{hint} (allowed: {', '.join(names)})")
