"""Images on disk -> uint8 batches.

In the order of the data: `index` finds the files, `split` sets some aside, `sampler` puts them in
order, `dataset` reads one (`decode`, `scans`, `transforms`), `image_folder` is the data module.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["ImageFolderData"]

if TYPE_CHECKING:
    from simmim.data.image_folder import ImageFolderData as ImageFolderData


def __getattr__(name: str) -> Any:
    if name != "ImageFolderData":
        raise AttributeError(f"module 'simmim.data' has no attribute {name!r}")
    from simmim.data.image_folder import ImageFolderData  # imports Lightning, which takes seconds

    return ImageFolderData
