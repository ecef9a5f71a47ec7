"""What goes wrong on a node of a test's cluster; a Python that has this folder on its path obeys, from its start on.

POME_TEST_SEES=PATH=OTHER: a file is another one there. POME_TEST_FULL=1: the disk under the output is full.
"""

import builtins
import errno
import os

if said := os.environ.get("POME_TEST_SEES"):
    path, _, other = said.partition("=")
    real_open = builtins.open

    def open_other(file, *arguments, **options):
        return real_open(other if file == path else file, *arguments, **options)

    builtins.open = open_other

if os.environ.get("POME_TEST_FULL"):

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.pwrite = refuse
