#!/usr/bin/env python3
"""Hold pome's outputs for every feature of a PEFT LoRA to PEFT's own merge, on tiny models; print the table.

    python scripts/survey_lora.py [--out tests/editing/lora_survey.md] [--feature NAME ...] [ARCHITECTURE ...]

ARCHITECTURE is one of the model types of `tests/support/lora_survey.py` (default: all). Exit status 1 where a result is
*wrong*: an output that is neither what PEFT computes nor refused.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    import torch
    import transformers

    from support.lora_survey import ARCHITECTURES, FEATURES, format_table, survey_cell

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", choices=[[], *ARCHITECTURES], default=[])
    parser.add_argument("--feature", action="append", choices=[*FEATURES], default=[])
    parser.add_argument("--out", type=Path, help="write the table here as well")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in options.architectures or ARCHITECTURES:
            for feature in options.feature or FEATURES:
                cells.append(survey_cell(architecture, feature, Path(folder) / "cell"))
                if cells[-1].verdict == "wrong":
                    print(f"{architecture}, {feature}: wrong: {cells[-1].why}", file=sys.stderr, flush=True)
    table = format_table(cells)
    print(table)
    if options.out:
        options.out.write_text(table, encoding="utf-8")
    sys.exit(1 if any(cell.verdict == "wrong" for cell in cells) else 0)
