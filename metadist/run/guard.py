"""What goes wrong in a program, as one line and an exit status: the frame around every ``launch/`` program's work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from metadist.errors import RunError, UserError


def guarded(work: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit status of ``work(argv)``.

    UserError: one line on stderr, 2. RunError: one line, 1. Ctrl-C: 130. A reader that
    went away (`| head`): 141, as the shell has it. Anything else is a defect of ours and keeps its traceback.
    """
    try:
        return work(argv)
    except (UserError, RunError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2 if isinstance(e, UserError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit would complain again
        return 141
