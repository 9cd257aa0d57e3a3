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

from simmim.masking import upsample_mask
from simmim.pretrain import SimMIM

TINY: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "img_size": 32,
    "mask_patch_size": 8,
    "encoder_kwargs": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
}


def tiny(**kwargs: Any) -> SimMIM:
    return SimMIM(**{**TINY, **kwargs})


def trainer(folder: Path, **kwargs: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return L.Trainer(**{**defaults, **kwargs})


class ByIndex(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight images that know their place, as our data module gives them."""

    def __init__(self, chans: int = 3, n: int = 8) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randint(0, 256, (n, chans, 32, 32), generator=generator).byte()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": self.images[i], "index": torch.tensor(i)}


def loader(n: int = 8, batch_size: int = 4, chans: int = 3) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(ByIndex(chans, n), batch_size=batch_size)


def draw(model: SimMIM, n: int = 4, epoch: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.randn(n, model.hparams["in_chans"], *model.encoder.img_size)
    mask, keys = model.draw_mask(images, torch.arange(n), validation=True)
    return images, mask, keys


# The method --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("fill", ["token", "zero", "mean", "noise"])
@pytest.mark.parametrize(
    "encoder",
    [
        {},
        {
            "encoder": "beit_base_patch16_224",
            "encoder_kwargs": {
                **TINY["encoder_kwargs"],
                "use_rel_pos_bias": False,
                "use_shared_rel_pos_bias": True,
            },
        },
        {
            "encoder": "swin_tiny_patch4_window7_224",
            "encoder_kwargs": {
                "patch_size": 2,
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [2, 2],
                "window_size": 4,
            },
        },
        {
            "encoder": "swinv2_tiny_window8_256",
            "encoder_kwargs": {
                "patch_size": 2,
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [2, 2],
                "window_size": 4,
            },
        },
    ],
    ids=["vit", "beit", "swin", "swinv2"],
)
def test_no_hidden_pixel_reaches_the_prediction(encoder: dict[str, Any], fill: str) -> None:
    model = tiny(mask_fill=fill, **encoder).eval()
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


def test_every_epoch_draws_new_masks_and_validation_always_the_same() -> None:
    model = tiny()
    raw, index = torch.zeros(16, 3, 32, 32), torch.arange(16)
    validation = [model.draw_mask(raw, index, validation=True)[0] for _ in range(2)]
    assert torch.equal(*validation)
    assert torch.equal(validation[0], tiny(seed=5).draw_mask(raw, index, validation=True)[0])
    first = model.draw_mask(raw, index, validation=False)[0]
    assert not torch.equal(first, tiny(seed=5).draw_mask(raw, index, validation=False)[0])
    assert not torch.equal(first, validation[0])
    assert (first.flatten(1).sum(1) == math.ceil(0.6 * 16)).all()


def test_the_mask_of_a_sample_does_not_depend_on_its_batch() -> None:
    model = tiny()
    raw, index = torch.zeros(8, 3, 32, 32), torch.tensor([5, 3, 8, 1, 9, 2, 6, 7])
    together = model.draw_mask(raw, index, validation=False)[0]
    alone = [model.draw_mask(raw[:1], index[i : i + 1], validation=False)[0] for i in range(8)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("img_size", [32, [32, 48]])
def test_any_channels_and_rectangles(in_chans: int, img_size: int | list[int]) -> None:
    model = tiny(in_chans=in_chans, img_size=img_size)
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


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lightnings_precisions(tmp_path: Path, precision: Any) -> None:
    run = trainer(tmp_path, precision=precision, enable_checkpointing=False)
    run.fit(tiny(), loader())
    assert run.callback_metrics["train/loss"].isfinite()


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


def test_a_stored_ten_step_loss_curve(tmp_path: Path) -> None:
    losses = _losses(tmp_path, tiny(warmup_epochs=1, base_lr=0.1), max_epochs=5)
    expected = STORED_LOSSES
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-4, atol=0)
    assert losses[-1] < losses[0]


# torch 2.15 on an x86-64 CPU; equal under refactoring, and near enough elsewhere.
STORED_LOSSES = [
    *(1.193709, 1.197067, 1.175423, 1.152627, 1.143347),
    *(1.119016, 1.132178, 1.119404, 1.123113, 1.114416),
]


def _losses(folder: Path, model: SimMIM, **kwargs: Any) -> list[float]:
    losses = []

    class Keep(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            losses.append(float(args[2]["loss"]))

    torch.manual_seed(0)
    trainer(folder, callbacks=[Keep()], enable_checkpointing=False, **kwargs).fit(model, loader())
    return losses


@pytest.mark.parametrize(
    "wrap",
    [lambda x: (x, torch.zeros(len(x))), lambda x: (x,), lambda x: x],
    ids=["images and labels", "a tuple of images", "images"],
)
def test_plain_loaders_are_taken_too(tmp_path: Path, wrap: Callable[[Tensor], Any]) -> None:
    images = torch.randn(8, 3, 32, 32)
    data = DataLoader(images if wrap(images) is images else TensorDataset(*wrap(images)), 4)
    trainer(tmp_path, enable_checkpointing=False).fit(tiny(), data)


def test_learning_rates_by_hand(tmp_path: Path) -> None:
    rates: list[float] = []

    class Keep(L.Callback):
        def on_train_batch_start(self, run: L.Trainer, *args: Any) -> None:
            rates.append(run.optimizers[0].param_groups[0]["lr"])

    model = tiny(base_lr=5.12, warmup_epochs=1, warmup_lr=0.512, min_lr=1.024)
    run = trainer(tmp_path, callbacks=[Keep()], enable_checkpointing=False, max_epochs=4)
    run.fit(model, loader())
    # A global batch of 4: lr 5.12 x 4 / 512 = 0.04, from 0.004 to 0.008; 8 steps, 2 of warm-up.
    cosine = [0.008 + 0.5 * (0.04 - 0.008) * (1 + math.cos(math.pi * t / 8)) for t in range(2, 8)]
    assert rates == pytest.approx([0.004, 0.022, *cosine])


def test_accumulation_counts_in_the_global_batch(tmp_path: Path) -> None:
    model = tiny(base_lr=5.12, warmup_epochs=0)
    run = trainer(tmp_path, accumulate_grad_batches=2, enable_checkpointing=False)
    run.fit(model, loader())
    assert run.optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(0.08)


def test_weight_decay_and_dropout_are_options(tmp_path: Path) -> None:
    model = tiny(weight_decay=0.3, drop_rate=0.5, drop_path_rate=0.2).train()
    images, mask, _ = draw(model)
    assert not torch.equal(model(images, mask), model(images, mask))
    run = trainer(tmp_path, enable_checkpointing=False)
    run.fit(model, loader())
    assert {group["weight_decay"] for group in run.optimizers[0].param_groups} == {0.0, 0.3}


def test_a_new_head_trains_alone_on_loaded_weights_at_first(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(tiny(), loader())
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    model = tiny(weights=str(path), head="mlp", warmup_epochs=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    class Compare(L.Callback):
        def on_train_batch_end(self, run: L.Trainer, model: L.LightningModule, *_: Any) -> None:
            moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            encoder = {n for n in moved if n.startswith("encoder.model.")}
            assert bool(encoder) == (run.global_step > 2)  # 5 % of 40 steps
            assert any(n.startswith("head.") for n in moved)

    trainer(tmp_path, max_epochs=20, callbacks=[Compare()], enable_checkpointing=False).fit(
        model, loader()
    )


def test_a_new_head_trains_alone_after_an_interruption_too(tmp_path: Path) -> None:
    def fit(name: str, stop: int, ckpt: str | None = None, **kwargs: Any) -> SimMIM:
        torch.manual_seed(0)
        model = tiny(head="mlp", warmup_epochs=0, **kwargs)
        run = trainer(tmp_path / name, max_epochs=40, enable_checkpointing=False)
        stopper = L.pytorch.callbacks.LambdaCallback(
            on_train_epoch_end=lambda run, _: setattr(
                run, "should_stop", run.current_epoch + 1 >= stop
            )
        )
        run.callbacks.append(stopper)
        run.fit(model, loader(), ckpt_path=ckpt)
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
        return model

    run = trainer(tmp_path)
    run.fit(tiny(), loader())
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    whole = fit("whole", 3, weights=str(path))  # alone for 4 of 80 steps, of which this makes 6
    half = fit("half", 1, weights=str(path))
    rest = fit("rest", 3, str(tmp_path / "half.ckpt"))  # as a run goes on: without the weights
    begun = tiny(head="mlp", weights=str(path)).encoder.model.state_dict()
    for name, a in half.encoder.model.state_dict().items():
        assert torch.equal(a, begun[name]), name
    for (name, a), b in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.load(tmp_path / "rest.ckpt", weights_only=True)["loaded"]


@pytest.mark.parametrize(("ratio", "is_zero"), [(0.0, True), (1.0, False)])
def test_validation_where_nothing_or_everything_is_hidden(
    tmp_path: Path, ratio: float, is_zero: bool
) -> None:
    run = trainer(tmp_path, enable_checkpointing=False)
    (found,) = run.validate(tiny(mask_ratio=ratio), loader(), verbose=False)
    assert math.isfinite(found["val/loss"])
    assert (found["val/loss"] == 0) == is_zero


# Checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD])
def test_a_checkpoint_opens_safely_and_whole(tmp_path: Path, optimizer: Any) -> None:
    model = tiny(**({"optimizer": optimizer} if optimizer else {}))
    model.set_statistics([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    run = trainer(tmp_path)
    run.fit(model, loader())
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    assert torch.load(path, weights_only=True)["state_dict"]
    again = SimMIM.load_from_checkpoint(path)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    rebuilt = again.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(rebuilt) is (optimizer or torch.optim.AdamW)


def test_weights_bring_their_pixel_statistics(tmp_path: Path) -> None:
    model = tiny()
    model.set_statistics([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    run = trainer(tmp_path)
    run.fit(model, loader())
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    onward = tiny(weights=str(path), head="mlp")
    assert torch.equal(onward.mean, model.mean)
    assert torch.equal(onward.std, model.std)
    (found,) = run.validate(tiny(weights=str(path)), loader(), verbose=False)
    (expected,) = run.validate(model, loader(), verbose=False)
    assert found["val/loss"] == pytest.approx(expected["val/loss"], abs=1e-6)


def test_going_on_at_an_epochs_end_is_bitwise_the_same(tmp_path: Path) -> None:
    def fit(folder: Path, epochs: int, stop: int, ckpt: str | None = None) -> SimMIM:
        class Stop(L.Callback):
            def on_train_epoch_end(self, run: L.Trainer, module: L.LightningModule) -> None:
                run.should_stop = run.current_epoch + 1 >= stop

        torch.manual_seed(0)
        model = tiny(drop_rate=0.1, drop_path_rate=0.1, warmup_epochs=1)
        run = trainer(folder, max_epochs=epochs, callbacks=[Stop()], enable_checkpointing=False)
        run.fit(model, loader(), ckpt_path=ckpt)
        run.save_checkpoint(folder / "end.ckpt")
        return model

    whole = fit(tmp_path / "whole", 4, 4)
    fit(tmp_path / "half", 4, 2)
    rest = fit(tmp_path / "rest", 4, 4, str(tmp_path / "half" / "end.ckpt"))
    for (name, a), b in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("ratio", [0, 0.0, [0.0, 0.0]])
def test_a_training_that_hides_nothing_is_refused(ratio: Any) -> None:
    fit = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"hides nothing, .*: use 0.6"):
        fit.fit(tiny(mask_ratio=ratio), [torch.zeros(2, 3, 32, 32)])
