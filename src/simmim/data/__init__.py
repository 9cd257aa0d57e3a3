"""Images on disk -> uint8 batches.

In the order of the data: `index` finds the files, `split` sets some aside, `sampler` puts them in
order, `resume` says where it goes on, `dataset` reads one (`decode`, `scans`, `transforms`),
`image_folder` is the data module. Other tasks' stand beside it: `classification`; `segmentation`,
for which `pairs` finds the masks, `class_map` reads them and `joint` transforms both; `detection`
(`annotations`, `annotated`, `boxes`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {  # imported when first used: Lightning takes seconds
    "DetectionData": "simmim.data.detection",
    "ImageFolderData": "simmim.data.image_folder",
    "SegmentationData": "simmim.data.segmentation",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from simmim.data.detection import DetectionData as DetectionData
    from simmim.data.image_folder import ImageFolderData as ImageFolderData
    from simmim.data.segmentation import SegmentationData as SegmentationData


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'simmim.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
