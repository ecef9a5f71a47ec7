"""`python -m pome` and the command `pome`. Signals and streams are in order before anything large is imported."""

from __future__ import annotations

import gc
import os
import signal
import sys


def main() -> None:
    """Run the command line and leave with its exit status."""
    _open_missing_streams()
    # torch asks Linux for huge pages then: a large result costs a third of its page faults. Read when torch starts.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # The imports of torch make objects by the 100,000 that stay. Collections among them find nothing and cost time.
    gc.set_threshold(20_000)
    try:
        # A scheduler's or CI's stop is handled as Ctrl-C is: progress is made safe and the same command goes on.
        signal.signal(signal.SIGTERM, _interrupt)
        from pome.cli.app import run_command

        status = run_command(sys.argv[1:])
    except KeyboardInterrupt:  # amid the imports; a command has its own message
        print("error: interrupted; run the same command again", file=sys.stderr)
        status = 130
    try:
        sys.stdout.flush()
    except OSError:
        # The text that it still holds cannot be written, and must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    gc.freeze()  # what is left at exit goes with the process; nothing need be collected
    sys.exit(status)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _open_missing_streams() -> None:
    """Open /dev/null for a stream that was closed (`pome ... >&-`): else the next file opened would take its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the least number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    main()
