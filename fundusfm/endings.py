"""How a command ends: the one place where errors become messages and exit codes.

FUNDUSFM_REFUSED_FILE   a file; each rank that ends for what is code 2 makes it (set by launch/)

Launchers of several ranks hide that code: srun reports the highest one, and the ranks that it kills have
higher ones; torchrun starts all ranks again and ends with 1. The file tells it to the script that started the
launcher. Several machines have a script and a file each, or share one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fundusfm.errors import ToldByAnotherRank, UserError

REFUSED_FILE = "FUNDUSFM_REFUSED_FILE"
INTERRUPTED, BROKEN_PIPE = 130, 141


@contextmanager
def plain_endings() -> Iterator[None]:
    """Anything else that is raised within is a bug and keeps its traceback."""
    complaints = Console(stderr=True)
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        complaints.print(Text("error: ", style="bold red"), Text(str(error)), sep="", soft_wrap=True)
        is_noted = error.exit_code == UserError.exit_code and _note_refusal()
        # Where all ranks end by themselves, torchrun has none to kill, and starts none again after a 0.
        sys.exit(0 if is_noted and error.ends_every_rank else error.exit_code)
    except ToldByAnotherRank as ended:
        if ended.error.exit_code == UserError.exit_code:
            _note_refusal()
        raise
    except KeyboardInterrupt:
        complaints.print("interrupted")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


def _note_refusal() -> bool:
    """Whether the script that asks for a note of code 2 has got it."""
    name = os.environ.get(REFUSED_FILE)
    if not name:
        return False
    try:
        Path(name).touch()
    except OSError:  # the message is out, and the exit code is left
        return False
    return True
