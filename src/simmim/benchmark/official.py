"""The data of microsoft/SimMIM's pretraining, as its code gives them, to measure ours against.

Pillow opens and converts, torchvision's first transforms crop, flip, and make floats of zero mean,
and a worker draws the mask with NumPy. Written anew from `data/data_simmim.py` there.
"""

from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as T
from torchvision.transforms import functional as F

from simmim.data.dataset import ImageData
from simmim.data.decode import decode_image
from simmim.data.draws import uniforms
from simmim.data.transforms import Box, Size, crop_and_resize, random_box
from simmim.training import imagenet_statistics

SCALE, RATIO = (0.67, 1.0), (3 / 4, 4 / 3)


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
        return self.transform(image), self.mask()

    def mask(self) -> npt.NDArray[Any]:
        """Hide so many cells, chosen by NumPy's global generator."""
        cells = self.grid[0] * self.grid[1]
        mask = np.zeros(cells, dtype=int)
        mask[np.random.permutation(cells)[: self.count]] = 1  # noqa: NPY002 as there
        return mask.reshape(self.grid)


def largest_difference(files: ImageData, indices: list[int], size: Size) -> int:
    """Compare our crops with the official ones of the same rectangle.

    Args:
        files: Whose files are read.
        indices: Which.
        size: Height and width of the crops.

    Returns:
        The largest difference of a pixel, in grey levels.
    """
    worst = 0
    for index in indices:
        data = bytes(files.files.read(files._place(index)))
        ours = decode_image(data, 3, files.intensity)
        height, width = ours.shape[1:]
        box = random_box(height, width, SCALE, RATIO, uniforms(0, 0, index))
        theirs = official_crop(data, box, size)
        if theirs.shape != ours.shape[:1] + size or ours.dtype != torch.uint8:
            continue
        crop = crop_and_resize(ours, box, size)
        worst = max(worst, int((crop.int() - theirs.int()).abs().max()))
    return worst


def official_crop(data: bytes, box: Box, size: Size) -> Tensor:
    """Crop and resize as the official code does, (3, H, W), before it makes floats of it."""
    image = Image.open(BytesIO(data)).convert("RGB")
    crop = F.resized_crop(image, *box, list(size), T.InterpolationMode.BILINEAR)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)  # HWC -> CHW
