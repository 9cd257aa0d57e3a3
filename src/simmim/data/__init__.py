"""Images on disk -> uint8 batches.

In the order of the data: `index` finds the files, `split` sets some aside, `sampler` puts them in
order, `dataset` reads one (`decode`, `scans`, `transforms`), `image_folder` is the data module.
Other tasks' stand beside it: `classification`, `detection` (`annotations`, `annotated`, `boxes`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {  # imported when first used: Lightning takes seconds
    "ImageFolderData": "simmim.data.image_folder",
    "DetectionData": "simmim.data.detection",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from simmim.data.detection import DetectionData as DetectionData
    from simmim.data.image_folder import ImageFolderData as ImageFolderData


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'simmim.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
