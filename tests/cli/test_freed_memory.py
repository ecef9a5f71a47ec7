"""An extraction keeps the memory that it frees."""

from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource, sys
from pome.cli.commands.extract import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def count():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(42):
    if turn == 2:
        before = count()
    several = [bytearray(b"x") * (3 << 20) for _ in range(4)]
    del several
print(count() - before)
"""


def test_freed_memory_is_used_again() -> None:
    """Four matrices of 3 MiB again and again: their pages are fetched once, where glibc can be told so."""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("kept", "as it is")
    )
    assert kept <= given_back
    if sys.platform == "linux":
        assert kept < 40 * 4 * 3 * 256 / 20  # pages of 4 KiB
