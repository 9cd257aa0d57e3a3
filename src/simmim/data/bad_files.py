"""What became of files that could not be read: counted, listed, warned about."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from simmim.data.dataset import ImageData
from simmim.data.decode import UnreadableImage

FILE = "bad_files.txt"


class BadFiles(L.Callback):
    """Report unreadable files at the end of each epoch; the data module adds it to the trainer.

    Each is listed in `bad_files.txt` in the run's folder, with the reason.

    Args:
        datasets: The data module's data sets by name ("training", ...), as they stand when it is
            time to report.
        max_share: The run stops where more of a set's files are known to be bad.
    """

    def __init__(self, datasets: dict[str, ImageData], max_share: float) -> None:
        self.datasets, self.max_share = datasets, max_share
        self._known: dict[str, int] = {}  # bad files that were reported

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        """Look now and then whether so much is bad that there is no point in going on."""
        if i & (i + 1) == 0 or i % 256 == 0:  # batches 1, 2, 4, 8, ... of an epoch, and on
            data = self.datasets["training"]
            # Each process knows of the files that it has read: all must stop, or none.
            count = data.unreadable.count_nonzero().to(pl_module.device, torch.float32)
            if trainer.world_size > 1:
                count = trainer.strategy.reduce(count, reduce_op="sum")
            if count > self.max_share * len(data):  # several may count the same file
                _share(data, trainer, pl_module)
                self._check_share("training")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the training images."""
        self._report(trainer, pl_module, "training")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the validation images."""
        if not trainer.sanity_checking:
            self._report(trainer, pl_module, "validation")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the test images."""
        self._report(trainer, pl_module, "test")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the images that have no prediction."""
        self._report(trainer, pl_module, "predict")

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, part: str) -> None:
        data = self.datasets.get(part)
        if data is None:
            return
        _share(data, trainer, pl_module)
        count = int(data.unreadable.sum())
        if count == self._known.get(part, 0):
            return
        self._known[part] = count
        file = Path(trainer.log_dir or trainer.default_root_dir, FILE)  # asked by every process
        if trainer.is_global_zero:
            write_bad_files(data, file)
        fate = "left out" if part == "predict" else "replaced by others"
        rank_zero_warn(
            f"{count} of {len(data)} {part} images could not be read and were {fate}: see {file}"
        )
        self._check_share(part)

    def _check_share(self, part: str) -> None:
        data = self.datasets[part]
        count = int(data.unreadable.count_nonzero())
        if count > self.max_share * len(data):
            last = int(data.unreadable.nonzero()[-1])
            raise UnreadableImage(
                f"{count} of {len(data)} {part} images cannot be read, which is more than "
                f"data.max_bad_share {self.max_share:g} allows; one is {data.path(last)!r}: "
                f"{data.why_unreadable(last)}"
            )


def _share(data: ImageData, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Let every process know of the unreadable files that any has met."""
    if trainer.world_size > 1:
        counts = data.unreadable.to(pl_module.device, torch.float32)
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        data.unreadable |= (counts > 0).cpu()


def write_bad_files(data: ImageData, file: Path) -> None:
    """Add the unreadable files to a list: a line each, path, tab and reason.

    Line breaks, tabs and bytes that are no text are written as escapes.
    """
    lines = set(file.read_text("utf-8").splitlines()) if file.exists() else set()
    for index in data.unreadable.nonzero()[:, 0].tolist():
        lines.add(f"{escape(data.path(index))}\t{escape(data.why_unreadable(index))}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in sorted(lines)), "utf-8")


def escape(text: str) -> str:
    """Write line breaks, tabs and bytes that are no text as escapes."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
