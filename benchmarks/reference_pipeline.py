"""The data pipeline of microsoft/SimMIM's pretraining beside ours, measured in turns.

    python benchmarks/reference_pipeline.py --root photos --config vit_base_800ep

There Pillow opens and converts, torchvision's first transforms crop, flip, and make floats of zero
mean, and a worker draws the mask with NumPy. Written anew from `data/data_simmim.py` there.
"""

from io import BytesIO
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jsonargparse import auto_cli
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as T
from torchvision.transforms import functional as F

from simmim.commands.benchmark.data import readable
from simmim.commands.benchmark.experiment import open_experiment
from simmim.commands.benchmark.loader_profile import Endless, Feed, sample_time
from simmim.data.dataset import ImageData
from simmim.data.decode import decode_image
from simmim.data.draws import uniforms
from simmim.data.transforms import Box, Size, crop_and_resize, random_box
from simmim.training.base import imagenet_statistics

SCALE, RATIO = (0.67, 1.0), (3 / 4, 4 / 3)
BATCH = 32


class OfficialData(Dataset[tuple[Tensor, npt.NDArray[Any]]]):
    """Image and mask, as the official loader gives them.

    Args:
        files: Whose files are read.
        size: Height and width of the crop.
        mask_patch_size: Side of a mask cell in pixels.
        mask_ratio: Share of the cells that is hidden.
    """

    def __init__(
        self, files: ImageData, size: Size, mask_patch_size: int = 32, mask_ratio: float = 0.6
    ) -> None:
        self.files = files
        self.grid = (max(size[0] // mask_patch_size, 1), max(size[1] // mask_patch_size, 1))
        self.count = int(np.ceil(self.grid[0] * self.grid[1] * mask_ratio))
        mean, std = imagenet_statistics(3)
        self.transform = T.Compose(
            [
                T.RandomResizedCrop(size, SCALE, RATIO, T.InterpolationMode.BILINEAR),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize(torch.tensor(mean), torch.tensor(std)),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, npt.NDArray[Any]]:
        with open(self.files.path(index), "rb") as file:
            image = Image.open(file).convert("RGB")
        cells = self.grid[0] * self.grid[1]
        mask = np.zeros(cells, dtype=int)
        mask[np.random.permutation(cells)[: self.count]] = 1  # noqa: NPY002 as there
        return self.transform(image), mask.reshape(self.grid)


def largest_difference(files: ImageData, indices: list[int], size: Size) -> int:
    """The largest difference between our crops and theirs of the same rectangle, in grey levels."""
    worst = 0
    for index in indices:
        data = bytes(files.files.read(files._place(index)))
        ours = decode_image(data, 3, files.intensity)
        if ours.dtype != torch.uint8:
            continue
        height, width = ours.shape[1:]
        box: Box = random_box(height, width, SCALE, RATIO, uniforms(0, 0, index))
        image = Image.open(BytesIO(data)).convert("RGB")
        crop = F.resized_crop(image, *box, list(size), T.InterpolationMode.BILINEAR)
        theirs = torch.from_numpy(np.array(crop)).permute(2, 0, 1)  # HWC -> CHW
        worst = max(worst, int((crop_and_resize(ours, box, size).int() - theirs).abs().max()))
    return worst


def compare(
    root: str, config: str = "vit_base_800ep", packed: str | None = None, seconds: float = 5
) -> str:
    """Measure both pipelines in turns, so that what else the machine does falls on both.

    Args:
        root: Folder of images that Pillow reads too.
        config: Config of `simmim pretrain`, by name or file.
        packed: The same images packed, which ours reads in place of the folder.
        seconds: How long the loaders are read, and about as long single samples.
    """
    first, last = (
        open_experiment([config], data={"root": place}).data for place in (packed or root, root)
    )
    first.setup("fit")
    last.setup("fit")
    ours, files = first.sets["training"], last.sets["training"]
    theirs = OfficialData(files, first.img_size)
    indices, good = readable(ours), readable(files)
    samples = [
        (sample_time(ours, [(turn, i) for i in indices]), sample_time(theirs, good))
        for turn in range(max(int(2 * seconds), 3))
    ]
    feeds = (
        Feed(ours, Endless(indices), BATCH, 1, first.collate),
        Feed(theirs, Endless(good, plain=True), BATCH, 1),
    )
    turns = [[feed.rate(seconds / 5) for feed in feeds] for _ in range(5)]
    rows: dict[str, list[Any]] = {
        "images/s of one core": [(1 / a, 1 / b) for a, b in samples],
        "loader with one worker": turns,
    }
    lines = [f"{'':<24}{'ours':>10}{'official':>10}{'ratio':>8}"]
    for name, pairs in rows.items():
        a, b, ratio = (
            median(values) for values in zip(*[(a, b, a / b) for a, b in pairs], strict=True)
        )
        lines.append(f"{name:<24}{a:>10,.1f}{b:>10,.1f}{ratio:>7.2f}x")
    levels = largest_difference(files, good, last.img_size)
    return "\n".join([*lines, f"largest difference of a pixel of the same crop: {levels} of 255"])


if __name__ == "__main__":
    print(auto_cli(compare))
