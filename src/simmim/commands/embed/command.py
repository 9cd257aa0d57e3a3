"""`simmim embed`: features of a folder's images, what they are worth, and what they look like."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from simmim.base.files import written_whole
from simmim.base.progress import Bar
from simmim.commands.embed.pictures import (
    Tile,
    check_map,
    draw_map,
    draw_neighbours,
    most_similar,
    save_figure,
)
from simmim.commands.embed.scores import HELD_OUT, score, score_table
from simmim.commands.embed.table import Embeddings, check_format, join, write
from simmim.data import ImageFolderData
from simmim.data.bad_files import FILE, write_bad_files
from simmim.data.dataset import ImageData, Loader, WholeFolder, collate
from simmim.data.decode import read_image
from simmim.data.index import FileIndex, check_folder
from simmim.data.layout import Part, read_parts
from simmim.data.sampler import choose
from simmim.data.shards import PackedIndex, is_packed, join_packed, read_packed
from simmim.data.statistics import imagenet_statistics
from simmim.data.workers import default_workers
from simmim.evaluation.readout import Reader, choose_layers, describe
from simmim.weights.backbone import Backbone, open_backbone

EXAMPLES = 8  # rows of the neighbours' picture where no query is given


def embed(
    weights: str,
    root: str,
    out: str,
    layer: int | None = None,
    pooling: Literal["mean", "max", "token"] = "mean",
    img_size: int | list[int] | None = None,
    in_chans: int | None = None,
    encoder_kwargs: dict[str, Any] | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    val_fraction: float = 0.1,
    split_seed: int = 0,
    group_pattern: str | None = None,
    val_crop: float = 1.0,
    percentiles: tuple[float, float] = (0.5, 99.5),
    window: tuple[float, float] | None = None,
    k: int | list[int] = 20,
    temperature: float = 0.07,
    l2: float = 1.0,
    map: Literal["tsne", "umap", "pca", "none"] = "tsne",
    map_points: int = 3000,
    query: list[str] | None = None,
    neighbours: int = 8,
    seed: int = 0,
    overwrite: bool = False,
    trust: bool = False,
) -> Embeddings:
    """Write the features of a folder's images, score them, and draw them.

    Every image that can be read is written once, in the order of the folders. Where there are
    labels, the training images' features classify those that are held out (val, test), by kNN and
    by a linear probe: the numbers of the online probe in pretraining. Beside the file lie a map of
    the features, NAME.map.png, and nearest neighbours, NAME.neighbours.png.

    Args:
        weights: Weights of the encoder: a run's folder or checkpoint of ours, an official SimMIM
            or Swin release (.pth), `timm:NAME`, or a Hugging Face or timm folder.
        root: Folder of images, with train/ (and val/, and test/), or split as in pretraining.
        out: The file to write, .npz or .parquet: features, paths, labels, classes, parts.
        layer: Block (of hierarchical models: stage) that is read, counted from 1. None: the last,
            behind the encoder's final norm. The paper's linear probe reads block 8 of ViT-B.
        pooling: How the tokens become one vector: mean or max of the patch tokens (the paper
            takes the mean), or token (the class token).
        img_size: Height and width in pixels; by default those of the weights.
        in_chans: Channels of the images; by default those of the weights.
        encoder_kwargs: Options of the timm model that differ from those in the weights.
        batch_size: Images that go through the encoder together.
        num_workers: Processes that read images; by default by the size of the folder.
        accelerator: What computes; by default the fastest that is there.
        precision: Of the encoder, in Lightning's words; the features are float32 in any case.
        val_fraction: Share of the images that is held out where there is no val/; 0.1, as in
            pretraining. Give here what was given there.
        split_seed: Which share; as in pretraining.
        group_pattern: Regular expression whose first group names the patient or scene, whose
            images all go to one side; as in pretraining.
        val_crop: Side of the crop from the middle, as a share of the largest one that fits.
        percentiles: Deeper scans: the percentiles of each image that become 0 and 1.
        window: Deeper scans: the values that become 0 and 1, instead of percentiles.
        k: Neighbours that vote; several, such as [10, 20, 100, 200], give a line each. 20 (DINO's).
        temperature: Of the neighbours' votes. 0.07 (DINO's).
        l2: Weight decay of the linear probe, as in scikit-learn's LogisticRegression(C=1 / l2).
        map: How the map is made: tsne, umap (needs umap-learn), pca, or none.
        map_points: Images on the map, at most; of more, the same ones always.
        query: Images whose neighbours are drawn: paths below root, or any files. May be given
            several times. None: a few of the held-out images.
        neighbours: How many are drawn of each; 0 draws none.
        seed: Of the map.
        overwrite: Whether files that are there already may be replaced.
        trust: Import an encoder that the checkpoint names by its import path, which runs its code.
            (One that a module of yours registers: --imports MODULE.)

    Returns:
        What was written, and the scores.

    Raises:
        ValueError: If an option is wrong, or a file is there already.
    """
    files = Outputs(Path(out).expanduser())
    files.check(map != "none", neighbours > 0, overwrite)
    ks = [k] if isinstance(k, int) else list(k)
    _check(ks, temperature, l2, map_points, neighbours)
    check_map(map)
    check_folder(root, "--root")
    fabric = _fabric(accelerator, precision)
    queries = [find_query(root, name) for name in query or ()]
    backbone = open_backbone(
        weights,
        None,
        img_size,
        in_chans,
        encoder_kwargs,
        global_pool="",  # the norm stays behind the tokens
        class_token=pooling == "token",
        trust=trust,
    )
    rank_zero_info(f"encoder {backbone.encoder}: {backbone.report}")
    data = ImageFolderData(
        root,
        img_size=backbone.img_size,
        in_chans=backbone.in_chans,
        batch_size=batch_size,
        num_workers=num_workers,
        val_fraction=val_fraction,
        split_seed=split_seed,
        group_pattern=group_pattern,
        val_crop=val_crop,
        percentiles=percentiles,
        window=window,
    )
    embedder = Embedder(data, fabric, fabric.setup_module(_reader(backbone, layer, pooling)))
    for file in queries:
        embedder.picture(file)  # one that cannot be read is better known now

    if Path(os.path.realpath(files.out)).is_relative_to(os.path.realpath(root)):
        print(f"{files.out} lies in --root: pictures beside it are read as images the next time")
    found, bad = embedder.embed_folder(files.bad)
    about = describe(layer, pooling)
    write(found, files.out, {"weights": weights, "features": about})
    print(f"{files.out}: {len(found):,} x {found.features.shape[1]} features, {about}")
    if bad:
        print(f"{bad} of {bad + len(found)} images could not be read, left out: see {files.bad}")
    found = replace(found, scores=score(found, ks, temperature, l2, fabric.device))
    print(score_table(found))
    if map != "none":
        title = f"{'/'.join(Path(weights).parts[-2:])}: {about}"
        _draw_map(found, files.map, map, map_points, seed, title)
    if neighbours:
        _draw_neighbours(found, embedder, queries, neighbours, files.neighbours)
    return found


@dataclass(frozen=True)
class Outputs:
    """The files that the command writes.

    Attributes:
        out: The features; the names of the others are made from its name.
    """

    out: Path

    @property
    def map(self) -> Path:
        """The map of the features."""
        return self.out.with_name(f"{self.out.stem}.map.png")

    @property
    def neighbours(self) -> Path:
        """Images beside their nearest neighbours."""
        return self.out.with_name(f"{self.out.stem}.neighbours.png")

    @property
    def bad(self) -> Path:
        """The list of files that could not be read."""
        return self.out.with_name(f"{self.out.stem}.{FILE}")

    def check(self, has_map: bool, has_neighbours: bool, overwrite: bool) -> None:
        """Refuse, before any work is done, what could not be written in the end.

        Raises:
            ValueError: If a file is there already and must not be replaced, or its kind is unknown.
        """
        check_format(self.out)
        wanted = [self.out, self.bad]
        wanted += [self.map] * has_map + [self.neighbours] * has_neighbours
        there = [path for path in wanted if path.exists()]
        if there and not overwrite:
            raise ValueError(
                f"{there[0]} is there already: give another --out, or --overwrite true"
            )
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.bad.unlink(missing_ok=True)


@dataclass(frozen=True)
class Embedder:
    """What turns image files into embeddings.

    Attributes:
        data: How a file becomes pixels, and which part of the folder it belongs to.
        fabric: What computes.
        reader: Pixels -> embedding.
    """

    data: ImageFolderData
    fabric: Fabric
    reader: Any

    def embed_folder(self, bad_files: Path) -> tuple[Embeddings, int]:
        """Embed every image of the folder, once, in the order of the folders.

        Args:
            bad_files: Where those that cannot be read are listed.

        Returns:
            The embeddings without scores, and how many images could not be read.
        """
        data = self.data
        parts = read_parts(data.root, data.val_fraction, data.split_seed, data.group_pattern)
        indices = {id(part.files): part.files for part in parts.values()}  # a split's is one
        found = join([self._embed_index(i, parts, bad_files) for i in indices.values()])
        _check_finite(found)
        return found, sum(map(len, indices.values())) - len(found)

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[Tensor]) -> Tensor:
        """Embed what `picture` gives, -> (n, D)."""
        return torch.cat([self._run(picture[None]) for picture in pictures])

    def picture(self, path: Path) -> Tensor:
        """Read an image as the encoder sees it but for the normalisation, (C, H, W).

        Raises:
            UnreadableImage: With the file's name and the reason.
        """
        place, data = self._place_in_shards(path), self.data
        if self._packed is None or place is None:
            pixels = read_image(str(path), data.in_chans, data.intensity)
        else:
            images = ImageData(
                self._packed, data.val_transform, in_chans=data.in_chans, intensity=data.intensity
            )
            pixels = images.read(place)
        return cast(Tensor, self.data.val_transform(pixels, iter(()))["image"])

    @cached_property
    def _packed(self) -> PackedIndex | None:
        root = self.data.root
        return join_packed(root, read_packed(root)) if is_packed(root) else None

    def _place_in_shards(self, path: Path) -> int | None:
        """Place of an image in the packed folder; None where there is no such folder or image."""
        if self._packed is None:
            return None
        return self._packed.find(os.path.relpath(path, self.data.root).replace(os.sep, "/"))

    def _embed_index(self, files: FileIndex, parts: dict[str, Part], bad_files: Path) -> Embeddings:
        data = self.data
        images = WholeFolder(
            files, data.val_transform, in_chans=data.in_chans, intensity=data.intensity
        )
        features = self._embed_images(images)
        if images.unreadable.any():
            write_bad_files(images, bad_files)
        read = np.flatnonzero(images.unreadable.numpy() == 0)
        labels = np.full(len(files), -1) if files.labels is None else files.labels.numpy()
        below = os.path.relpath(files.root, data.root).replace(os.sep, "/")
        names = [
            files.name(i) if below == "." else f"{below}/{files.name(i)}" for i in read.tolist()
        ]
        return Embeddings(
            features=features.numpy()[read],
            paths=np.array(names, dtype=str),
            labels=labels[read],
            classes=np.array(files.classes, dtype=str),
            parts=_part_names(files, parts)[read],
        )

    @torch.inference_mode()
    def _embed_images(self, images: WholeFolder) -> Tensor:
        """Embed the images, -> (n, D); a row of zeros for each that cannot be read."""
        features = torch.empty(0)
        for batch in Bar(self._loader(images), desc="Embed", delay=1.0):
            rows = self._run(batch["image"])
            if not len(features):
                features = torch.zeros(len(images), rows.shape[1])
            features[batch["index"]] = rows
        return features

    def _run(self, images: Tensor) -> Tensor:
        try:
            return cast(Tensor, self.reader(self.fabric.to_device(images)).cpu())
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the device's memory is full: use a smaller --batch_size than {len(images)}"
            ) from error

    def _loader(self, images: WholeFolder) -> Loader[Any]:
        workers = self.data.num_workers
        workers = default_workers(images) if workers is None else workers
        workers = min(workers, -(-len(images) // self.data.batch_size))
        return Loader(
            images,
            batch_size=self.data.batch_size,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self.fabric.device.type == "cuda",
        )


def find_query(root: str, name: str) -> Path:
    """Find an image that is asked for: a path below the root, or any file.

    Raises:
        ValueError: If there is no such file.
    """
    if is_packed(root) and join_packed(root, read_packed(root)).find(name) is not None:
        return Path(root, name)
    for path in (Path(root, name), Path(name).expanduser()):
        if path.is_file():
            return path
    raise ValueError(f"--query {name} is no file, neither below {root} nor by itself")


def _fabric(accelerator: str, precision: Any) -> Fabric:
    try:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    except RuntimeError as error:
        raise ValueError(
            f"--accelerator {accelerator} is not to be had on this machine: leave it out"
        ) from error


def _reader(backbone: Backbone, layer: int | None, pooling: str) -> nn.Module:
    layers = choose_layers(layer, backbone.model, backbone.encoder)
    mean, std = backbone.statistics or imagenet_statistics(backbone.in_chans)
    return Reader(backbone.model, mean, std, layers, pooling).eval()


def _part_names(files: FileIndex, parts: dict[str, Part]) -> npt.NDArray[np.str_]:
    """The part that each file of an index belongs to."""
    names = np.full(len(files), "train")  # the longest name
    for name, part in parts.items():
        if part.files is files:
            names[slice(None) if part.places is None else part.places] = name
    return names


def _check(
    ks: Sequence[int], temperature: float, l2: float, map_points: int, neighbours: int
) -> None:
    """Refuse numbers that have no meaning."""
    least = {"k": min(ks, default=0), "map_points": map_points}
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"--{name} {value} is too small: use 1 or more")
    for name, number in {"temperature": temperature, "l2": l2}.items():
        if not number > 0:
            raise ValueError(f"--{name} {number} is too small: use a positive number")
    if neighbours < 0:
        raise ValueError(f"--neighbours {neighbours} is negative: use 0 to draw none")


def _check_finite(found: Embeddings) -> None:
    wrong = np.flatnonzero(~np.isfinite(found.features).all(1))
    if len(wrong):
        raise ValueError(
            f"the features of {len(wrong)} images are not finite, the first is "
            f"{found.paths[wrong[0]]}: use --precision 32-true, or other weights"
        )


def _draw_map(
    found: Embeddings, path: Path, method: str, points: int, seed: int, title: str
) -> None:
    if len(found) < 3:
        print(f"no map: it takes 3 images, there are {len(found)}")
        return
    places = choose(len(found), points)
    if len(places) < len(found):
        print(f"the map shows {len(places):,} of {len(found):,} images, chosen at random")
    rank_zero_info(f"laying out a map of {len(places):,} images")
    labels, classes = found.labels[places], found.classes.tolist()
    figure = draw_map(found.features[places], labels, classes, method, seed, title)
    with written_whole(path) as part:
        save_figure(figure, part)
    print(f"{path}: a map of the features")


def _draw_neighbours(
    found: Embeddings, embedder: Embedder, queries: Sequence[Path], n: int, path: Path
) -> None:
    if len(found) < 2:
        print(f"no neighbours: it takes 2 images, there is {len(found)}")
        return
    root = Path(embedder.data.root)
    queries = queries or [root / name for name in _examples(found)]
    pictures = [embedder.picture(query) for query in queries]
    place_of = {os.path.realpath(root / name): i for i, name in enumerate(found.paths.tolist())}
    own = [place_of.get(os.path.realpath(query), -1) for query in queries]
    features = embedder.embed_pictures(pictures)
    similarity, nearest = most_similar(torch.from_numpy(found.features), features, n, own)
    rows = []
    for query, picture, place, near, values in zip(
        queries, pictures, own, nearest.tolist(), similarity.tolist(), strict=True
    ):
        name = found.class_of(place) if place >= 0 else ""
        row = [Tile(picture, name or query.name)]
        for i, value in zip(near, values, strict=True):
            other = found.class_of(i)
            agrees = name == other if name and other else None
            tile = embedder.picture(root / found.paths[i])
            row.append(Tile(tile, f"{value:.3f}\n{other}".strip(), agrees))
        rows.append(row)
    with written_whole(path) as part:
        draw_neighbours(rows).save(part, format="png")
    print(f"{path}: images (left) and their nearest neighbours, by cosine similarity")


def _examples(found: Embeddings) -> list[str]:
    """A few images spread over the held-out ones, so over their classes too; else over all."""
    places = np.flatnonzero(np.isin(found.parts, HELD_OUT))
    places = places if len(places) else np.arange(len(found))
    n = min(EXAMPLES, len(places))
    # The middle of each of n equal stretches: the classes lie one behind the other.
    return cast(
        list[str], found.paths[places[(2 * np.arange(n) + 1) * len(places) // (2 * n)]].tolist()
    )
