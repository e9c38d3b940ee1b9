"""The `fundusfm` command, also as `python -m fundusfm`."""

from __future__ import annotations

import os
import signal
import sys

from fundusfm.interrupts import interrupts_kept


def main() -> None:
    """Run the command line. Ctrl-C while it is still being imported ends in one line too."""
    if "FUNDUSFM_START" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        # The first rank started this one, hears the same Ctrl-C, speaks, and ends its ranks.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    refused = os.environ.get("FUNDUSFM_REFUSED_FILE")
    if refused and os.path.exists(refused):  # noqa: PTH110 - pathlib raises for a server that does not answer
        # A rank that torchrun starts again after a refusal would only be told it once more.
        sys.exit(0)
    try:
        with interrupts_kept():
            from fundusfm.cli import app

            app()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
