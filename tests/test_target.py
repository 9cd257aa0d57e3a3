"""Targets: against independent statements, at borders and on constants, and back to pictures."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simmim.loss import LOSSES
from simmim.target import TARGETS, Target
from simmim.testing import check_target

MEAN, STD = (0.485, 0.456, 0.406, 0.3), (0.229, 0.224, 0.225, 0.25)
TEACHER = {"teacher": "test_vit", "pretrained": False}
OPTIONS: dict[str, dict[str, Any]] = {"features": TEACHER}


def make(
    name: str, img_size: tuple[int, int] = (32, 48), in_chans: int = 3, **options: Any
) -> Target:
    return TARGETS[name](
        in_chans=in_chans, img_size=img_size, mean=MEAN[:in_chans], std=STD[:in_chans], **options
    )


def photo(size: tuple[int, int] = (32, 48), in_chans: int = 3, batch: int = 2) -> Tensor:
    """Normalised images with structure at all scales, from 0 to 1 before."""
    noise = [
        F.interpolate(torch.randn(batch, in_chans, n, n), size, mode="bilinear") for n in (2, 7, 30)
    ]
    raw = torch.sigmoid(torch.stack(noise).sum(0))
    return normalize(raw)


def normalize(raw: Tensor) -> Tensor:
    mean, std = (torch.tensor(x[: raw.shape[1]]).view(1, -1, 1, 1) for x in (MEAN, STD))
    return (raw - mean) / std


# All of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_each_target_holds_to_what_a_users_own_must(name: str) -> None:
    for in_chans in (1, 3, 4):
        check_target(TARGETS[name], in_chans=in_chans, **OPTIONS.get(name, {}))
    assert set(make(name, **OPTIONS.get(name, {})).state_dict()) <= {"mean", "std"}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_and_pictures_under_autocast(name: str) -> None:
    target, images = make(name, **OPTIONS.get(name, {})), photo()
    element = target(images)
    prediction = torch.randn(2, target.out_chans, *element.shape[2:]).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = target(images)
        shown = target.to_pixels(prediction, images)
        shown = target.picture(prediction, element) if shown is None else shown
    assert shown.dtype == torch.float32
    if name == "features":  # the teacher computes in bfloat16
        torch.testing.assert_close(ours, element, atol=0.1, rtol=0.1)
    else:
        assert torch.equal(ours, element)
        # `--trainer.precision bf16-true`
        assert target(images.bfloat16()).dtype == ours.dtype


# Pixels ------------------------------------------------------------------------------------------


def test_pixels_are_the_images() -> None:
    images = photo()
    target = make("pixels")
    assert torch.equal(target(images), images)
    assert torch.equal(target.to_pixels(images, images), images)
    assert (target.out_chans, target.stride, target.losses[0]) == (3, 1, "l1")


@pytest.mark.parametrize("size", [[16, 24], [2, 3]])
def test_lower_resolution_is_the_mean_of_what_an_element_covers(size: list[int]) -> None:
    images, target = photo().requires_grad_(), make("pixels", size=size)
    stride = 32 // size[0]
    assert target.stride == stride
    element = target(images)
    blocks = images.detach().numpy().reshape(2, 3, size[0], stride, size[1], stride)
    np.testing.assert_allclose(element.detach().numpy(), blocks.mean((3, 5)), atol=1e-6)
    shown = target.to_pixels(element, images)
    assert shown is not None
    assert torch.equal(shown[:, :, ::stride, ::stride], element)
    torch.testing.assert_close(target(shown), element)  # shown as it is: nothing added
    (gradient,) = torch.autograd.grad(element[0, 0, 1, 1], images)  # of its own pixels alone
    assert gradient[0, 0, stride : 2 * stride, stride : 2 * stride].ne(0).all()
    assert gradient.ne(0).sum() == stride**2


# Sliding window ----------------------------------------------------------------------------------


def brute_force(images: Tensor, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the window around each pixel, one after the other, in float64."""
    array, reach = images.double().numpy(), window // 2
    mean, deviation = np.empty_like(array), np.empty_like(array)
    for b, c, y, x in np.ndindex(array.shape):
        rows = slice(max(y - reach, 0), y + reach + 1)
        columns = slice(max(x - reach, 0), x + reach + 1)
        inside = array[b, c, rows, columns]
        mean[b, c, y, x] = inside.mean()
        deviation[b, c, y, x] = np.sqrt(inside.var(ddof=1) + 1e-6)
    return mean, deviation


@pytest.mark.parametrize(("window", "size"), [(3, (7, 9)), (9, (5, 14)), (47, (24, 60))])
def test_normalized_pixels_by_brute_force(window: int, size: tuple[int, int]) -> None:
    images = photo(size, in_chans=1, batch=1)
    mean, deviation = brute_force(images, window)
    ours = make("normalized_pixels", size, in_chans=1, window=window)(images)
    np.testing.assert_allclose(ours.numpy(), (images.numpy() - mean) / deviation, atol=2e-5)


def official(images: Tensor, window: int = 47) -> Tensor:
    """SwinV2's `norm_targets`, worded anew: one pooling over the whole window."""

    def pool(x: Tensor, include: bool) -> Tensor:
        return F.avg_pool2d(x, window, 1, window // 2, count_include_pad=include)

    count = pool(torch.ones_like(images), include=True) * window**2
    mean = pool(images, include=False)
    variance = (pool(images**2, include=False) - mean**2) * count / (count - 1)
    return (images - mean) / (variance.clamp(min=0) + 1e-6).sqrt()


def test_normalized_pixels_are_the_official_ones() -> None:
    images = photo((48, 80))
    ours = make("normalized_pixels", (48, 80))(images)
    torch.testing.assert_close(ours.double(), official(images.double()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, official(images), atol=1e-4, rtol=1e-4)


def test_flat_images_are_zero() -> None:
    """In float32 the official formula makes noise of 0.02 of a black image."""
    for value in (-2.1179, 0.0, 2.64):
        images = torch.full((1, 3, 96, 96), value)
        assert make("normalized_pixels", (96, 96))(images).abs().amax() < 1e-3
        assert make("patch_normalized_pixels", (96, 96))(images).abs().amax() < 1e-3
        # Of HOG, rounding errors would be scaled up to vectors of length 1.
        assert make("hog", (96, 96))(images).eq(0).all()


def test_a_flat_part_of_an_image_stays_flat() -> None:
    images = photo((96, 96))
    images[..., :70] = -2.1179
    ours = make("normalized_pixels", (96, 96))(images)
    assert ours[..., : 70 - 24].abs().amax() < 2e-3
    torch.testing.assert_close(ours.double(), official(images.double()), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["normalized_pixels", "patch_normalized_pixels"])
def test_brightness_and_contrast_are_left_out_and_put_back(name: str) -> None:
    images, target = photo(), make(name)
    torch.testing.assert_close(target(3 * images + 2), target(images), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(target.to_pixels(target(images), images), images)


@pytest.mark.parametrize("name", ["normalized_pixels", "patch_normalized_pixels"])
def test_a_prediction_of_nothing_is_shown_as_the_local_mean(name: str) -> None:
    images, target = photo(), make(name, **{"patch_size": 8} if "patch" in name else {"window": 5})
    shown = target.to_pixels(torch.zeros_like(images), images)
    if "patch" in name:
        expected = F.avg_pool2d(images.mean(1, keepdim=True), 8)
        expected = expected.repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(images)
    else:
        expected = torch.from_numpy(brute_force(images, 5)[0]).float()
    torch.testing.assert_close(shown, expected)


# Patches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "in_chans"), [(16, 3), (4, 4)])
def test_patch_normalized_pixels_are_maes(patch: int, in_chans: int) -> None:
    images = photo(in_chans=in_chans)
    p, c, h, w = patch, in_chans, 32 // patch, 48 // patch
    patches = images.double().reshape(2, c, h, p, w, p)
    patches = torch.einsum("nchpwq->nhwpqc", patches).reshape(2, h * w, p * p * c)
    normed = (patches - patches.mean(-1, keepdim=True)) / (
        patches.var(-1, keepdim=True) + 1e-6
    ).sqrt()
    expected = torch.einsum("nhwpqc->nchpwq", normed.reshape(2, h, w, p, p, c))
    ours = make("patch_normalized_pixels", in_chans=in_chans, patch_size=patch)(images)
    torch.testing.assert_close(ours.double(), expected.reshape(images.shape), atol=1e-5, rtol=1e-5)


# HOG ---------------------------------------------------------------------------------------------


def published_hog(images: Tensor, bins: int = 9, cell: int = 8) -> Tensor:
    """MaskFeat's, in float64 and a loop over pixels."""
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=torch.float64)
    b, c, height, width = images.shape
    padded = F.pad(images.double(), (1, 1, 1, 1), mode="reflect").reshape(b * c, 1, height + 2, -1)
    gx, gy = (F.conv2d(padded, k[None, None]).view(images.shape) for k in (sobel, sobel.T))
    out = np.zeros((b, c, bins, height // cell, width // cell))
    for n, k, y, x in np.ndindex(images.shape):
        gradient = complex(gy[n, k, y, x], gx[n, k, y, x])
        which = int(np.floor(np.angle(gradient) / np.pi * bins)) % bins
        out[n, k, which, y // cell, x // cell] += abs(gradient)
    out /= np.maximum(np.linalg.norm(out, axis=2, keepdims=True), 1e-12)
    return torch.from_numpy(out).flatten(1, 2)


@pytest.mark.parametrize(("cell", "bins", "in_chans"), [(8, 9, 3), (4, 6, 1)])
def test_hog_is_the_published_one(cell: int, bins: int, in_chans: int) -> None:
    images = torch.randn(2, in_chans, 24, 32)  # no gradient lies on the border of two bins
    ours = make("hog", (24, 32), in_chans=in_chans, cell=cell, bins=bins)(images)
    torch.testing.assert_close(
        ours.double(), published_hog(images, bins, cell), atol=1e-5, rtol=1e-5
    )


def test_hog_of_a_ramp_by_hand() -> None:
    """Brightness a right and b down: Sobel gives (-8 a, -8 b), and each cell one full bin."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    for across, down, bin_ in ((1.0, 0.2, 3), (1.0, -0.2, 5), (0.2, 1.0, 0), (-0.2, 1.0, 8)):
        # atan2(across, down) in half turns: 0.437, 0.563, 0.063 and 0.937, of which each bin is 1/9
        histogram = make("hog", (24, 24), in_chans=1)((across * x + down * y)[None, None])
        assert histogram[0, :, 1, 1].tolist() == pytest.approx([float(k == bin_) for k in range(9)])


def test_hog_has_length_one_and_no_memory_of_the_normalisation() -> None:
    images, target = photo(), make("hog")
    ours = target(images)
    length = ours.unflatten(1, (3, 9)).norm(dim=2)
    torch.testing.assert_close(length, torch.ones_like(length))
    assert ours.amin() >= 0
    torch.testing.assert_close(target(4 * images), ours)  # a power of two: no bin can change
    assert (target(1.7 * images + 0.3) - ours).abs().mean() < 1e-3


def test_hog_of_edges_and_its_stars() -> None:
    """An upright edge falls into the middle bin, and its star is an upright line."""
    upright = torch.zeros(1, 1, 16, 16)
    upright[..., 4:] = 1
    target = make("hog", (16, 16), in_chans=1)
    histogram = target(upright)[0, :, :, 0]
    assert histogram[4].eq(1).all()
    assert histogram.sum() == 2
    star = target.picture(target(upright))[0, 0, :8, :8]
    assert star[:, 3:5].amin() > 0.3
    assert star[:, :2].amax() == 0
    lying = target.picture(target(upright.mT))[0, 0, :8, :8]
    assert lying[3:5].sum() > 0.8 * lying.sum()
    assert target.picture(target(upright))[..., 8:].eq(0).all()


def test_hog_of_a_slope_is_drawn_along_its_edges() -> None:
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    target = make("hog", (16, 16), in_chans=1)
    # Brightness grows towards lower right: the edges run from lower left to upper right.
    star = target.picture(target((x + 1.3 * y)[None, None]))[0, 0, :8, :8]
    assert star.fliplr().diagonal().mean() > 3 * star.diagonal().mean()


def test_hog_of_a_mirrored_image_is_mirrored() -> None:
    images, target = torch.randn(1, 1, 32, 48), make("hog", in_chans=1)
    ours, mirrored = target(images), target(images.flip(3))
    # At the reflected border, edges are exactly level: on the line between the first and last bin.
    torch.testing.assert_close(mirrored[..., 1:-1], ours.flip(3).flip(1)[..., 1:-1])


# Features ----------------------------------------------------------------------------------------


def teacher_features(images: Tensor, model: nn.Module, mean: float, std: float) -> Tensor:
    raw = images * torch.tensor(STD[:3]).view(1, 3, 1, 1) + torch.tensor(MEAN[:3]).view(1, 3, 1, 1)
    tokens = model.eval().forward_features((raw - mean) / std)[:, 1:]  # type: ignore[operator]
    return tokens.detach().transpose(1, 2).unflatten(2, (2, 3))


def test_features_are_the_teachers_own_in_its_own_normalisation() -> None:
    images, target = photo(), make("features", **TEACHER, normalize=False)
    expected = teacher_features(images, target.teacher, 0.5, 0.5)  # type: ignore[arg-type]
    torch.testing.assert_close(target(images), expected)
    normed = make("features", **TEACHER)(images)
    torch.testing.assert_close(
        normed, F.layer_norm(expected.movedim(1, -1), (64,)).movedim(-1, 1), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(normed.mean(1), torch.zeros(2, 2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(1, correction=0), torch.ones(2, 2, 3), atol=1e-3, rtol=0)


def test_the_teacher_stays_frozen_whatever_happens_to_the_model() -> None:
    target = make("features", (64, 64), teacher="test_resnet", pretrained=False)
    model, images = nn.Sequential(nn.Conv2d(3, 3, 1), target), photo((64, 64)).requires_grad_()
    before = target(images)
    model.train().requires_grad_(True)
    after = model[1](images)
    assert torch.equal(after, before)  # no batch statistics, and none were updated
    assert not after.requires_grad
    teacher: Any = target.teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert len(list(model.parameters())) == 2
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.mean", "1.std"}
    assert set(map(type, model.modules())) == {nn.Sequential, nn.Conv2d, type(target)}


def test_a_random_teacher_is_the_same_in_each_process_and_disturbs_no_draw() -> None:
    images = photo()
    torch.manual_seed(1)
    target, draw = make("features", **TEACHER), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(draw, torch.rand(1))
    torch.manual_seed(2)
    assert torch.equal(make("features", **TEACHER)(images), target(images))
    twin = copy.deepcopy(target)
    assert twin.teacher is not target.teacher
    assert torch.equal(twin(images), target(images))


def test_the_statistics_of_the_data_reach_the_teacher() -> None:
    target, images = make("features", **TEACHER), photo()
    expected = target(images)
    target.mean.add_(0.1)
    torch.testing.assert_close(target(images - 0.1 / target.std), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("teacher", "size", "stride", "options"),
    [
        ("test_vit", (64, 48), 16, {}),
        pytest.param("swin_tiny_patch4_window7_224", (224, 224), 32, {}, marks=pytest.mark.slow),
        ("test_resnet", (64, 96), 32, {}),
        ("test_convnext", (64, 32), 32, {}),
        ("test_vit", (64, 32), 8, {"size": [128, 64]}),
        pytest.param(
            "vit_small_patch14_dinov2", (224, 224), 16, {"size": 196}, marks=pytest.mark.slow
        ),
    ],
)
def test_teachers_of_every_kind(
    teacher: str, size: tuple[int, int], stride: int, options: dict[str, Any]
) -> None:
    target = make("features", size, teacher=teacher, pretrained=False, **options)
    assert target.stride == stride
    assert target(photo(size, batch=1)).shape[1:] == (
        target.out_chans,
        size[0] // stride,
        size[1] // stride,
    )


@pytest.mark.parametrize("kind", ["pth", "safetensors", "folder"])
def test_weights_of_a_teacher_from_a_local_file(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(3)
    model = timm.create_model("test_vit", img_size=(32, 48))  # with its classifier
    state = model.state_dict()
    if kind == "pth":
        torch.save({"model": state}, path := tmp_path / "teacher.pth")
    else:
        from safetensors.torch import save_file

        save_file(state, path := tmp_path / "model.safetensors")
    path = tmp_path if kind == "folder" else path
    target = make("features", **TEACHER | {"weights": str(path)}, normalize=False)
    images = photo()
    torch.testing.assert_close(target(images), teacher_features(images, model, 0.5, 0.5))


def test_pictures_of_features_share_one_projection() -> None:
    target = make("features", (64, 64), **TEACHER)
    element = target(photo((64, 64)))
    truth = target.picture(element)
    assert torch.equal(target.picture(element, element), truth)
    close = element + 1e-3 * torch.randn_like(element)
    torch.testing.assert_close(target.picture(close, element), truth, atol=0.01, rtol=0)
    gray = element.mean((0, 2, 3), keepdim=True).expand_as(element)  # the mean has no colour
    torch.testing.assert_close(
        target.picture(gray, element), torch.full_like(truth, 0.5), atol=1e-4, rtol=0
    )
    assert truth.std((0, 2, 3)).amin() > 0.1


def test_a_teacher_that_cannot_be_downloaded_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_hub(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect to the hub. Check your connection.\nSecond line")

    monkeypatch.setattr(timm, "create_model", no_hub)
    with pytest.raises(
        ValueError, match=r"cannot be had \(We couldn't connect to the hub\): name"
    ) as e:
        make("features", teacher="test_vit")
    assert "\n" not in str(e.value)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", img_size=(32, 48)).state_dict()
    lacking = {name: value for name, value in state.items() if "blocks.3" not in name}
    torch.save(lacking, tmp_path / "lacking.pth")
    with pytest.raises(ValueError, match=r"they lack blocks\.3\.attn"):
        make("features", **TEACHER | {"weights": str(tmp_path / "lacking.pth")})
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth|cannot be had"):
        make("features", **TEACHER | {"weights": str(tmp_path / "other.pth")})


# Colour bins -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bins", "values_a_bin"), [(256, 1), (8, 32), (2, 128)])
def test_bins_share_the_256_values_of_an_image_equally(bins: int, values_a_bin: int) -> None:
    values = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    ours = make("color_bins", (16, 16), bins=bins)(normalize(values / 255))
    assert torch.equal(ours, values // values_a_bin)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_a_certain_prediction_is_shown_within_half_a_bin(in_chans: int) -> None:
    images, target = photo(in_chans=in_chans), make("color_bins", in_chans=in_chans, bins=16)
    classes = target(images)
    logits = F.one_hot(classes, 16).permute(0, 1, 4, 2, 3).flatten(1, 2).float()
    shown = target.to_pixels(logits, images)
    assert shown is not None
    raw = (shown - images) * torch.tensor(STD[:in_chans]).view(1, -1, 1, 1)
    assert raw.abs().amax() <= 1 / 32 + 1e-6
    assert LOSSES["cross_entropy"](100 * logits, classes).amax() < 1e-6  # the same channel order
    assert torch.equal(target(shown), classes)


def test_bins_of_a_smaller_image() -> None:
    images, target = photo(), make("color_bins", size=[8, 12], bins=8)
    assert (target.stride, target.out_chans) == (4, 24)
    assert torch.equal(target(images), make("color_bins", (8, 12))(F.avg_pool2d(images, 4)))


# Mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pixels", {"size": 5}, r"size 5 .* use \[16, 24\] or \[8, 12\]"),
        ("pixels", {"size": [16, 16]}, r"\[16, 16\] of the target is not img_size \[32, 48\]"),
        ("color_bins", {"bins": 1}, "too few: use 8 or 256"),
        ("normalized_pixels", {"window": 46}, "window 46 .* odd number"),
        ("patch_normalized_pixels", {"patch_size": 12}, "patch_size 12 .* use 4 or 8 or 16"),
        ("hog", {"cell": 7}, r"cell 7 .* img_size \[32, 48\] .* use 2 or 4 or 8"),
        ("hog", {"bins": 1}, "too few"),
        ("features", {}, "teacher None of target 'features'"),
        ("features", {"teacher": "vit_tinny_patch16_224"}, "teacher: vit_tiny_patch16_224 or"),
        ("features", TEACHER | {"weights": "nowhere.pth"}, "'nowhere.pth' .* do not exist"),
        ("features", TEACHER | {"size": 30}, "set another size in target_kwargs"),
        ("features", TEACHER | {"size": [80, 80]}, r"5 x 5 do not divide img_size \[32, 48\]"),
    ],
)
def test_mistakes_are_one_sentence_with_a_remedy(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["patch_normalized_pixels", "hog"])
def test_an_image_too_odd_for_any_remedy_is_refused_all_the_same(name: str) -> None:
    with pytest.raises(ValueError, match="another img_size"):
        make(name, (31, 37))
