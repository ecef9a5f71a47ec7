"""One run from an open pair to a published output: the stages that an edit and an extraction have in common."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Iterator

import pome
from pome.config.spec import EditSpec
from pome.editing.base_check import check_base
from pome.editing.hashes import Hashes
from pome.editing.session import Opened
from pome.errors import NumericalError
from pome.manifest import FORMAT_VERSION, INPUTS, KeptRecord, Manifest, TensorRecord
from pome.output.card import CARD_NAME
from pome.output.progress import Progress
from pome.output.staging import Staging
from pome.planning.units import Plan


@dataclasses.dataclass
class Run:
    """The state of one run between its stages."""

    opened: Opened
    spec: EditSpec
    progress: Progress
    begun: float
    card: bool

    def __post_init__(self) -> None:
        self.kernel_seconds = 0.0
        self.hashes = Hashes(self.opened)
        self.fingerprint = self.opened.fingerprint()

    def check_base(self) -> None:
        """Refuse a BASE that FT was not trained from, or note a doubt about it."""
        notes = check_base(self.opened.base, self.opened.ft, self.opened.plan, self.spec)
        for note in notes:
            self.progress.note(note)
        self.opened = dataclasses.replace(self.opened, notices=(*self.opened.notices, *notes))

    @contextlib.contextmanager
    def resumable(self, staging: Staging, units: int) -> Iterator[None]:
        """An interruption inside says how to go on; a NumericalError leaves nothing to go on from."""
        try:
            yield
        except NumericalError:
            # The same command would fail again, and what the message advises is another command.
            staging.discard()
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; {len(staging.finished)} of {units} units are safe in {staging.folder}; run the same "
                "command again to go on, or remove that folder"
            ) from None

    def describe(self, plan: Plan, staging: Staging) -> Manifest:
        """The manifest but for what is known of the output alone, matrices in the order of the plan.

        Waits for the hashes of the inputs, so call it where an error stops them. Raises CheckpointError for an input
        that has changed.
        """
        base, fine_tuned = self.hashes.describe_inputs()
        self.opened.check_unchanged()
        entries = [staging.finished[unit.key] for unit in plan.units]
        return Manifest(
            format_version=FORMAT_VERSION,
            pome_version=pome.__version__,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            base=base,
            fine_tuned=fine_tuned,
            spec=self.spec.to_mapping(),
            tensors=tuple(TensorRecord.from_mapping(item) for entry in entries for item in entry["tensors"]),
            kept=(*plan.kept, *(KeptRecord(**item) for entry in entries for item in entry["kept"])),
            merged=plan.merged,
            not_copied=self.opened.not_copied,
            files={},
            notices=(*self.opened.notices, *staging.notices),
        )

    def publish(
        self, staging: Staging, manifest: Manifest, card: str | None, overwrite: bool, **seconds: float
    ) -> Manifest:
        """Write the card, hash the output, seal the manifest with both and the times, and rename all to OUT."""
        if card is not None:
            staging.put_file(CARD_NAME, card.encode())  # before the hashes, which are of what is there
        files = self.hashes.describe_output(staging, self.progress)
        timing: dict[str, float | str] = {
            "total_seconds": round(time.perf_counter() - self.begun, 3),
            "kernel_seconds": round(self.kernel_seconds, 3),
            **seconds,
            INPUTS: self.fingerprint,
        }
        manifest = dataclasses.replace(manifest, files=files, timing=timing).sealed()
        staging.publish(manifest.to_json().encode(), overwrite)
        return manifest
