"""Files of weights are found, and opened without running anything in them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from simmim.commands.convert import convert
from simmim.pretrain import load_official
from simmim.weights import find_checkpoint, load_encoder
from simmim.weights.files import is_url, read_checkpoint, read_folder


def test_a_file_and_the_folder_of_a_run(tmp_path: Path) -> None:
    last = tmp_path / "digits" / "version_3" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    assert find_checkpoint(last) == last
    assert find_checkpoint(str(last)) == last
    assert find_checkpoint(last.parents[1]) == last
    assert find_checkpoint(last.parent) == last
    with pytest.raises(ValueError, match=r"no checkpoints/last.ckpt: give .*digits.version_3$"):
        find_checkpoint(tmp_path / "digits")


@pytest.mark.parametrize(
    "url", ["https://example.org/x.ckpt", "s3://bucket/x.ckpt", "hf://a/b", "file:///x.ckpt"]
)
def test_urls_are_refused(url: str) -> None:
    assert is_url(url)
    for open_it in (find_checkpoint, load_encoder, load_official):
        with pytest.raises(ValueError, match="is a URL: download the file first"):
            open_it(url)


def test_paths_are_no_urls_and_must_exist(tmp_path: Path) -> None:
    for path in ("C:/x.ckpt", "C:\\x.ckpt", "/x/y.ckpt", "timm:x", "x.ckpt"):
        assert not is_url(path)
    with pytest.raises(ValueError, match="does not exist: give a checkpoint or the folder"):
        find_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"has no checkpoints/last.ckpt$"):
        find_checkpoint(tmp_path)


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"echo caught > {self.path}",)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    caught = tmp_path / "caught"
    for name, content in {
        "config.pth": {"model": {"x": torch.zeros(1)}, "config": Trap(caught)},
        "tensors.pth": Trap(caught),
        "last.ckpt": {"state_dict": {}, "hyper_parameters": {"encoder": Trap(caught)}},
    }.items():
        path = tmp_path / name
        torch.save(content, path)
        for open_it in (load_official, load_encoder, lambda p: convert(p, tmp_path / "out")):
            with pytest.raises(ValueError, match=r"asks to run \w+.system while it is opened") as e:
                open_it(path)
            assert "\n" not in str(e.value)
    assert not caught.exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"x": torch.randn(100)}, path)
    truncated = path.read_bytes()[:-200]
    for content in (b"", b"hello, world\n", b"\x80\x02}q\x00.", b"PK\x03\x04 zip?", truncated):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a file of weights that torch can read") as e:
            read_checkpoint(path)
        assert "\n" not in str(e.value)


def test_what_holds_no_table_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds a list, not a table of weights"):
        read_checkpoint(tmp_path / "x.pth")
    for content in ({"model": {}}, {"model": 3}):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match="holds no tensors under 'model'"):
            load_encoder(tmp_path / "x.pth")
    torch.save({"model": {"x": 3}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="'x' is not a tensor"):
        load_encoder(tmp_path / "x.pth")


def test_folders_in_one_file_or_in_shards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model.safetensors nor pytorch_model.bin"):
        read_folder(tmp_path)
    tensors = {"a": torch.randn(2), "b": torch.randn(3)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert torch.equal(read_folder(tmp_path)["b"], tensors["b"])
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": tensors["a"] + 1}, tmp_path / "m-1.safetensors")
    save_file({"b": tensors["b"] + 1}, tmp_path / "m-2.safetensors")
    assert torch.equal(read_folder(tmp_path)["b"], tensors["b"] + 1)
    index["weight_map"]["b"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"elsewhere.safetensors', which is not in it"):
        read_folder(tmp_path)
