"""Run by test_strategies: train and score with some processes, then write what was found.

Usage: python ddp_segment.py PROCESSES IMAGES OUT STRATEGY
"""

import sys
from pathlib import Path

import lightning as L
import torch

from simmim.callbacks.segmentation import MaskWriter, Segmentations
from simmim.data import SegmentationData
from simmim.segment import Segmenter


def main(processes: int, images: str, out: Path, strategy: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    model = Segmenter(
        encoder="vit_tiny_patch16_224",
        img_size=32,
        encoder_kwargs=kwargs,
        decoder_channels=16,
        base_lr=0.0,  # a BatchNorm sees other batches in two processes: nothing is to be learned
        warmup_lr=0.0,
    )
    data = SegmentationData(images, img_size=32, batch_size=4 // processes, num_workers=0)
    run = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        default_root_dir=out,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Segmentations(), MaskWriter()],
    )
    run.fit(model, data)  # every trained parameter is reached, or DDP stops here
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    run.validate(model, data, verbose=False)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    run.predict(model, data, return_predictions=False)
    if run.is_global_zero:
        torch.save(found, out / "found.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
