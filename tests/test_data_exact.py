"""A sample depends on (seed, epoch, index) alone: not on workers, batch size or processes."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simmim.data import ImageFolderData
from simmim.data.classification import ClassificationData
from simmim.pretrain import SimMIM
from support.commands import assert_same_tensors
from support.folders import make_classes

SIZE, EPOCHS = 32, 2
TINY = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pretraining": (ImageFolderData, {"val_fraction": 0.2}),
    "classification": (
        ClassificationData,
        {"val_fraction": 0.2, "randaugment": "rand-m9-mstd0.5-inc1"},
    ),
}
LAYOUTS = [(1, 8, 1), (0, 4, 2), (2, 2, 4), (0, 1, 8)]  # workers, batch size, processes

Seen = dict[tuple[int, int], dict[str, Tensor]]  # samples by (epoch, index)


def read(
    root: Path, kind: str, workers: int, batch_size: int, processes: int, seed: int = 0
) -> tuple[Seen, Any]:
    """Read epochs as so many processes do: their samples, and the indices of each global batch."""
    made, given = KINDS[kind]
    seen: Seen = {}
    steps: list[list[list[int]]] = []
    for rank in range(processes):
        options = {**given, "img_size": SIZE, "batch_size": batch_size, "num_workers": workers}
        data = made(root=str(root), seed=seed, **options)
        data._process = lambda rank=rank: (processes, rank)
        data.setup("fit")
        loader = data.train_dataloader()
        batches = [(epoch, batch) for epoch in range(EPOCHS) for batch in loader]
        for step, (epoch, batch) in enumerate(batches):
            if rank == 0:
                steps.append([])
            steps[step].append(batch["index"].tolist())
            for i, index in enumerate(batch["index"].tolist()):
                assert (epoch, index) not in seen  # once an epoch
                seen[epoch, index] = {name: values[i] for name, values in batch.items()}
    return seen, [list(chain(*shares)) for shares in steps]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_depend_on_workers_batches_or_processes(tmp_path: Path, kind: str) -> None:
    make_classes(tmp_path, 20, size=(48, 40))
    first, order = read(tmp_path, kind, 0, 8, 1)
    assert len(first) == 32 * EPOCHS
    assert any(not torch.equal(first[0, i]["image"], first[1, i]["image"]) for _, i in first)
    assert {bool(sample["flip"]) for sample in first.values()} == {True, False}
    for layout in LAYOUTS if kind == "pretraining" else LAYOUTS[:2]:
        again, others = read(tmp_path, kind, *layout)
        assert again.keys() == first.keys()
        for key, sample in first.items():
            assert_same_tensors(again[key], sample)
        if layout[1] * layout[2] == 8:  # as many images a step: the same ones, in the same order
            assert others == order
    again, others = read(tmp_path, kind, 0, 8, 1, seed=1)
    assert others != order
    assert any(not torch.equal(again[key]["image"], first[key]["image"]) for key in first)


def test_masks_do_not_depend_on_the_batch() -> None:
    for masking in ("random", "block", "square"):
        model = SimMIM(
            encoder="vit_tiny_patch16_224", img_size=SIZE, mask_patch_size=8,
            encoder_kwargs=TINY, masking=masking, mask_ratio=[0.3, 0.7], mask_fill="noise",
        )  # fmt: skip
        raw, index = torch.zeros(8, 3, SIZE, SIZE, dtype=torch.uint8), torch.arange(100, 108)
        for validation in (False, True):
            masks, keys = model.draw_mask(raw, index, validation=validation)
            for part in (slice(0, 3), slice(3, 8), [7, 0], [5]):
                mask, key = model.draw_mask(raw[part], index[part], validation=validation)
                assert torch.equal(mask, masks[part])
                assert torch.equal(key, keys[part])
