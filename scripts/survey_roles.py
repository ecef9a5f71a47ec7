#!/usr/bin/env python3
"""Compare the role rules with what the weights of every architecture in transformers really do; print the table.

    python scripts/survey_roles.py [--out tests/roles/roles_survey.md] [KIND ...]

KIND is one of the kinds of `tests/support/roles_survey.py` (default: all). A matrix is *right* when its role, its
orientation and its rows are what running the module shows, *unknown* when the rules say `other`, *unproved* when the
rules name a role and the module could not be run alone, and *wrong* when they contradict it.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    import torch
    import transformers

    from support.roles_survey import KINDS, format_table, survey

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], default=[])
    parser.add_argument("--out", type=Path, help="write the table here as well")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = [row for kind in options.kinds or KINDS for row in survey(kind)]
    table = format_table(rows)
    print(table)
    if options.out:
        options.out.write_text(table, encoding="utf-8")
    sys.exit(1 if any(row.verdict and row.verdict.wrong for row in rows) else 0)
