"""Alarms: runs that are really lost are announced, healthy ones are not."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from callback_parts import DigitsData, MiniEncoder, MiniSimMIM, trainer
from simmim.callbacks import CollapseAlarm, NonFiniteLoss, StopOnNonFinite
from simmim.callbacks.alarms import mean_level
from simmim.loss import l1_error, l2_error
from simmim.masking import upsample_mask
from support import exhaustive


class BadLoss(MiniSimMIM):
    """A loss that is no number at some steps; `harmless`: without a gradient, as an fp16 skip."""

    def __init__(self, at: int = 5, value: float = float("nan"), harmless: bool = False) -> None:
        super().__init__()
        self.at, self.value, self.harmless = at, value, harmless

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step != self.at:
            return loss
        return loss + self.value if self.harmless else loss * self.value


@pytest.mark.parametrize(
    ("value", "harmless", "options", "remedy"),
    [
        (float("nan"), True, {}, "gradient_clip_val"),
        (float("inf"), False, {"gradient_clip_val": 5.0, "precision": "bf16-mixed"}, "rate"),
    ],
)
def test_a_bad_loss_stops_the_run_at_the_next_logging_step(
    tmp_path: Path, value: float, harmless: bool, options: dict[str, Any], remedy: str
) -> None:
    fit = trainer(tmp_path, StopOnNonFinite(), max_epochs=9, **options)
    with pytest.raises(
        NonFiniteLoss, match=rf"train/loss became .* at step 6 .*{remedy}"
    ) as caught:
        fit.fit(BadLoss(5, value, harmless), datamodule=DigitsData())
    assert fit.global_step == 8  # logged every 4 steps
    assert isinstance(caught.value, ValueError)  # what the command line prints as one sentence
    assert "\n" not in str(caught.value)
    assert ("gradient_clip_val" in str(caught.value)) != ("gradient_clip_val" in options)
    assert "bf16" not in str(caught.value)  # the run has it, or needs none on a CPU


@pytest.mark.parametrize("every_step", [True, False], ids=["each step", "each epoch"])
def test_no_checkpoint_is_overwritten_with_lost_weights(tmp_path: Path, every_step: bool) -> None:
    when: dict[str, Any] = {"every_n_train_steps": 1} if every_step else {"every_n_epochs": 1}
    keep = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False, **when)
    at = 5 if every_step else 12
    options: dict[str, Any] = {"max_epochs": 9, "log_every_n_steps": 1000, "logger": False}
    fit = trainer(tmp_path, StopOnNonFinite(), keep, enable_checkpointing=True, **options)
    with pytest.raises(NonFiniteLoss, match="infinite or not a number"):
        fit.fit(BadLoss(at), datamodule=DigitsData())
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == (5 if every_step else 8)
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())


def test_weights_that_a_finite_loss_ruins_are_not_saved(tmp_path: Path) -> None:
    class Ruin(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step == 8:  # the loss of this step was finite
                module.encoder.place.data.fill_(float("nan"))

    keep = ModelCheckpoint(tmp_path, filename="last")
    fit = trainer(tmp_path, StopOnNonFinite(), Ruin(), keep, enable_checkpointing=True)
    with pytest.raises(NonFiniteLoss, match="the weights are infinite"):
        fit.fit(MiniSimMIM(), datamodule=DigitsData())
    assert not (tmp_path / "last.ckpt").exists()


def test_mean_level_by_hand() -> None:
    # Hidden pixels of the one channel: 0, 0, 0, 4. Median 0 -> L1 of 1; mean 1 -> L2 of 3.
    target = torch.tensor([[0.0, 0, 9, 9], [0, 4, 9, 9]]).view(1, 1, 2, 4)
    mask = torch.tensor([[[True, False]]])
    assert mean_level(l1_error, target, mask) == pytest.approx(1.0, abs=1e-4)
    assert mean_level(l2_error, target, mask) == pytest.approx(3.0, abs=1e-4)


@pytest.mark.slow
def test_a_healthy_run_is_left_alone(tmp_path: Path) -> None:
    alarm = CollapseAlarm()
    fit = trainer(tmp_path, alarm, max_epochs=8)
    fit.fit(MiniSimMIM(0.03), datamodule=DigitsData())
    assert not alarm.announced  # and no warning, which would be an error here
    logged = fit.callback_metrics
    assert logged["collapse/alarm"] == 0
    assert logged["collapse/loss_over_mean"] < 0.7
    assert logged["collapse/effective_rank"] > 3
    assert logged["collapse/encoder_grad_norm"] > 0


class ReluEncoder(MiniEncoder):
    """No way around the ReLUs: one step that is far too large kills them for ever."""

    def forward(self, images: Tensor, mask: Tensor | None = None, keys: Any = None) -> Tensor:
        x = self.stem(images)
        if mask is not None:
            x = torch.where(upsample_mask(mask, (4, 4)), self.mask_token, x)
        for layer in self.mix:
            x = layer(x.flatten(1)).relu().view_as(x)
        return x


class BlindEncoder(MiniEncoder):
    """Each patch sees itself alone: what is hidden can only be guessed, and nothing is learned."""

    def forward(self, images: Tensor, mask: Tensor | None = None, keys: Any = None) -> Tensor:
        x = self.stem(images)
        if mask is not None:
            x = torch.where(upsample_mask(mask, (4, 4)), torch.ones(32, 1, 1), x)
        return x


class WithEncoder(MiniSimMIM):
    def __init__(self, encoder: MiniEncoder, lr: float) -> None:
        super().__init__(lr)
        self.encoder = encoder

    def configure_optimizers(self) -> Any:
        encoder = {"params": self.encoder.parameters(), "lr": self.hparams["lr"]}
        return torch.optim.SGD([encoder, {"params": self.head.parameters(), "lr": 0.05}])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "lr", "reasons"),
    [
        (ReluEncoder, 300.0, ["features differ between images", "lie on one line"]),
        (BlindEncoder, 0.1, ["predicting the mean", "gradients are 0 of"]),
    ],
)
def test_a_collapsed_run_is_announced_once(
    tmp_path: Path, encoder: type[MiniEncoder], lr: float, reasons: list[str]
) -> None:
    alarm = CollapseAlarm()
    fit = trainer(tmp_path, alarm, max_epochs=8, gradient_clip_val=1.0)
    with pytest.warns(UserWarning, match="has collapsed") as caught:
        fit.fit(WithEncoder(encoder(), lr), datamodule=DigitsData())
    said = [str(w.message) for w in caught if "has collapsed" in str(w.message)]
    assert len(said) == 1
    assert all(reason in said[0] for reason in [*reasons, "lower base_lr"])
    assert fit.callback_metrics["collapse/alarm"] == 1
    assert fit.current_epoch == 8  # the run goes on
    assert alarm.announced


@pytest.mark.slow
def test_the_alarm_remembers_what_it_compares_with(tmp_path: Path) -> None:
    keep, first = ModelCheckpoint(tmp_path, filename="last"), CollapseAlarm()
    fit = trainer(tmp_path, first, keep, max_epochs=1, enable_checkpointing=True)
    fit.fit(MiniSimMIM(), datamodule=DigitsData())
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    second = CollapseAlarm()
    fit = trainer(tmp_path, second, keep, max_epochs=2, enable_checkpointing=True)
    fit.fit(MiniSimMIM(), datamodule=DigitsData(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert second.state_dict()["start"] == first.state_dict()["start"] != {}
    assert second.state_dict()["largest_grad"] >= first.state_dict()["largest_grad"] > 0


@pytest.mark.parametrize("many", [exhaustive(False), True])
def test_images_of_one_colour_are_told_and_no_reason_to_stop(tmp_path: Path, many: bool) -> None:
    data = DigitsData()
    for part in (data.train, data.val):
        shade = torch.arange(len(part)).view(-1, 1, 1, 1) if many else torch.tensor(90)
        part.images = shade.byte().expand(part.images.shape).clone()
    fit = trainer(tmp_path, alarm := CollapseAlarm(), max_epochs=3)
    with pytest.warns(UserWarning, match="is of one colour: there is nothing to learn") as caught:
        fit.fit(MiniSimMIM(), datamodule=data)
    assert len([w for w in caught if "of one colour" in str(w.message)]) == 1
    assert not alarm.announced
    assert fit.current_epoch == 3


def test_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="num_images 2"):
        CollapseAlarm(2)
