"""Embeddings of a folder's images, and the files that they are kept in: .npz and .parquet."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from simmim.base.files import written_whole

FORMATS = (".npz", ".parquet")


@dataclass(frozen=True)
class Embeddings:
    """What an encoder says of each image of a folder.

    Attributes:
        features: One row an image, float32, (N, D).
        paths: Of the images below the folder, with "/" on every system, (N,).
        labels: Class of each, int64, (N,); -1 where there is none.
        classes: Names of the classes, (K,).
        parts: Where each belongs: train, val or test, (N,).
        scores: What the features are worth: `val/knn_top1`, `val/probe_top1` and so on.
    """

    features: npt.NDArray[np.float32]
    paths: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int64]
    classes: npt.NDArray[np.str_]
    parts: npt.NDArray[np.str_]
    scores: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def class_of(self, place: int) -> str:
        """Name of an image's class; empty where it has none."""
        label = self.labels[place]
        return str(self.classes[label]) if label >= 0 else ""


def join(found: Sequence[Embeddings]) -> Embeddings:
    """Put the embeddings of several folders with the same classes one behind the other."""
    return Embeddings(
        features=np.concatenate([each.features for each in found]),
        paths=np.concatenate([each.paths for each in found]),
        labels=np.concatenate([each.labels for each in found]),
        classes=found[0].classes,
        parts=np.concatenate([each.parts for each in found]),
    )


def check_format(path: Path) -> None:
    """Refuse a file that could not be written in the end.

    Raises:
        ValueError: If the ending is not known, or pyarrow is missing.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"--out {path} must end in {' or '.join(FORMATS)}")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(".parquet needs pyarrow: pip install 'simmim[parquet]', or use .npz")


def write(embeddings: Embeddings, path: Path, about: Mapping[str, str]) -> None:
    """Write the arrays to a file.

    An .npz holds features, paths, labels, classes and parts, and opens with `numpy.load` alone. A
    .parquet has the same columns, `classes` the name of each image's class; its metadata hold the
    list of classes, and what the features are.

    Args:
        embeddings: The arrays.
        path: The file, which ends in .npz or .parquet.
        about: What is to be said of the features in a .parquet's metadata.
    """
    with written_whole(path) as part:
        if path.suffix == ".parquet":
            _write_parquet(embeddings, part, about)
            return
        with part.open("wb") as file:
            np.savez(
                file,
                features=embeddings.features,
                paths=embeddings.paths,
                labels=embeddings.labels,
                classes=embeddings.classes,
                parts=embeddings.parts,
            )


def _write_parquet(embeddings: Embeddings, path: Path, about: Mapping[str, str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    features = embeddings.features
    # What is no text in a name (bytes of an old system) is written as escapes, as Parquet has none.
    paths = [os.fsencode(p).decode("utf-8", "backslashreplace") for p in embeddings.paths.tolist()]
    names = [embeddings.class_of(place) or None for place in range(len(embeddings))]
    table = pa.table(
        {
            "features": pa.FixedSizeListArray.from_arrays(
                pa.array(features.ravel()), features.shape[1]
            ),
            "paths": paths,
            "labels": pa.array(embeddings.labels),
            "classes": pa.array(names, pa.string()),
            "parts": embeddings.parts.tolist(),
        }
    )
    said = {"classes": json.dumps(embeddings.classes.tolist()), **about}
    parquet.write_table(table.replace_schema_metadata(said), path)
