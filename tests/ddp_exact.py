"""Run by test_data_exact: train with some processes, and keep what each step was given.

Usage: python ddp_exact.py KIND PROCESSES FOLDER
"""

import sys
from pathlib import Path

import lightning as L
import torch

from simmim.pretrain import SimMIM
from test_data_exact import EPOCHS, KINDS, SIZE, Notes


def main(kind: str, processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}
    model = SimMIM(
        encoder="vit_tiny_patch16_224", img_size=SIZE, mask_patch_size=8, encoder_kwargs=kwargs
    )
    made, options = KINDS[kind]
    data = made(
        root=str(folder / "images"),
        img_size=SIZE,
        batch_size=8 // processes,
        num_workers=0,
        **options,
    )
    notes = Notes()
    run = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=EPOCHS,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[notes],
    )
    run.fit(model, data)
    torch.save(notes.seen, folder / f"{processes}_{run.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
