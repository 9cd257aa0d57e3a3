"""One sample: file -> pixels -> transform -> a dict; and samples -> a batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from itertools import compress
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from simmim.data.decode import UnreadableImage, decode_image, unreadable
from simmim.data.draws import uniforms
from simmim.data.index import FileIndex
from simmim.data.index_cache import digest_of
from simmim.data.mapped import as_tensor
from simmim.data.scans import Intensity
from simmim.data.workers import outlive_the_first_signal, worker_context

T = TypeVar("T")
Transform = Callable[[Any, Iterator[float]], dict[str, Any]]  # of what `read` gives
Key = int | tuple[int, int]  # a sample's index, or (epoch, index)

TRIES = 32  # files in a row; were half of all files bad, one sample in four billion would fail


class ImageData(Dataset[dict[str, Any]]):
    """The images of an index, or some of them.

    A sample is a dict: `image`, what else the transform gives, `index` (its place here), and
    `label` where there are classes. It depends on (seed, epoch, index) alone: ask for
    `data[epoch, index]`; `data[index]` is epoch 0.

    Args:
        files: The index.
        transform: Takes (C, H, W) and uniform random numbers, gives a dict.
        places: Which files of the index; None: all.
        in_chans: Channels of the images.
        intensity: How deeper scans become 0..1.
        seed: Of the transform.
        on_bad: What an unreadable file does: "skip" puts another sample, drawn by (seed, epoch,
            index), in its place, and marks it in `unreadable`; "raise" raises.
        labelled: Whether the samples have labels.
        whole: Whether pixels must be the files' own, as in `decode_image`: boxes and masks are for
            them.

    Attributes:
        unreadable: 1 for each file that could not be read, uint8; workers share it.
    """

    def __init__(
        self,
        files: FileIndex,
        transform: Transform,
        places: npt.NDArray[np.int64] | None = None,
        *,
        in_chans: int = 3,
        intensity: Intensity | None = None,
        seed: int = 0,
        on_bad: Literal["skip", "raise"] = "skip",
        labelled: bool = True,
        whole: bool = False,
    ) -> None:
        self.files, self.transform, self.seed, self.on_bad = files, transform, seed, on_bad
        self.places = None if places is None else as_tensor(places)
        self.in_chans, self.intensity = in_chans, intensity or Intensity()
        self.whole = whole
        self.labelled = labelled and files.labels is not None
        self.unreadable = torch.zeros(len(self), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.files) if self.places is None else len(self.places)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        content, index = self._read(epoch, index % len(self))
        sample = {**self.transform(content, uniforms(self.seed, epoch, index)), "index": index}
        if self.labelled and self.files.labels is not None:
            sample["label"] = int(self.files.labels[self._place(index)])
        return sample

    def read(self, index: int) -> Any:
        """Read what a sample is made of, as it is: the image, (C, H, W).

        Raises:
            UnreadableImage: With the file's name and the reason.
        """
        return self.read_image(index)

    def read_image(self, index: int, oriented: bool = True) -> Tensor:
        """Read an image, (C, H, W).

        Args:
            index: Of the sample.
            oriented: Whether EXIF's orientation is applied.

        Raises:
            UnreadableImage: With the file's name and the reason.
        """
        place = self._place(index)
        data: bytes | memoryview = b""
        try:
            data = self.files.read(place)
            name = self.files.name(place) if ".dcm" in self.files.suffixes else ""
            return decode_image(data, self.in_chans, self.intensity, name, self.whole, oriented)
        except Exception as error:  # decoders raise whatever they like
            raise unreadable(self.files.path(place), error, data) from error

    def path(self, index: int) -> str:
        """Path of a sample's file."""
        return self.files.path(self._place(index))

    def container(self, index: int) -> str:
        """Path of what holds a sample's file on the disk: itself, or a shard."""
        return self.files.container(self._place(index))

    def size(self, index: int) -> int:
        """Size of a sample's file in bytes; of packed images the mean."""
        return self.files.size(self._place(index))

    def name(self, index: int) -> str:
        """Path of a sample's file below the folder, with "/" between folders on every system."""
        return self.files.name(self._place(index))

    def all_names(self) -> Iterator[str]:
        """Paths of all samples' files below the folder, in order."""
        if self.places is None:
            return self.files.all_names()
        if bool((self.places[1:] > self.places[:-1]).all()):
            chosen = torch.zeros(len(self.files), dtype=torch.bool)
            chosen[self.places] = True
            return compress(self.files.all_names(), chosen.numpy())
        return map(self.name, range(len(self)))

    @cached_property
    def digest(self) -> str:
        """Hash of the files' paths below the folder, in order; a second for 14 million of them."""
        digest = blake2b(digest_of(self.files).encode(), digest_size=16)
        if self.places is not None:
            digest.update(self.places.numpy().data)
        return digest.hexdigest()

    @property
    def labels(self) -> Tensor | None:
        """The class of each sample, int64, (n,); made when asked. None where there are none."""
        if not self.labelled or self.files.labels is None:
            return None
        return self.files.labels if self.places is None else self.files.labels[self.places]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels."""
        return self.files.classes

    @property
    def class_to_idx(self) -> dict[str, int]:
        """The label of each class."""
        return {name: label for label, name in enumerate(self.classes)}

    @property
    def samples(self) -> list[tuple[str, int]]:
        """(path, label) of each image, as torchvision's `ImageFolder` has them; made when asked."""
        labels = [0] * len(self) if self.labels is None else self.labels.tolist()
        return [(self.path(i), label) for i, label in enumerate(labels)]

    def number_classes_as(self, classes: list[str]) -> None:
        """Give each label the number that its class has in `classes`, which holds all of them."""
        if self.files.labels is not None:
            new = torch.tensor([classes.index(name) for name in self.files.classes])
            self.files = replace(self.files, labels=new[self.files.labels], classes=classes)

    def why_unreadable(self, index: int) -> str:
        """Read a file once more, and say what is wrong with it."""
        try:
            self.read(index)
        except UnreadableImage as error:
            return str(error).partition(" cannot be read: ")[2]
        return "it could be read the second time"

    def _place(self, index: int) -> int:
        return index if self.places is None else int(self.places[index])

    def _read(self, epoch: int, index: int) -> tuple[Any, int]:
        """Read an image, or the one that replaces it."""
        others = uniforms(self.seed, epoch, index, 1)
        for _ in range(TRIES):
            try:
                return self.read(index), index
            except UnreadableImage as error:
                if self.on_bad == "raise":
                    raise
                self.unreadable[index] = 1
                index, reason = int(next(others) * len(self)), error
        raise UnreadableImage(f"{TRIES} files in a row could not be read, the last: {reason}")


class WholeFolder(ImageData):
    """Every image once, with its `path`: unreadable ones are left out instead of replaced.

    Attributes:
        even_batches: Whether a batch of nothing but unreadable images becomes one other image, as
            several processes need: where one runs a model that is in shards, all must. Otherwise
            `Loader` leaves the batch out.
    """

    even_batches = False

    def __getitem__(self, key: Key) -> dict[str, Any]:
        sample = super().__getitem__(key)
        return {**sample, "path": self.path(sample["index"])}

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """Read those images of a batch that can be read."""
        samples = [self[key] for key in keys]
        wanted = [s for s, key in zip(samples, keys, strict=True) if s["index"] == key]
        return wanted or samples[: self.even_batches]


class Loader(DataLoader[T]):
    """A DataLoader whose workers are started alike everywhere, see workers.py.

    Lightning knows it to go on where it stopped: its sampler finds the place. Batches of which
    nothing could be read are left out.
    """

    def __init__(self, dataset: Dataset[T], **options: Any) -> None:
        if options.get("num_workers"):
            if isinstance(dataset, ImageData):
                dataset.unreadable.share_memory_()
            options = {
                "worker_init_fn": outlive_the_first_signal,
                "multiprocessing_context": worker_context(dataset, options.get("collate_fn")),
                **options,
            }
        super().__init__(dataset, **options)

    def __iter__(self) -> Any:
        """Iterate over the batches."""
        batches = super().__iter__()
        if not isinstance(self.dataset, WholeFolder):
            return batches
        return (batch for batch in batches if batch)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the place follows from the number of steps."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples to a batch; where 8-bit images meet deeper scans, all become float in 0..1.

    Images that are HWC in memory stay so, (B, C, H, W) by their strides alone.
    """
    if not samples:  # none could be read
        return {}
    if len({sample["image"].dtype for sample in samples}) > 1:
        samples = [{**sample, "image": _unit(sample["image"])} for sample in samples]
    batch: dict[str, Any]
    if samples[0]["image"].stride(0) != 1:
        batch = default_collate(samples)
    else:
        batch = default_collate([{**s, "image": s["image"].permute(1, 2, 0)} for s in samples])
        batch["image"] = batch["image"].permute(0, 3, 1, 2)
    return batch


def _unit(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image
