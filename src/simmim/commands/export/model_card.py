"""The README.md of an export: what it is, what it takes, how to load it, how it was checked."""

from collections.abc import Sequence

import simmim
from simmim.commands.export.check import Check
from simmim.commands.export.graph import Graph, output_name
from simmim.commands.export.source import Source

SHOWN = 20  # classes that are named


def model_card(
    source: Source,
    name: str,
    graph: Graph | None,
    file: str,
    checks: Sequence[Check],
    notes: Sequence[str],
    repo: str | None = None,
) -> str:
    """Write the card.

    Args:
        source: What was exported.
        name: The folder's name.
        graph: What was written to `file`; None for a folder of timm's.
        file: The file with the weights.
        checks: Comparisons with the original.
        notes: What differs.
        repo: USER/NAME on the Hugging Face Hub, if it goes there.
    """
    task = "image-classification" if _gives_logits(source, graph) else "image-feature-extraction"
    library = "timm" if graph is None else file.rpartition(".")[2].replace("pt2", "pytorch")
    tags = ["simmim", task, *(["timm", "transformers"] if graph is None else [])]
    front = ["---", "tags:", *(f"- {tag}" for tag in tags)]
    front += [f"pipeline_tag: {task}", f"library_name: {library}", "---"]
    sections = [
        "\n".join(front),
        f"# {(repo or name).rpartition('/')[2]}",
        _what(source, graph),
        "## Input\n\n" + _input(source, graph),
        "## Output\n\n" + _output(source, graph),
        "## Use\n\n" + _use(source, graph, file, name, repo),
        "## Checked\n\n" + _checked(checks, notes),
        "## Licence\n\nNot stated. Add `license:` to the lines at the top; it depends on the "
        "images and the weights that this model was trained with.",
    ]
    return "\n\n".join(sections) + "\n"


def _gives_logits(source: Source, graph: Graph | None) -> bool:
    return source.is_classifier and (graph is None or output_name(graph, source) == "logits")


def _what(source: Source, graph: Graph | None) -> str:
    million = sum(p.numel() for p in source.model.parameters()) / 1e6
    kind = "A classifier" if _gives_logits(source, graph) else "An image encoder"
    return (
        f"{kind}: timm's `{source.architecture.encoder}` with {million:.2f} million parameters. "
        f"{source.history} Exported by simmim {simmim.__version__}."
    )


def _input(source: Source, graph: Graph | None) -> str:
    chans, height, width = source.shape
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in source.statistics)
    lines = [f"- Images of {height} x {width} pixels (height x width), channels: {chans}."]
    formula = f"mean {mean} and standard deviation {std}, of pixels in 0..1"
    if graph is not None and graph.normalize:
        lines.append(f"- Pixels in 0..1; the model normalises them itself, with {formula}.")
    else:
        lines.append(f"- Normalised: `(pixels - mean) / std` with {formula}.")
    crop = source.crop
    lines.append(
        f"- Evaluated on the middle of the image, {crop.get('crop_pct', 1.0):g} of its shorter "
        f"side, resized by {crop.get('interpolation', 'bicubic')} interpolation."
    )
    return "\n".join(lines)


def _output(source: Source, graph: Graph | None) -> str:
    if _gives_logits(source, graph):
        return _classes(source)
    embedding = "the mean of `forward_features` over the patches"
    if graph is None:
        return (
            "`forward_features` gives the features, `forward` what timm pools of them. An encoder "
            f"of masked image modelling has no trained class token: {embedding} describes an image "
            "better."
        )
    return {
        "forward": "What timm's `forward` gives without a classifier. An encoder of masked image "
        f"modelling has no trained class token: {embedding} (`--output embedding`) describes an "
        "image better.",
        "embedding": f"One vector an image, {embedding}.",
        "features": "The feature map, (batch, channels, height, width), behind the last norm.",
    }[graph.output]


def _classes(source: Source) -> str:
    names = source.classes
    if not names:
        return f"Logits of {source.model.num_classes} classes, whose names are not known."
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:SHOWN]))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    function = "sigmoid, as an image can have several" if source.multi_label else "softmax"
    return f"Logits of {len(names)} classes (probabilities: {function}): {shown}{more}."


def _use(source: Source, graph: Graph | None, file: str, name: str, repo: str | None) -> str:
    shape = ", ".join(str(n) for n in source.shape)
    images = f"torch.rand(1, {shape})"
    if graph is None:
        return _use_of_timm(source, images, name, repo)
    fetch = f'"{name}/{file}"'
    head = "import torch\n"
    if repo:
        head += "from huggingface_hub import hf_hub_download\n"
        fetch = f'hf_hub_download("{repo}", "{file}")'
    if file.endswith(".onnx"):
        return _python(
            f"import onnxruntime\n{head}\nsession = onnxruntime.InferenceSession({fetch})\n"
            f"images = {images}  # yours, as above\n"
            'output, = session.run(None, {"images": images.numpy()})'
        )
    return _python(
        f"{head}\nmodel = torch.export.load({fetch}).module()\n"
        f"images = {images}  # yours, as above\noutput = model(images)"
    )


def _use_of_timm(source: Source, images: str, name: str, repo: str | None) -> str:
    where = f"hf-hub:{repo}" if repo else f"local-dir:{name}"
    auto = "AutoModelForImageClassification" if source.is_classifier else "AutoModel"
    result = "logits" if source.is_classifier else "last_hidden_state"
    timms = _python(
        "import timm\nimport torch\n\n"
        f'model = timm.create_model("{where}", pretrained=True).eval()\n'
        f"images = {images}  # yours, as above\noutput = model(images)"
    )
    theirs = _python(
        f"import torch\nfrom transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("{repo or name}").eval()\n'
        f"images = {images}  # yours, as above\noutput = model(images).{result}"
    )
    ours = _python(
        f'from simmim import load_encoder\n\nencoder = load_encoder("{name}")  # a timm model'
    )
    return f"timm:\n\n{timms}\n\nHugging Face:\n\n{theirs}\n\nsimmim, from the folder:\n\n{ours}"


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _checked(checks: Sequence[Check], notes: Sequence[str]) -> str:
    lines = ["Read back and compared with the original on batches of 1 and 3 images of noise:", ""]
    lines += [f"- {check}" for check in checks]
    lines += [f"- Note: {note}." for note in notes]
    return "\n".join(lines)
