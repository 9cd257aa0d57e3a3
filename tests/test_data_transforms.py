"""Crops: torchvision's law, Pillow's pixels, and a draw that depends on nothing but its key."""

from itertools import repeat

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from simmim.data.dataset import collate
from simmim.data.draws import permutation, uniforms
from simmim.data.transforms import (
    Box,
    CenterCrop,
    RandomCrop,
    center_box,
    crop_and_resize,
    flip_marked,
    random_box,
)

SCALE, RATIO = (0.67, 1.0), (3 / 4, 4 / 3)


def test_uniforms_are_a_known_function_of_their_key() -> None:
    first = [round(x, 6) for _, x in zip(range(3), uniforms(0, 0, 0), strict=False)]
    assert first == [0.014216, 0.61051, 0.731006]
    draws = uniforms(7, 3, 12345)
    values = np.array([next(draws) for _ in range(20_000)])
    again = uniforms(7, 3, 12345)
    assert [next(again) for _ in range(100)] == values[:100].tolist()
    assert (values.min() >= 0, values.max() < 1) == (True, True)
    assert np.histogram(values, 10, (0, 1))[0] == pytest.approx(2000, abs=250)
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.03
    # Neighbouring keys are unrelated.
    for keys in ([(0, 0, i) for i in range(3000)], [(0, e, 0) for e in range(3000)]):
        values = np.array([next(uniforms(*key)) for key in keys])
        assert values.mean() == pytest.approx(0.5, abs=0.03)
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.08


def test_permutation_is_a_known_function_of_seed_and_epoch() -> None:
    assert permutation(6, 0, 0).tolist() == [0, 2, 1, 5, 4, 3]
    assert permutation(6, 0, 1).tolist() == [5, 3, 2, 4, 1, 0]
    assert sorted(permutation(1000, 5, 9).tolist()) == list(range(1000))


@pytest.mark.parametrize(("height", "width"), [(300, 500), (100, 64)])
def test_the_box_law_is_torchvisions(height: int, width: int) -> None:
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(3000)])
    ours = np.array([random_box(height, width, SCALE, RATIO, uniforms(i)) for i in range(3000)])
    for of in (
        lambda b: b[:, 2] * b[:, 3] / (height * width),
        lambda b: np.log(b[:, 3] / b[:, 2]),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        assert ks_2samp(of(ours), of(theirs)).statistic < 0.055  # 0.06 in one of 20,000 tries


def test_a_box_step_by_step() -> None:
    draws = iter([0.5, 0.5, 0.25, 0.75])
    # area 0.835 of 100 x 120 and aspect 1: side sqrt(10020) = 100.1 -> 100 x 100
    assert random_box(100, 120, SCALE, RATIO, draws) == Box(0, 15, 100, 100)


def test_where_nothing_fits_the_box_is_torchvisions() -> None:
    for height, width in ((40, 400), (400, 40)):
        theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [*RATIO])
        assert random_box(height, width, (1, 1), RATIO, repeat(0.999999)) == theirs
    for height, width in ((1, 2000), (2000, 1), (1, 1)):
        ours = random_box(height, width, (1, 1), RATIO, repeat(0.999999))
        assert 1 <= ours.height <= height
        assert 1 <= ours.width <= width
        assert ours.left + ours.width <= width


def test_pixels_are_pillows_to_a_grey_level() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    for box in (Box(10, 20, 130, 150), Box(0, 0, 150, 200), Box(5, 5, 30, 20)):
        ours = crop_and_resize(image, box, (64, 48))
        top, left, height, width = box
        crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
        theirs = np.asarray(crop.resize((48, 64), Image.Resampling.BILINEAR))
        assert (ours.dtype, ours.is_contiguous()) == (torch.uint8, True)
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1


def test_a_crop_of_the_right_size_and_a_deep_scan() -> None:
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)
    assert torch.equal(crop_and_resize(image, Box(2, 3, 8, 8), (8, 8)), image[:, 2:10, 3:11])
    image = (torch.rand(1, 50, 50) > 0.5).float()  # stays between 0 and 1
    resized = crop_and_resize(image, Box(0, 0, 50, 50), (64, 64))
    assert (resized.dtype, resized.min() >= 0, resized.max() <= 1) == (torch.float32, True, True)


def test_the_middle() -> None:
    assert center_box(100, 200, (32, 32), 1.0) == Box(0, 50, 100, 100)
    assert center_box(256, 256, (224, 224), 0.875) == Box(16, 16, 224, 224)
    assert center_box(100, 200, (32, 64), 1.0) == Box(0, 0, 100, 200)
    assert center_box(1, 2000, (32, 32), 1.0) == Box(0, 999, 1, 1)
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    assert CenterCrop((40, 40))(image, iter(()))["image"].equal(image[:, :, 10:50])


def test_flips_are_marked_with_their_probability() -> None:
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    for hflip in (0.5, 0.2, 1.0):
        crop = RandomCrop((8, 8), hflip=hflip)
        flips = [crop(image, uniforms(0, 0, i))["flip"] for i in range(2000)]
        assert np.mean(flips) == pytest.approx(hflip, abs=0.04)
    assert "flip" not in RandomCrop((8, 8), hflip=0)(image, uniforms(0))
    images = torch.arange(12, dtype=torch.uint8).view(2, 1, 2, 3)
    flipped = flip_marked(images, torch.tensor([False, True]))
    assert torch.equal(flipped[0], images[0])
    assert flipped[1, 0].tolist() == [[8, 7, 6], [11, 10, 9]]


def test_colour_stays_as_it_was_decoded_until_it_is_on_the_device() -> None:
    pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8)
    image, size = pixels.permute(2, 0, 1), (24, 24)  # HWC in memory
    sample = RandomCrop(size)(image, uniforms(0, 0, 0))
    assert sample["image"].permute(1, 2, 0).is_contiguous()
    box = random_box(40, 50, (0.67, 1.0), (3 / 4, 4 / 3), uniforms(0, 0, 0))
    again = crop_and_resize(image.contiguous(), box, size)
    assert again.is_contiguous()
    assert torch.equal(sample["image"], again)
    batch = collate([sample, sample])
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch["image"], torch.stack([again, again]))
