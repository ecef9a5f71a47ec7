"""pome: replace the update of FFN matrices by its equalized truncated SVD (POME, arXiv 2510.06627).

`edit` does the whole job from checkpoint to checkpoint, `equalize` one matrix. Names are imported when first used, so
that `import pome` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pome.config.spec import EditSpec as EditSpec
    from pome.editing.edit import edit as edit
    from pome.errors import (
        CheckpointError as CheckpointError,
    )
    from pome.errors import (
        HeaderError as HeaderError,
    )
    from pome.errors import (
        HubError as HubError,
    )
    from pome.errors import (
        NumericalError as NumericalError,
    )
    from pome.errors import (
        OutputError as OutputError,
    )
    from pome.errors import (
        PairingError as PairingError,
    )
    from pome.errors import (
        PomeError as PomeError,
    )
    from pome.errors import (
        ScoreError as ScoreError,
    )
    from pome.errors import (
        SelectionError as SelectionError,
    )
    from pome.errors import (
        SpecError as SpecError,
    )
    from pome.errors import (
        VerificationError as VerificationError,
    )
    from pome.kernel.equalize import Equalized as Equalized
    from pome.kernel.equalize import equalize as equalize
    from pome.manifest import Manifest as Manifest
    from pome.output.progress import Progress as Progress
    from pome.sweeping.grid import make_grid as make_grid
    from pome.sweeping.scorers.options import make_scorer as make_scorer
    from pome.sweeping.sweep import sweep as sweep
    from pome.sweeping.trials import Outcome as Outcome
    from pome.verification.verify import Verdict as Verdict
    from pome.verification.verify import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "edit": "pome.editing.edit",
    "Progress": "pome.output.progress",
    "EditSpec": "pome.config.spec",
    "Manifest": "pome.manifest",
    "verify": "pome.verification.verify",
    "Verdict": "pome.verification.verify",
    "sweep": "pome.sweeping.sweep",
    "Outcome": "pome.sweeping.trials",
    "make_grid": "pome.sweeping.grid",
    "make_scorer": "pome.sweeping.scorers.options",
    "equalize": "pome.kernel.equalize",
    "Equalized": "pome.kernel.equalize",
    **dict.fromkeys(
        (
            "PomeError",
            "SpecError",
            "CheckpointError",
            "HeaderError",
            "HubError",
            "SelectionError",
            "PairingError",
            "NumericalError",
            "ScoreError",
            "OutputError",
            "VerificationError",
        ),
        "pome.errors",
    ),
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pome' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
