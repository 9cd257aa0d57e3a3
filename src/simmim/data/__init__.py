"""Images on disk -> uint8 batches.

In the order of the data: `index` finds the files, `split` sets some aside, `sampler` puts them in
order, `dataset` reads one (`decode`, `scans`, `transforms`), `image_folder` is the data module.
"""

from simmim.data.image_folder import ImageFolderData

__all__ = ["ImageFolderData"]
