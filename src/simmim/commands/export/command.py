"""`simmim export`: open, write beside, check, and only then put in place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import simmim.commands.export.graph as graphs
from simmim.base.progress import status
from simmim.commands.export.check import Check
from simmim.commands.export.hub import check_repo, push
from simmim.commands.export.model_card import model_card
from simmim.commands.export.source import Source, open_source
from simmim.commands.export.timm_folder import write_timm_folder

Format = Literal["timm", "onnx", "torch"]
FILES = {"timm": "model.safetensors", "onnx": "model.onnx", "torch": "model.pt2"}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        files: The names of the files.
        checks: Comparisons with the model in memory, on noise.
        notes: What a user must know.
        url: Where it is on the Hub, if it was pushed.
    """

    folder: Path
    files: list[str]
    checks: list[Check]
    notes: list[str]
    url: str | None = None

    def __str__(self) -> str:
        lines = [f"wrote {self.folder}: {', '.join(self.files)}"]
        lines += [f"checked by {check}" for check in self.checks]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *([f"pushed to {self.url}"] if self.url else [])])


def export(
    weights: str,
    out: str,
    format: Format = "timm",
    output: graphs.Output = "forward",
    normalize: bool = False,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    trust: bool = False,
) -> Exported:
    """Write an encoder or a classifier for use without simmim.

    What was written is read back and compared with the original before it gets its name.

    Args:
        weights: A run's folder or checkpoint of ours (of a classifier the whole, of other tasks the
            encoder), an official SimMIM or Swin release (.pth), `timm:NAME`, or a Hugging Face or
            timm folder.
        out: Folder to write.
        format: timm (config.json and model.safetensors, for timm and Hugging Face), onnx
            (model.onnx), or torch (model.pt2, by torch.export). The last two take batches of any
            size. Each gets a README.md.
        output: What onnx and torch give: forward (what timm's own forward gives: a classifier's
            logits, or else the pooled features), embedding (the mean of the features over the
            image), or features (the map).
        normalize: Let onnx and torch take pixels in 0..1, and normalise them inside. By default
            they take normalised images, as the encoder does.
        overwrite: Replace the files of an earlier export. What else the folder holds stays.
        push_to_hub: Repository USER/NAME on the Hugging Face Hub to which it is uploaded as well.
        private: Make that repository a private one.
        trust: Import an encoder that the checkpoint names by its import path, which runs its code.
            (One that a module of yours registers: --imports MODULE.)

    Returns:
        What was written.

    Raises:
        ValueError: If the model cannot be written in this format, what was written gives other
            numbers, `out` is not empty, or it cannot be pushed.
    """
    folder = Path(out).expanduser()
    _check_options(format, output, normalize, push_to_hub, private)
    _check_folder(folder, overwrite)
    with status("Reading the weights"):
        source = open_source(weights, trust=trust)
    with _beside(folder) as part:
        graph = None if format == "timm" else graphs.Graph(source, output, normalize)
        with status(f"Writing and checking {FILES[format]}"):
            checks, notes = _write(format, graph, source, part)
        notes = [*([source.left_out] if source.left_out else []), *notes]
        for check in checks:
            if not check.passed:
                raise ValueError(f"the export gives other numbers and was not kept: {check}")
        card = model_card(
            source, folder.absolute().name, graph, FILES[format], checks, notes, push_to_hub
        )
        (part / "README.md").write_text(card, encoding="utf-8")
        files = sorted(path.name for path in part.iterdir())
        _put_in_place(part, folder)
    url = push(folder, files, push_to_hub, private) if push_to_hub else None
    return Exported(folder, files, checks, notes, url)


def _write(
    format: Format, graph: graphs.Graph | None, source: Source, folder: Path
) -> tuple[list[Check], list[str]]:
    if graph is None:
        return write_timm_folder(source, folder)
    write = graphs.write_onnx if format == "onnx" else graphs.write_torch
    return [write(graph, source, folder)], []


def _check_options(
    format: str, output: str, normalize: bool, push_to_hub: str | None, private: bool
) -> None:
    for name, value, known in (
        ("format", format, get_args(Format)),
        ("output", output, get_args(graphs.Output)),
    ):
        if value not in known:
            raise ValueError(f"--{name} {value} is not known: use {', '.join(known)}")
    if format == "timm" and (normalize or output != "forward"):
        raise ValueError(
            "--output and --normalize are for onnx and torch: a timm folder holds the whole model, "
            "and its config says how to normalise"
        )
    if format == "onnx":
        graphs.check_onnx()
    if private and not push_to_hub:
        raise ValueError("--private is of the repository: give --push_to_hub USER/NAME as well")
    if push_to_hub:
        check_repo(push_to_hub)


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder for the export")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(
            f"{folder} is not empty: give another --out, or --overwrite true to replace an "
            "earlier export in it"
        )


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder beside the one that is to be, on the same disk; gone afterwards."""
    folder = folder.absolute()
    part = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _put_in_place(part: Path, folder: Path) -> None:
    if not folder.exists():
        part.rename(folder)
        return
    for path in part.iterdir():
        os.replace(path, folder / path.name)
