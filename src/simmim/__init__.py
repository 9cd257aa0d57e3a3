"""Masked image modelling (SimMIM) as a PyTorch Lightning research template.

The names below are imported when first used, so that `import simmim` and `simmim --help` are quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "SimMIM": "simmim.pretrain",
    "Classifier": "simmim.classify",
    "Segmenter": "simmim.segment",
    "Detector": "simmim.detect",
    "mask_images": "simmim.masking",
    "l1_loss": "simmim.loss",
    "mse_loss": "simmim.loss",
    "smooth_l1_loss": "simmim.loss",
    "load_encoder": "simmim.weights",
    "load_official": "simmim.pretrain",
    "ImageFolderData": "simmim.data",
    "register": "simmim.parts.names",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from simmim.classify import Classifier as Classifier
    from simmim.data import ImageFolderData as ImageFolderData
    from simmim.detect import Detector as Detector
    from simmim.loss import l1_loss as l1_loss
    from simmim.loss import mse_loss as mse_loss
    from simmim.loss import smooth_l1_loss as smooth_l1_loss
    from simmim.masking import mask_images as mask_images
    from simmim.parts.names import register as register
    from simmim.pretrain import SimMIM as SimMIM
    from simmim.pretrain import load_official as load_official
    from simmim.segment import Segmenter as Segmenter
    from simmim.weights import load_encoder as load_encoder


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'simmim' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
