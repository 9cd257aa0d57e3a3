"""Files that a stranger may have made: none runs code, each is refused in a sentence."""

import io
import json
import os
import pickle
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simmim import Classifier, SimMIM, load_encoder, load_official
from simmim.cli import main
from simmim.detect import Detector
from simmim.segment import Segmenter
from simmim.weights.files import read_checkpoint
from support import beyond
from support.commands import refused
from support.folders import make_classes

MODELS = (SimMIM, Classifier, Segmenter, Detector)
TINY = {"depth": 1, "embed_dim": 32, "num_heads": 2}


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What a trap makes when it is sprung."""
    yield tmp_path / "caught"
    assert not (tmp_path / "caught").exists()


def content(code: Any) -> dict[str, Any]:
    """What a checkpoint of ours holds, with an object in it."""
    return {
        "state_dict": {"encoder.model.cls_token": torch.zeros(1)},
        "hyper_parameters": {"encoder": "vit_tiny_patch16_224"},
        "pytorch-lightning_version": "2.6.6",
        "global_step": 1,
        "callbacks": {"x": code},
    }


def write_trap(path: Path, marker: Path, kind: str) -> Path:
    """Write a file of a kind that torch.save has written at some time, with code in it."""
    if kind == "symlink":
        inner = write_trap(path.with_name("inner.ckpt"), marker, "zip")
        path.symlink_to(inner)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(content(Trap(marker)), protocol=2))
    else:
        zipped = kind != "legacy"
        torch.save(content(Trap(marker)), path, _use_new_zipfile_serialization=zipped)
    return path


KINDS = ["zip", "legacy", "pickle", "symlink", "safetensors", "pt"]


@pytest.fixture
def trap(request: pytest.FixtureRequest, tmp_path: Path, marker: Path) -> Path:
    kind = request.param
    suffix = {"safetensors": ".safetensors", "pt": ".pt", "legacy": ".pth"}.get(kind, ".ckpt")
    return write_trap(tmp_path / f"trap{suffix}", marker, kind)


def test_the_trap_works(tmp_path: Path) -> None:
    torch.save(content(Trap(tmp_path / "sprung")), tmp_path / "x.ckpt")
    torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert (tmp_path / "sprung").exists()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_classes(tmp_path / "images", 8)


def commands(weights: str, root: Path, out: Path) -> dict[str, list[str]]:
    """Every command that opens weights."""
    given = {"convert": ["--out", f"{out}/x.ckpt"], "export": ["--out", f"{out}/x"]}
    given["embed"] = ["--root", str(root), "--out", f"{out}/x.npz"]
    given["compare"] = ["--root", str(root), "--out", f"{out}/x"]
    found = {name: [name, "--weights", weights, *rest] for name, rest in given.items()}
    run = ["--run_dir", f"{out}/runs", "--data.root", str(root), "--trainer.logger", "false"]
    for task in ("pretrain", "classify", "segment", "detect"):
        found[f"{task} weights"] = [task, "fit", "--model.weights", weights, *run]
        for sub in ("fit", "validate", "test", "predict"):
            found[f"{task} {sub}"] = [task, sub, "--ckpt_path", weights, *run]
    return found


def refusals(
    weights: str, root: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> dict[str, str]:
    """What each command says of a file that it must refuse."""
    lines = commands(weights, root, out)
    return {name: refused(capsys, "", *words) for name, words in lines.items()}


@pytest.mark.slow
@pytest.mark.parametrize("trap", beyond(1, KINDS), indirect=True)
def test_no_command_runs_code(
    trap: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, said in refusals(str(trap), images, tmp_path / "out", capsys).items():
        assert trap.name in said, (name, said)


@pytest.mark.slow
@pytest.mark.parametrize("trap", beyond(1, KINDS), indirect=True)
def test_no_function_runs_code(trap: Path) -> None:
    opened: list[Callable[[Path], Any]] = [m.load_from_checkpoint for m in MODELS]
    for open_it in (*opened, load_encoder, load_official, lambda p: SimMIM(weights=str(p))):
        with pytest.raises(ValueError, match=trap.name) as error:
            open_it(trap)
        assert "\n" not in str(error.value)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of the folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("trap", beyond(1, ["zip", "legacy", "pickle"]), indirect=True)
def test_code_at_a_url_is_not_run(
    trap: Path, served: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{served}/{trap.name}"
    for model in MODELS:
        with pytest.raises(ValueError, match=trap.name):
            model.load_from_checkpoint(url)
    for said in refusals(url, images, tmp_path / "out", capsys).values():
        assert "is a URL: download the file first" in said


def test_weights_at_a_url_are_those_that_are_there_now(served: str, tmp_path: Path) -> None:
    model = SimMIM("vit_tiny_patch16_224", 32, mask_patch_size=16, encoder_kwargs=TINY)
    for value in (1.0, 2.0):  # torch would take the first file of the name for the second
        torch.nn.init.constant_(model.encoder.mask_token, value)
        file = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
        torch.save({**file, "pytorch-lightning_version": "2.6.6"}, tmp_path / "last.ckpt")
        again = SimMIM.load_from_checkpoint(f"{served}/last.ckpt")
        assert (again.encoder.mask_token == value).all()


def damaged() -> dict[str, bytes]:
    """Files that are no checkpoints, or damaged ones."""
    stream, code = io.BytesIO(), content(None)
    hparams = {"encoder": "vit_tiny_patch16_224", "mask_ratio": 0.6}  # of pretraining
    ours = {**code, "hyper_parameters": hparams}
    torch.save(code, stream)
    whole = stream.getvalue()
    big = torch.zeros(1_000_000)
    flipped = bytearray(whole)
    flipped[whole.rindex(b"archive/data/0") - 60] ^= 1
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(packed, "w", 8) as target:
        for name in source.namelist():
            data = bytes(20_000_000) if name.endswith("data/0") else source.read(name)
            target.writestr(name, data)
    return {
        "claims.ckpt": rewritten(pickled({**ours, "state_dict": {"x": big}}), claim_more),
        "twice.ckpt": rewritten(whole, lambda name, data: data, twice="data/0"),
        "empty.ckpt": b"",
        "cut.ckpt": whole[: len(whole) // 2],
        "bomb.ckpt": packed.getvalue(),  # 20 MB in 20 kB
        "text.ckpt": b"hello, world\n",
        "page.pth": b"<!DOCTYPE html><html>404</html>",
        "image.pth": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "foreign.zip": packed.getvalue()[:30],
        "text.safetensors": b"hello, world\n",
        "cut.safetensors": (2**40).to_bytes(8, "little") + b"{}",
        "list.pth": pickled([1, 2]),
        "numbers.ckpt": pickled({**code, "hyper_parameters": 3, "state_dict": 4}),
        "alien.ckpt": pickled({**ours, "state_dict": {"encoder.model.x": torch.zeros(1)}}),
        "names.ckpt": pickled({**code, "state_dict": {"encoder.model.x": "y"}}),
    }


def rewritten(
    whole: bytes, change: Callable[[str, bytes], bytes], twice: str | None = None
) -> bytes:
    """A checkpoint with other records, under check sums that are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
            if twice is not None and name.endswith(twice):
                target.writestr(name.upper(), bytes(len(source.read(name))))
    return out.getvalue()


def claim_more(name: str, data: bytes) -> bytes:
    """Let tensors of a million numbers be of 2 ** 28: behind the end of their record."""
    return data.replace(MILLION, b"J\x00\x00\x00\x10") if name.endswith("data.pkl") else data


MILLION = b"J" + (1_000_000).to_bytes(4, "little")  # as a pickle writes it


def pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", beyond(3, damaged()))
def test_files_that_are_no_checkpoints_are_named(
    name: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(damaged()[name])
    for command, said in refusals(str(tmp_path / name), images, tmp_path / "out", capsys).items():
        assert name in said or "other weights" in said, (command, said)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bool, torch.float8_e4m3fn])
def test_records_are_compared_with_the_tensors_in_them(tmp_path: Path, dtype: torch.dtype) -> None:
    """Torch 2.9 would read on behind the end of a record, up to a crash."""
    one = torch.zeros(1_000_000, dtype=dtype)
    whole = pickled({"x": one, "y": one[5:], "other": torch.zeros(3)})
    (tmp_path / "x.pth").write_bytes(whole)
    assert torch.equal(read_checkpoint(tmp_path / "x.pth")["y"], one[5:])
    (tmp_path / "x.pth").write_bytes(rewritten(whole, claim_more))
    with pytest.raises(ValueError, match=r"x\.pth is damaged: copy it again"):
        read_checkpoint(tmp_path / "x.pth")


def test_every_flipped_byte_of_a_tensor_is_noticed(tmp_path: Path) -> None:
    whole = pickled({"x": torch.arange(50.0)})
    start = whole.index(torch.arange(50.0).numpy().tobytes())
    for place in range(start, start + 200, 17):
        data = bytearray(whole)
        data[place] ^= 4
        (tmp_path / "x.pth").write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.pth is damaged"):
            read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "3", '{"model_type": "vit"}', "{}"])
def test_configs_of_foreign_folders(
    text: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="foreign") as error:
        load_encoder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_timm_runs_no_code(tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "timm"
    folder.mkdir()
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0}
    (folder / "config.json").write_text(json.dumps(config))
    write_trap(folder / "pytorch_model.bin", marker, "zip")
    with pytest.raises(ValueError, match="asks to run"):
        load_encoder(folder)
    with pytest.raises((ValueError, RuntimeError, pickle.UnpicklingError)):
        load_encoder(f"timm:local-dir:{folder}")
    teacher = {"teacher": f"local-dir:{folder}"}
    with pytest.raises((ValueError, RuntimeError, pickle.UnpicklingError)):
        SimMIM("vit_tiny_patch16_224", target="features", loss="cosine", target_kwargs=teacher)
    model_args = {"checkpoint_path": str(folder / "pytorch_model.bin")}
    (folder / "config.json").write_text(json.dumps({**config, "model_args": model_args}))
    with pytest.raises((ValueError, RuntimeError, pickle.UnpicklingError)):
        load_encoder(folder)


def test_configs_run_no_yaml_tags(
    tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "x.yaml"
    config.write_text(f"model: !!python/object/apply:os.mkdir ['{marker}']\n")
    assert main(["pretrain", "fit", "-c", str(config)]) == 2
    assert "is not valid YAML" in capsys.readouterr().err


def test_arrays_hold_no_objects(tmp_path: Path, marker: Path) -> None:
    from simmim.data.decode import UnreadableImage, read_image
    from simmim.data.scans import Intensity

    np.save(tmp_path / "x.npy", np.array([[Trap(marker)]]), allow_pickle=True)
    with pytest.raises(UnreadableImage, match="no image"):
        read_image(str(tmp_path / "x.npy"), 1, Intensity())
