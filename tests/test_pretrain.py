"""The LightningModule: the method by hand, its options, its optimisation and its checkpoints."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from simmim.masking import draw_masks, random_mask, sample_keys, upsample_mask
from simmim.pretrain import SimMIM
from support.small import SHARED_BIAS, SWIN, VIT, ByIndex, noise_loader
from support.training import quiet_trainer

TINY: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "img_size": 32,
    "mask_patch_size": 8,
    "encoder_kwargs": VIT,
}


def tiny(**kwargs: Any) -> SimMIM:
    return SimMIM(**{**TINY, **kwargs})


def draw(model: SimMIM, n: int = 4, epoch: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.randn(n, model.hparams["in_chans"], *model.encoder.img_size)
    mask, keys = model.draw_mask(images, torch.arange(n), validation=True)
    return images, mask, keys


# The method --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_lines_of_the_article_work_as_written() -> None:
    images = torch.randn(1, 3, 224, 224)
    from simmim import SimMIM, mask_images, mse_loss

    model = SimMIM()
    masked_images, masks = mask_images(images)
    outputs = model(masked_images)
    loss = mse_loss(outputs, images, masks)

    assert outputs.shape == images.shape
    assert masks.sum() == math.ceil(0.6 * 49)
    hidden = masks.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None].expand_as(images)
    torch.testing.assert_close(loss, ((outputs - images) ** 2)[hidden].mean())


def test_the_loss_is_the_published_formula() -> None:
    model = tiny()
    images, mask, keys = draw(model)
    loss, prediction = model.loss_of(images, mask, keys)
    hidden = upsample_mask(mask, (32, 32)).float()
    published = ((images - prediction).abs() * hidden).sum() / (hidden.sum() + 1e-5) / 3
    torch.testing.assert_close(loss, published, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("encoder", "kwargs", "fill"),
    [
        *(("vit_tiny_patch16_224", VIT, f) for f in ("token", "mean", "noise")),
        ("beit_base_patch16_224", {**VIT, **SHARED_BIAS}, "token"),
        ("swin_tiny_patch4_window7_224", SWIN, "token"),
        ("swinv2_tiny_window8_256", SWIN, "zero"),
    ],
    ids=str,
)
def test_no_hidden_pixel_reaches_the_prediction(
    encoder: str, kwargs: dict[str, Any], fill: str
) -> None:
    model = tiny(encoder=encoder, encoder_kwargs=kwargs, mask_fill=fill).eval()
    images, mask, keys = draw(model, 2)
    images.requires_grad_()
    model(images, mask, keys).square().sum().backward()
    hidden = upsample_mask(mask, (32, 32)).expand_as(images)
    assert images.grad is not None
    assert images.grad[hidden].abs().max() == 0
    assert images.grad[~hidden].abs().min() > 0
    if fill == "token":
        assert model.encoder.mask_token.grad.abs().min() > 0
    else:
        assert model.encoder.mask_token is None


def test_every_epoch_draws_new_masks_and_validation_always_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw, index = torch.zeros(16, 3, 32, 32), torch.arange(100, 116)
    validation = []
    for seed, epoch in ((0, 0), (0, 3), (5, 3)):
        monkeypatch.setattr(SimMIM, "current_epoch", epoch)
        model = tiny(seed=seed)
        mask, keys = model.draw_mask(raw, index, validation=False)
        assert torch.equal(keys, sample_keys(index, seed, epoch))
        assert torch.equal(mask, draw_masks(random_mask, keys, (4, 4), 0.6))
        validation.append(model.draw_mask(raw, index, validation=True)[0])
        assert not torch.equal(mask, validation[-1])
    assert torch.equal(validation[0], validation[1])
    assert torch.equal(validation[0], validation[2])


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_any_channels_and_rectangles(in_chans: int) -> None:
    model = tiny(in_chans=in_chans, img_size=[32, 48])
    images, mask, keys = draw(model)
    loss, prediction = model.loss_of(images, mask, keys)
    assert prediction.shape == images.shape
    assert loss.isfinite()
    pictures = model.reconstruct(images, mask, keys)
    for picture in pictures.values():
        assert picture.shape == (4, 3 if in_chans > 2 else 1, *model.encoder.img_size)
        assert picture.min() >= 0
        assert picture.max() <= 1
    hidden = upsample_mask(mask, model.encoder.img_size).expand_as(pictures["original"])
    assert torch.equal(pictures["pasted"][~hidden], pictures["original"][~hidden])
    assert torch.equal(pictures["pasted"][hidden], pictures["prediction"][hidden])


def test_the_loss_is_float32_under_autocast() -> None:
    model = tiny()
    images, mask, keys = draw(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, prediction = model.loss_of(images, mask, keys)
    assert prediction.dtype == torch.bfloat16
    assert loss.dtype == torch.float32


def test_uint8_is_normalised_with_the_pixel_statistics() -> None:
    model = tiny()
    model.set_statistics([0.1, 0.2, 0.3], [0.5, 0.25, 0.125])
    raw = torch.full((1, 3, 1, 1), 51, dtype=torch.uint8)  # 51 / 255 = 0.2
    torch.testing.assert_close(
        model.normalize(raw).flatten(), torch.tensor([0.2, 0.0, -0.8]), atol=1e-6, rtol=0
    )


def test_bfloat16_throughout() -> None:
    run = quiet_trainer(precision="bf16-true")
    run.fit(tiny(), noise_loader())
    assert run.callback_metrics["train/loss"].item() == pytest.approx(1.19, abs=0.03)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"encoder": "vit_tinny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"mask_patch_size": 6}, "mask_patch_size"),
        ({"img_size": 30}, "30"),
        ({"masking": "randon"}, "did you mean 'random'"),
        ({"loss": "l3"}, "l1"),
        ({"target": "pixel"}, "did you mean 'pixels'"),
        ({"head": "linea"}, "did you mean 'linear'"),
        ({"loss": "cosine"}, "does not go with target 'pixels'"),
        ({"mask_ratio": 1.2}, "1.2"),
        ({"head_kwargs": {"depth": 2}}, "head 'linear' has no option 'depth'"),
        ({"target_kwargs": {"windw": 47}}, "has no option 'windw'"),
    ],
)
def test_impossible_choices_are_refused_in_one_sentence(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + words) as error:
        tiny(**kwargs)
    assert "\n" not in str(error.value)


# Training ----------------------------------------------------------------------------------------


def test_a_stored_ten_step_loss_curve() -> None:
    losses = _losses(tiny(warmup_epochs=1, base_lr=0.1), max_epochs=5)
    expected = STORED_LOSSES
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-4, atol=0)
    assert losses[-1] < losses[0]


# torch 2.15 on an x86-64 CPU; equal under refactoring, and near enough elsewhere.
STORED_LOSSES = [
    *(1.193709, 1.197067, 1.175423, 1.152627, 1.143347),
    *(1.119016, 1.132178, 1.119404, 1.123113, 1.114416),
]


def _losses(model: SimMIM, **kwargs: Any) -> list[float]:
    losses = []

    class Keep(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            losses.append(float(args[2]["loss"]))

    torch.manual_seed(0)
    quiet_trainer(None, Keep(), **kwargs).fit(model, noise_loader())
    return losses


@pytest.mark.parametrize(
    "wrap",
    [lambda x: (x, torch.zeros(len(x))), lambda x: (x,), lambda x: x],
    ids=["images and labels", "a tuple of images", "images"],
)
def test_plain_loaders_are_taken_too(wrap: Callable[[Tensor], Any]) -> None:
    images = ByIndex().images / 255
    data = DataLoader(images if wrap(images) is images else TensorDataset(*wrap(images)), 4)
    quiet_trainer().fit(tiny(), data)


def test_learning_rates_by_hand() -> None:
    rates: list[float] = []

    class Keep(L.Callback):
        def on_train_batch_start(self, run: L.Trainer, *args: Any) -> None:
            rates.append(run.optimizers[0].param_groups[0]["lr"])

    model = tiny(base_lr=5.12, warmup_epochs=1, warmup_lr=0.512, min_lr=1.024)
    run = quiet_trainer(None, Keep(), max_epochs=4)
    run.fit(model, noise_loader())
    # A global batch of 4: lr 5.12 x 4 / 512 = 0.04, from 0.004 to 0.008; 8 steps, 2 of warm-up.
    cosine = [0.008 + 0.5 * (0.04 - 0.008) * (1 + math.cos(math.pi * t / 8)) for t in range(2, 8)]
    assert rates == pytest.approx([0.004, 0.022, *cosine])


def test_options_reach_the_model_and_the_optimiser() -> None:
    options = {"weight_decay": 0.3, "drop_rate": 0.5, "drop_path_rate": 0.2}
    model = tiny(base_lr=5.12, warmup_epochs=0, **options).train()
    images, mask, _ = draw(model)
    assert (model(images, mask) - model(images, mask)).abs().max() > 1e-3
    run = quiet_trainer(accumulate_grad_batches=2)
    run.fit(model, noise_loader())
    (optimizer,) = run.optimizers
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    # A global batch of 4 images in each of 2 steps: 5.12 x 8 / 512.
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.08)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[SimMIM, Path]:
    """A model after an epoch, with pixel statistics of its own, and its checkpoint."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    model = tiny()
    model.set_statistics([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    run = quiet_trainer()
    run.fit(model, noise_loader())
    run.save_checkpoint(path := folder / "x.ckpt")
    return model.eval(), path


def test_a_new_head_trains_alone_on_loaded_weights_at_first(
    pretrained: tuple[SimMIM, Path],
) -> None:
    model = tiny(weights=str(pretrained[1]), head="mlp", warmup_epochs=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    class Compare(L.Callback):
        def on_train_batch_end(self, run: L.Trainer, model: L.LightningModule, *_: Any) -> None:
            moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            encoder = {n for n in moved if n.startswith("encoder.model.")}
            assert bool(encoder) == (run.global_step > 2)  # 5 % of 40 steps
            assert any(n.startswith("head.") for n in moved)
            run.should_stop = run.global_step > 3

    run = quiet_trainer(None, Compare(), max_epochs=20)
    run.fit(model, noise_loader())
    assert run.global_step == 4


def stop_after(epochs: int) -> L.Callback:
    """End a run early, as an interruption does."""
    return L.pytorch.callbacks.LambdaCallback(
        on_train_epoch_end=lambda run, _: setattr(
            run, "should_stop", run.current_epoch + 1 >= epochs
        )
    )


def interrupted(folder: Path, name: str, max_epochs: int, stop: int, **options: Any) -> SimMIM:
    """Train until an epoch's end, from `ckpt` where it is given, and save `folder`/`name`.ckpt."""
    torch.manual_seed(0)
    ckpt, model = options.pop("ckpt", None), tiny(**options)
    run = quiet_trainer(None, stop_after(stop), max_epochs=max_epochs)
    run.fit(model, noise_loader(), ckpt_path=ckpt)
    run.save_checkpoint(folder / f"{name}.ckpt")
    return model


def assert_same_state(ours: SimMIM, theirs: SimMIM) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_a_new_head_trains_alone_after_an_interruption_too(
    tmp_path: Path, pretrained: tuple[SimMIM, Path]
) -> None:
    options = {"head": "mlp", "warmup_epochs": 0}
    weights = {**options, "weights": str(pretrained[1])}
    # Alone for 4 of 80 steps, of which this makes 6.
    whole = interrupted(tmp_path, "whole", 40, 3, **weights)
    half = interrupted(tmp_path, "half", 40, 1, **weights)
    # As a run goes on: without the weights.
    rest = interrupted(tmp_path, "rest", 40, 3, ckpt=str(tmp_path / "half.ckpt"), **options)
    begun = tiny(**weights).encoder.model.state_dict()
    for name, a in half.encoder.model.state_dict().items():
        assert torch.equal(a, begun[name]), name
    assert_same_state(rest, whole)
    assert not torch.load(tmp_path / "rest.ckpt", weights_only=True)["loaded"]


@pytest.mark.parametrize(("ratio", "is_zero"), [(0.0, True), (1.0, False)])
def test_validation_where_nothing_or_everything_is_hidden(ratio: float, is_zero: bool) -> None:
    run = quiet_trainer()
    (found,) = run.validate(tiny(mask_ratio=ratio), noise_loader(), verbose=False)
    assert math.isfinite(found["val/loss"])
    assert (found["val/loss"] == 0) == is_zero


# Checkpoints -------------------------------------------------------------------------------------


def test_a_checkpoint_opens_safely_and_whole(
    tmp_path: Path, pretrained: tuple[SimMIM, Path]
) -> None:
    model, path = pretrained
    assert torch.load(path, weights_only=True)["state_dict"]
    again = SimMIM.load_from_checkpoint(path)
    assert_same_state(again, model)
    assert torch.equal(again.std, torch.tensor([0.5, 0.6, 0.7]).view_as(again.std))
    weight = torch.nn.Parameter(torch.zeros(1))
    assert type(again.optimizer([weight])) is torch.optim.AdamW
    run = quiet_trainer()
    run.fit(tiny(optimizer=torch.optim.SGD), noise_loader())
    run.save_checkpoint(path := tmp_path / "sgd.ckpt")
    again = SimMIM.load_from_checkpoint(path)
    assert type(again.optimizer([weight])) is torch.optim.SGD


def test_weights_bring_their_pixel_statistics(pretrained: tuple[SimMIM, Path]) -> None:
    model, path = pretrained
    onward = tiny(weights=str(path), head="mlp")
    assert torch.equal(onward.mean, model.mean)
    assert torch.equal(onward.std, model.std)
    run = quiet_trainer()
    (found,) = run.validate(tiny(weights=str(path)), noise_loader(), verbose=False)
    (expected,) = run.validate(model, noise_loader(), verbose=False)
    assert found["val/loss"] == pytest.approx(expected["val/loss"], abs=1e-6)


@pytest.mark.slow
def test_going_on_at_an_epochs_end_is_bitwise_the_same(tmp_path: Path) -> None:
    options = {"drop_rate": 0.1, "drop_path_rate": 0.1, "warmup_epochs": 1}
    whole = interrupted(tmp_path, "whole", 4, 4, **options)
    interrupted(tmp_path, "half", 4, 2, **options)
    rest = interrupted(tmp_path, "rest", 4, 4, ckpt=str(tmp_path / "half.ckpt"), **options)
    assert_same_state(rest, whole)


@pytest.mark.parametrize("ratio", [0, [0.0, 0.0]])
def test_a_training_that_hides_nothing_is_refused(ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"hides nothing, .*: use 0.6"):
        quiet_trainer().fit(tiny(mask_ratio=ratio), noise_loader())
