"""Base of the callbacks that write what `predict` finds into the run's folder, image by image.

Lightning's BasePredictionWriter is not it: that keeps the indices of every batch of the folder.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

from simmim.callbacks.base import picture_names
from simmim.callbacks.pictures import PictureNames

TEXT: Any = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # paths are any bytes


class FolderWriter(L.Callback, ABC):
    """Write each batch as it is predicted.

    What `predict_step` returns is not collected as well: a folder of a million images would not fit
    into memory.
    """

    def __init__(self) -> None:
        self.run: Path = Path()
        self.names = PictureNames()
        self._seen = 0  # images of this process

    @abstractmethod
    def write(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any) -> None:
        """Write what was predicted for the images of a batch."""

    def next_place(self, trainer: L.Trainer) -> int:
        """Number of the next image, where batches do not tell it."""
        self._seen += 1
        return (self._seen - 1) * trainer.world_size + trainer.global_rank

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the run's folder, which every process must ask for."""
        self.run = Path(trainer.log_dir or trainer.default_root_dir)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep Lightning from collecting what is written."""
        self.names, self._seen = picture_names(trainer), 0
        trainer.predict_loop.return_predictions = False

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch."""
        self.write(trainer, pl_module, outputs, batch)


class ResultsWriter(FolderWriter):
    """Write results into a file for each process, and merge these at the end."""

    RESULTS: ClassVar[str]  # name of the merged file

    def __init__(self) -> None:
        super().__init__()
        self.part: Any = None  # open file of this process

    @abstractmethod
    def merge(self, module: Any, parts: Sequence[Path]) -> None:
        """Merge the files of all processes, in the order of the images, and say where they are."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the file of this process."""
        super().on_predict_start(trainer, pl_module)
        self.run.mkdir(parents=True, exist_ok=True)
        self.part = self._path(trainer.global_rank).open("w", **TEXT)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge what all processes have written."""
        self.part.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [self._path(rank) for rank in range(trainer.world_size)]
            self.merge(pl_module, parts)
            for part in parts:
                part.unlink()

    def _path(self, rank: int) -> Path:
        return self.run / f".{self.RESULTS}.{rank}"
