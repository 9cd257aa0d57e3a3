"""Loaders and data modules that are not ours: places of the images, lengths, batch sizes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from simmim import Classifier, SimMIM
from support.training import quiet_trainer

TINY: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "img_size": 32,
    "encoder_kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1},
}


def test_the_places_of_a_shorter_last_batch_follow_the_others(tmp_path: Path) -> None:
    model = SimMIM(mask_patch_size=8, **TINY)
    seen: list[list[int]] = []

    class Watch(L.Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            seen.append(args[2]["index"].tolist())

    loader = DataLoader(torch.randn(7, 3, 32, 32), batch_size=3)
    trainer = quiet_trainer(tmp_path, Watch())
    trainer.validate(model, loader, verbose=False)
    assert seen == [[0, 1, 2], [3, 4, 5], [6]]
    trainer.save_checkpoint(tmp_path / "validated.ckpt")  # of a model that was never trained
    again = SimMIM.load_from_checkpoint(tmp_path / "validated.ckpt")
    for before, after in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(before, after)


def test_places_are_dealt_out_as_distributed_sampler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimMIM(mask_patch_size=8, **TINY)
    model.trainer = L.Trainer(accelerator="cpu", logger=False, barebones=True)
    found = set()
    for rank in range(2):
        monkeypatch.setattr(SimMIM, "global_rank", rank)
        monkeypatch.setattr(L.Trainer, "world_size", 2)
        for batch_idx, size in enumerate((3, 3, 1)):
            _, _, index = model.inputs(torch.zeros(size, 3, 32, 32), batch_idx)
            assert set((index % 2).tolist()) == {rank}  # rank, rank + 2, rank + 4, ...
            found |= set(index.tolist())
    assert found == set(range(14))


class Stream(IterableDataset[Tensor]):
    """Images without an end."""

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.zeros(3, 32, 32)


def test_data_without_a_length_are_refused_with_the_remedy(tmp_path: Path) -> None:
    model, loader = SimMIM(mask_patch_size=8, **TINY), DataLoader(Stream(), 2)
    with pytest.raises(ValueError, match=r"no length.*limit_train_batches"):
        quiet_trainer(tmp_path).fit(model, loader)


def test_a_batch_sampler_says_the_batch_size(tmp_path: Path) -> None:
    images = torch.randn(8, 3, 32, 32)
    sampler = BatchSampler(SequentialSampler(images), 4, drop_last=False)
    model = SimMIM(mask_patch_size=8, base_lr=5.12, warmup_epochs=0, **TINY)
    run = quiet_trainer(tmp_path)
    run.fit(model, DataLoader(images, batch_sampler=sampler))
    assert run.optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(5.12 * 4 / 512)


@pytest.mark.parametrize(("name", "value"), [("random_erasing", 1.5), ("label_smoothing", 1.0)])
def test_shares_above_one_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} {value} is no"):
        Classifier(**TINY, **{name: value})


class Pointwise(nn.Conv2d):
    """A head of a user's own that looks at one place alone."""

    def __init__(self, in_features: int, out_chans: int, upsample: int) -> None:
        super().__init__(in_features, out_chans * upsample**2, 1)
        self.shuffle = nn.PixelShuffle(upsample)

    def forward(self, features: Tensor) -> Tensor:
        return self.shuffle(super().forward(features))


def test_a_pointwise_head_of_a_users_own_cannot_skip_hidden_tokens() -> None:
    name = f"{__name__}.Pointwise"
    with pytest.raises(ValueError, match=r"looks at one place alone.*use head transformer"):
        SimMIM(mask_patch_size=8, head=name, hidden_tokens="skip", trust=True, **TINY)
