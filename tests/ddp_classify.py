"""Run by test_strategies: score and predict with some processes, then write what was found.

Usage: python ddp_classify.py PROCESSES IMAGES OUT
"""

import sys
from pathlib import Path

import lightning as L
import torch

from simmim.callbacks.classification import ConfusionMatrix, PredictionTable
from simmim.classify import Classifier
from simmim.data.classification import ClassificationData


def main(processes: int, images: str, out: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = Classifier(
        encoder="vit_tiny_patch16_224", img_size=32, encoder_kwargs=kwargs, ema_decay=0.5
    )
    data = ClassificationData(
        root=images, img_size=32, batch_size=8 // processes, num_workers=0, val_fraction=0.35
    )
    run = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=2,
        logger=False,
        default_root_dir=out,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[ConfusionMatrix(), PredictionTable()],
    )
    run.fit(model, data)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    run.predict(model, data, return_predictions=False)
    if run.is_global_zero:
        confusion = model.confusion_matrix
        torch.save({"metrics": found, "confusion": confusion}, out / "found.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
