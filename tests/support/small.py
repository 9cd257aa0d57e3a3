"""Small encoders and images, which tests of the method share."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

VIT: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
SHARED_BIAS = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": 0.1}
SWIN: dict[str, Any] = {
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "window_size": 4,
}
# A ViT of two blocks on 32 px, as the options of any of our modules.
TINY_VIT: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "img_size": 32,
    "encoder_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}


class ByIndex(Dataset[dict[str, Tensor]]):
    """Images of noise that know their place, as our data modules give them."""

    def __init__(self, n: int = 8, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randint(0, 256, (n, 3, size, size), generator=generator).byte()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": self.images[i], "index": torch.tensor(i)}


def noise_loader(n: int = 8, size: int = 32) -> DataLoader[dict[str, Tensor]]:
    """Batches of four."""
    return DataLoader(ByIndex(n, size), batch_size=4)
