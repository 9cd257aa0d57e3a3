"""The step is quick for the right reasons: kernels are the quick ones, and compiled once."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partialmethod
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jaxtyping import config
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW
from torch.overrides import TorchFunctionMode

from simmim import ImageFolderData, SimMIM
from simmim.callbacks import CollapseAlarm
from simmim.commands.benchmark.step import _precisions
from simmim.loss import take_hidden
from simmim.masking import upsample_mask
from simmim.training import kernels as speed
from simmim.training.kernels import choose_attention
from support import beyond
from support.small import SHARED_BIAS, SWIN, VIT, noise_loader
from support.training import quiet_trainer

ENCODERS = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "beit": ("beit_base_patch16_224", {**VIT, **SHARED_BIAS, "global_pool": ""}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16), "patch_size": 2}),
}
SKIP = {"hidden_tokens": "skip", "head": "transformer", "head_kwargs": {"width": 32}}
SKIPPING = {  # a feature of Swin's is 8 px there, as is a cell
    "vit": ("vit_tiny_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "patch_size": 4}),
}


def make_model(kind: str = "vit", **options: Any) -> SimMIM:
    name, kwargs = (SKIPPING if "hidden_tokens" in options else ENCODERS)[kind]
    size, cell = (64, 32) if kind == "convnext" else (32, 8)  # its features have a stride of 32
    return SimMIM(name, size, mask_patch_size=cell, encoder_kwargs=kwargs, **options)


def fit(
    model: SimMIM,
    *callbacks: L.Callback,
    images: int = 8,
    val: int = 0,
    data: L.LightningDataModule | None = None,
    **options: Any,
) -> L.Trainer:
    trainer, size = quiet_trainer(None, *callbacks, **options), model.encoder.img_size[0]
    validation = noise_loader(val, size) if val else None
    given = (data,) if data else (noise_loader(images, size), validation)
    trainer.fit(model, *given)
    return trainer


# Compiled once --------------------------------------------------------------------------------


@pytest.fixture
def _without_shape_checks() -> Iterator[None]:
    """They are the tests' own, and no part of what is compiled."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


class Graphs(L.Callback):
    def __init__(self) -> None:
        self.after: list[int] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.after.append(counters["stats"]["unique_graphs"])

    def on_train_end(self, *_: Any) -> None:
        self.after.append(counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.usefixtures("_without_shape_checks")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
@pytest.mark.parametrize(
    ("kind", "options"),
    beyond(
        2,
        [
            ("vit", {}),
            ("convnext", {"mask_fill": "mean", "mask_stage": 3, "fourier_weight": 0.5}),
            *product([kind for kind in ENCODERS if kind != "vit"], [{}]),
            *product(SKIPPING, [SKIP]),
            *product(
                ["vit", "swin", "convnext"], [{"grad_checkpointing": True, "drop_path_rate": 0.1}]
            ),
            ("swin", {**SKIP, "grad_checkpointing": True}),
            ("vit", {"mask_ratio": [0.4, 0.6], "mask_fill": "noise", "head": "mlp"}),
            ("vit", {"head": "inverse", "head_kwargs": {"depths": [1, 2], "width": 32}}),
        ],
    ),
    ids=str,
)
def test_it_compiles_without_a_break_and_not_again_after_the_first_epoch(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and validation, smaller last batches, and looks at the model between them."""
    backend = partialmethod(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", backend)
    torch._dynamo.reset()
    counters.clear()
    model, graphs = make_model(kind, compile=True, **options), Graphs()
    keys = list(model.state_dict())
    fit(model, CollapseAlarm(4), graphs, images=10, val=6, max_epochs=3)
    assert not counters["graph_break"]
    assert graphs.after[0] > 0 or graphs.after[1] > 0
    assert graphs.after[1:] == [graphs.after[1]] * 3
    assert list(model.state_dict()) == keys  # a checkpoint of it is like any other


@pytest.mark.exhaustive
@pytest.mark.usefixtures("_without_shape_checks")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_it_learns_the_same() -> None:
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        trainer = fit(make_model(compile=compiled), images=16)
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# Head and loss on hidden cells ----------------------------------------------------------------


def test_hidden_cells_are_taken_in_their_order() -> None:
    mask = torch.rand(3, 2, 4).argsort(1).flatten(1).argsort(1).view(3, 2, 4) < 3
    maps = torch.randn(3, 5, 8, 16)
    taken = take_hidden(maps, mask, 3)
    assert taken.shape == (3, 5, 12, 4)
    for i in range(3):
        cells = [maps[i, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] for y, x in mask[i].nonzero()]
        assert torch.equal(taken[i], torch.cat(cells, 1))
    hidden = upsample_mask(mask, (8, 16))
    assert taken.sum() == pytest.approx(float((maps * hidden).sum()), abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *product(ENCODERS, [{}]),
        (
            "vit",
            {"head": "mlp", "masking": "block", "loss": "l2", "target": "normalized_pixels"},
        ),
        ("vit", {"target": "color_bins", "loss": "cross_entropy"}),
        ("swin", {"target": "patch_normalized_pixels", "target_kwargs": {"patch_size": 4}}),
    ],
    ids=str,
)
def test_the_loss_of_hidden_cells_alone_is_the_loss(kind: str, options: dict[str, Any]) -> None:
    model = make_model(kind, **options)
    images = torch.randn(3, 3, *model.encoder.img_size)
    mask, keys = model.draw_mask(images, torch.arange(3), validation=True)
    found = []
    for count in (None, model.hidden_count):
        model.zero_grad()
        loss, _ = model.loss_of(images, mask, keys, count)
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters() if p.grad is not None]))
    assert model.hidden_count == {4: 3, 16: 10}[mask[0].numel()]  # ceil(0.6 x cells)
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-6)
    for whole, alone in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(whole, alone, atol=1e-5 * float(whole.abs().max()) + 1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"masking": "foreground"},
        {"mask_ratio": [0.4, 0.6]},
        {"mask_ratio": 0.0},
        {"loss_region": "all"},
        {"fourier_weight": 0.1},
        {"head": "transformer", "head_kwargs": {"width": 32, "num_heads": 2}},
        {"target_kwargs": {"size": 4}},  # coarser than the features
    ],
    ids=str,
)
def test_head_and_loss_see_the_whole_map_where_they_need_it(options: dict[str, Any]) -> None:
    assert not make_model(**options)._hidden_alone


# Kernels --------------------------------------------------------------------------------------


ATTENTION = {  # with the number of layers
    **{kind: (*ENCODERS[kind], 2) for kind in ("vit", "beit")},
    **{kind: (*ENCODERS[kind], 4) for kind in ("swin", "swinv2")},
    "eva": ("eva02_tiny_patch14_224", VIT, 2),
    "dinov3": ("vit_small_patch16_dinov3", VIT, 2),
}


class Kernels(TorchFunctionMode):
    """Counts the calls of torch's attention."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "head", "precision"),
    [
        *product(ATTENTION, ["linear"], ["32-true"]),
        *product(["vit"], ["transformer", "inverse"], ["32-true"]),
        *product(["vit", "swinv2"], ["linear"], ["bf16-mixed"]),
        ("vit", "inverse", "bf16-mixed"),
    ],
)
def test_attention_is_fused_where_that_is_quicker(kind: str, head: str, precision: str) -> None:
    """In every layer of the encoder, and of the head."""
    name, kwargs, layers = ATTENTION[kind]
    width = {} if head == "linear" else {"width": 64}
    options = {"encoder_kwargs": kwargs, "head": head, "head_kwargs": width}
    model = SimMIM(name, 32, mask_patch_size=8, **options)
    fit(model, images=4, precision=precision)
    with Kernels() as kernels:
        model(torch.randn(2, 3, 32, 32))
    layers += {"linear": 0, "transformer": 1, "inverse": 2 + 6 + 2 + 2}[head]
    assert kernels.calls == (layers if precision == "32-true" else 0)


@pytest.mark.parametrize("kind", ATTENTION)
def test_all_attention_kernels_compute_the_same(kind: str) -> None:
    name, kwargs, _ = ATTENTION[kind]
    model = SimMIM(name, 32, mask_patch_size=8, encoder_kwargs=kwargs).eval()
    for parameter in model.encoder.parameters():  # biases of positions begin near 0
        parameter.data += 0.1 * torch.randn(parameter.shape)
    copy, images, found = deepcopy(model), torch.randn(2, 3, 32, 32), []
    for one, fused in ((copy, False), (model, True)):
        choose_attention(one, fused)
        features = one.encoder(images)
        features.sin().sum().backward()
        found.append([features.detach(), *(p.grad for p in one.parameters() if p.grad is not None)])
    assert model.state_dict().keys() == copy.state_dict().keys()
    for ours, timms in zip(*found, strict=True):
        torch.testing.assert_close(ours, timms, rtol=1e-4, atol=1e-4 * float(timms.abs().max()))


def test_a_user_can_turn_fused_attention_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 0)  # TIMM_FUSED_ATTN=0
    model = make_model()
    choose_attention(model, fused=True)
    with Kernels() as kernels:
        model(torch.randn(2, 3, 32, 32))
    assert kernels.calls == 0


def test_a_shared_bias_is_one_attention_mask_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    attention = nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Tensor, **kwargs: Any) -> Tensor:
        seen.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    model = make_model("beit")
    monkeypatch.setattr("timm.models.beit.F.scaled_dot_product_attention", spy)
    model.encoder(torch.randn(2, 3, 32, 32))
    assert len(seen) == VIT["depth"]
    assert all(mask is seen[0] for mask in seen)


@pytest.mark.parametrize("options", [{}, {"mask_fill": "mean", "mask_stage": 3}], ids=str)
def test_convolutions_have_channels_last(
    tmp_path: Path, make_images: Callable[..., Path], options: dict[str, Any]
) -> None:
    """The first one's weights turn the images round; behind it no layout is changed."""
    make_images(tmp_path / "images", 8, 64)
    data = ImageFolderData(str(tmp_path), img_size=64, batch_size=4, num_workers=0)
    model = make_model("convnext", **options)
    seen: list[tuple[bool, bool]] = []

    def note(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        taken, given = (x.is_contiguous(memory_format=torch.channels_last) for x in (*args, output))
        seen.append((taken, given))

    layers = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(note)
    fit(model, data=data, limit_train_batches=1, limit_val_batches=0, num_sanity_val_steps=0)
    assert model.encoder.is_convolutional
    assert [given for _, given in seen] == [True] * len(layers)
    assert [taken for taken, _ in seen[1:]] == [True] * (len(layers) - 1)
    assert not make_model("vit").encoder.is_convolutional


def test_the_optimiser_is_fused_unless_the_user_decides() -> None:
    assert fit(make_model(), images=4).optimizers[0].defaults["fused"]
    own = fit(make_model(optimizer=lambda groups: AdamW(groups, fused=False)), images=4)
    assert own.optimizers[0].defaults["fused"] is False
    momentum = fit(make_model(optimizer=lambda groups: SGD(groups, momentum=0.9)), images=4)
    assert isinstance(momentum.optimizers[0], SGD)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_a_fused_optimiser_clips_in_mixed_precision(precision: Any) -> None:
    """And does what the other does. Lightning knows no fp16 on CPUs: torch does."""
    weights = []
    for optimizer in (AdamW, lambda groups: AdamW(groups, fused=False)):
        torch.manual_seed(0)
        model = make_model(optimizer=optimizer, base_lr=0.1, warmup_epochs=0)
        plugin = MixedPrecision(precision, "cpu")
        trainer = fit(model, images=12, precision=None, plugins=plugin, gradient_clip_val=0.01)
        (group, *_) = trainer.optimizers[0].param_groups
        assert group["fused"] is (optimizer is AdamW)
        assert trainer.global_step == 3
        weights.append([p.detach() for p in model.parameters()])
    for fused, plain in zip(*weights, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_recomputing_activations_saves_memory_and_changes_nothing() -> None:
    from simmim.commands.benchmark.step_timer import peak_bytes

    images, mask = torch.randn(8, 3, 32, 32), torch.ones(8, 4, 4, dtype=torch.bool)
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = make_model(grad_checkpointing=recompute)

        def passes(model: SimMIM = model) -> None:
            model.loss_of(images, mask, torch.arange(8))[0].backward()

        peak = peak_bytes(passes, torch.device("cpu"), before=0)
        found.append((peak, [p.grad for p in model.parameters()]))
    assert found[1][0] < 0.8 * found[0][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_bf16_is_measured_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (True, False):
        capabilities = {"avx512_bf16": able, "avx2": True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        assert speed.multiplies_bf16() == able
        chosen = ["32-true", "bf16-mixed"] if able else ["32-true"]
        assert _precisions(torch.device("cpu")) == chosen
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch, which knows x86
    for avx512_bf16, avx2, able in ((True, True, True), (False, True, False), (False, False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda v=avx512_bf16: v)
        monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda v=avx2: v)
        assert speed.multiplies_bf16() is able  # the last is an Arm


def test_bf16_on_a_processor_without_it_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "multiplies_bf16", lambda: False)
    with pytest.warns(UserWarning, match="use --trainer.precision 32-true"):
        fit(make_model(), images=4, precision="bf16-mixed")
    fit(make_model(), images=4)  # no warning: it would be an error
