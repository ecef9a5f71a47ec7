"""pome: replace the update of FFN matrices by its equalized truncated SVD (POME, arXiv 2510.06627).

`edit` does the whole job from checkpoint to checkpoint, `equalize` and `match_spectrum` one matrix, `extract` makes an
adapter of the update; `inspect` looks before an edit, `sweep` chooses one by its score, `verify` proves one. Names but
the errors are imported when first used, so that `import pome` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pome import errors
from pome.errors import *  # noqa: F403

if TYPE_CHECKING:
    from pome.config.extraction import ExtractSpec as ExtractSpec
    from pome.config.spec import EditSpec as EditSpec
    from pome.editing.edit import edit as edit
    from pome.editing.extract import extract as extract
    from pome.inspection.records import Survey as Survey
    from pome.inspection.survey import survey as _survey
    from pome.kernel.equalize import Equalized as Equalized
    from pome.kernel.equalize import Unsolved as Unsolved
    from pome.kernel.equalize import ZeroDelta as ZeroDelta
    from pome.kernel.equalize import equalize as equalize
    from pome.kernel.equivalence import Matched as Matched
    from pome.kernel.equivalence import match_spectrum as match_spectrum
    from pome.manifest import Manifest as Manifest
    from pome.output.progress import Progress as Progress
    from pome.sweeping.grid import make_grid as make_grid
    from pome.sweeping.scorers.options import make_scorer as make_scorer
    from pome.sweeping.sweep import sweep as sweep
    from pome.sweeping.trials import Outcome as Outcome
    from pome.verification.verify import Verdict as Verdict
    from pome.verification.verify import verify as verify

    inspect = _survey

__version__ = "0.1.0"

# Where each name is imported from when it is first used.
_LAZY_IMPORTS = {
    name: module
    for module, names in {
        "pome.config.extraction": "ExtractSpec",
        "pome.config.spec": "EditSpec",
        "pome.editing.edit": "edit",
        "pome.editing.extract": "extract",
        "pome.output.progress": "Progress",
        "pome.inspection.records": "Survey",
        "pome.inspection.survey": "inspect",
        "pome.kernel.equalize": "Equalized equalize Unsolved ZeroDelta",
        "pome.kernel.equivalence": "Matched match_spectrum",
        "pome.manifest": "Manifest",
        "pome.sweeping.grid": "make_grid",
        "pome.sweeping.scorers.options": "make_scorer",
        "pome.sweeping.sweep": "sweep",
        "pome.sweeping.trials": "Outcome",
        "pome.verification.verify": "Verdict verify",
    }.items()
    for name in names.split()
}
_NAMES_WITHIN = {"inspect": "survey"}  # that a module has under another name
__all__ = ["__version__", *errors.__all__, *_LAZY_IMPORTS]


def __getattr__(name: str) -> Any:
    if name in _LAZY_IMPORTS:
        return getattr(importlib.import_module(_LAZY_IMPORTS[name]), _NAMES_WITHIN.get(name, name))
    raise AttributeError(f"module 'pome' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
