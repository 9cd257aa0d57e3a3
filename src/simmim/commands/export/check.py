"""Whether what was written gives what the model in memory gives."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

BATCHES = (1, 3)
TOLERANCE = 1e-4  # of the largest output: float32 in another order of summation


@dataclass(frozen=True)
class Check:
    """A comparison of a file with the model in memory.

    Attributes:
        reader: What opened the file.
        difference: The largest absolute difference of any output.
        tolerance: The largest that is allowed: 1e-4 of the largest output.
    """

    reader: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed; nan and inf are not."""
        return isfinite(self.difference) and self.difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.reader}: largest difference {self.difference:.1e}, allowed {self.tolerance:.1e}"
        )


@torch.no_grad()
def compare(
    reader: str,
    expected: Callable[[Tensor], Tensor],
    found: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
) -> Check:
    """Run two models on noise, in batches of 1 and of 3.

    Args:
        reader: What opened the file, for the report.
        expected: The model in memory.
        found: The one that was read back.
        shape: Channels, height and width of the images.
    """
    generator = torch.Generator().manual_seed(0)
    differences, largest = [], []
    for batch in BATCHES:
        images = torch.randn(batch, *shape, generator=generator)
        a, b = expected(images), found(images)
        if a.shape != b.shape:
            raise ValueError(
                f"{reader} gives {list(b.shape)} for {batch} images, the model {list(a.shape)}: "
                "the export was not kept"
            )
        differences.append((a - b).abs().max())
        largest.append(a.abs().max())
    # Of tensors: the largest of a list with nan depends on where it stands.
    difference, tolerance = torch.stack(differences).max(), TOLERANCE * torch.stack(largest).max()
    return Check(reader, float(difference), float(tolerance))
