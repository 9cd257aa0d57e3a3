"""A model as one graph of tensor operations, for onnxruntime or for torch without timm."""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import simmim
from simmim.commands.export.check import Check, compare
from simmim.commands.export.source import Source
from simmim.encoders.dry_run import Run

Output = Literal["forward", "embedding", "features"]
ONE_FILE = 2 * 1000**3  # bytes; protobuf, which an ONNX file is, ends at 2 GiB
METADATA = "simmim.json"


class Graph(nn.Module):
    """Images -> what is asked of the model.

    Args:
        source: The model.
        output: forward (what timm's own forward gives, or a probe's logits), embedding (the mean of
            the features over the image, (B, D)), or features (the map, (B, D, h, w)).
        normalize: Whether it takes pixels in 0..1; else they are normalised already.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, source: Source, output: Output, normalize: bool) -> None:
        super().__init__()
        self.output, self.normalize = output, normalize
        self.model = source.model if source.probe is None else source.probe
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in source.statistics)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        if output != "forward":
            self.model = source.model
            chans, *size = source.shape
            name = source.architecture.encoder
            self.grid = Run(self.model, name, chans, (size[0], size[1]), 1).grid
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Run the model on (B, C, H, W)."""
        if self.normalize:
            images = (images - self.mean) / self.std
        if self.output == "forward":
            return cast(Tensor, self.model(images))
        features = self.grid.to_nchw(cast(Any, self.model).forward_features(images))
        return features.mean((2, 3)) if self.output == "embedding" else features


def write_torch(graph: Graph, source: Source, folder: Path) -> Check:
    """Write model.pt2 by torch.export, with a batch of any size, and run it."""
    program = _program(graph, source)
    # Metadata lies in the file: extra_files={"simmim.json": ""} reads it.
    metadata = {METADATA: json.dumps(describe(graph, source))}
    torch.export.save(program, folder / "model.pt2", extra_files=metadata)
    read: Any = torch.export.load(folder / "model.pt2").module()
    return compare("torch.export.load", graph, read, source.shape)


def write_onnx(graph: Graph, source: Source, folder: Path) -> Check:
    """Write model.onnx, with a batch of any size, and run it.

    From 2 GB on its weights lie beside it, in model.onnx.data.
    """
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # tells what it does not optimise
    exported = _program(graph, source)
    with contextlib.redirect_stdout(io.StringIO()), _refusing(source):  # it prints its steps
        program = torch.onnx.export(
            exported,
            dynamo=True,
            dynamic_shapes={"images": {0: "batch"}},  # its name in the file
            input_names=["images"],
            output_names=[output_name(graph, source)],
        )
    assert program is not None
    for name, value in describe(graph, source).items():
        text = value if isinstance(value, str) else json.dumps(value)
        program.model.metadata_props[name] = text
    size = sum(t.numel() * t.element_size() for t in graph.state_dict().values())
    program.save(folder / "model.onnx", external_data=size > ONE_FILE)
    return compare("onnxruntime", graph, _onnx_runner(folder / "model.onnx"), source.shape)


def check_onnx() -> None:
    """Refuse ONNX where something that it needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"--format onnx needs {' and '.join(missing)}: pip install 'simmim[onnx]'")


def describe(graph: Graph, source: Source) -> dict[str, Any]:
    """What one must know to use a graph, as plain values."""
    mean, std = source.statistics
    return {
        "made_by": f"simmim {simmim.__version__}",
        "encoder": source.architecture.encoder,
        "input": f"images, float32, (batch, {', '.join(str(n) for n in source.shape)}), "
        + ("pixels in 0..1" if graph.normalize else "normalised: (pixels in 0..1 - mean) / std"),
        "normalize": graph.normalize,
        "mean": mean,
        "std": std,
        "output": output_name(graph, source),
        "classes": source.classes if output_name(graph, source) == "logits" else [],
        "multi_label": source.multi_label,
    }


def output_name(graph: Graph, source: Source) -> str:
    """The name of what comes out."""
    if graph.output == "forward":
        return "logits" if source.is_classifier else "output"
    return graph.output


def _program(graph: Graph, source: Source) -> torch.export.ExportedProgram:
    images = torch.zeros(2, *source.shape)  # of one image torch would make a constant
    shapes = {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad(), _refusing(source):
        return torch.export.export(graph, (images,), dynamic_shapes=shapes)


@contextlib.contextmanager
def _refusing(source: Source) -> Iterator[None]:
    """Word what torch cannot do with an architecture, which it says in pages."""
    try:
        yield
    except Exception as error:  # of a dozen kinds
        name, said = source.architecture.encoder, str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch cannot make a graph of {name} for batches of any size ({said}): use --format "
            "timm"
        ) from error


def _onnx_runner(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
