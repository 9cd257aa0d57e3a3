"""`simmim embed`: what is written, that the scores are those of the online probe, and mistakes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from simmim import Classifier, ImageFolderData, SimMIM, load_encoder
from simmim.callbacks import OnlineProbe
from simmim.commands.embed import embed
from simmim.commands.embed.table import Embeddings
from simmim.data.named import prepare
from simmim.data.pack import pack
from support import exhaustive
from support.commands import refused
from support.commands import simmim as run
from support.folders import make_classes, make_images
from support.training import quiet_trainer

TINY_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
QUICK: dict[str, Any] = {"num_workers": 0, "accelerator": "cpu", "map": "none", "neighbours": 0}


def save(model: Any, path: Path, **more: Any) -> str:
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save({**content, "pytorch-lightning_version": L.__version__, **more}, path)
    return str(path)


def simmim(encoder: str = "vit_tiny_patch16_224", **kwargs: Any) -> SimMIM:
    options = {"img_size": 32, "mask_patch_size": 8, "encoder_kwargs": TINY_VIT, **kwargs}
    model = SimMIM(encoder, **options)
    with torch.no_grad():
        for parameter in model.encoder.parameters():  # norms and biases that do something
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(simmim(), tmp_path_factory.mktemp("weights") / "vit.ckpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten images."""
    return make_classes(tmp_path_factory.mktemp("data") / "images", names="cat dog", size=(40, 32))


def images_by_hand(paths: list[Path]) -> torch.Tensor:
    """Images of 32 px, normalised by ImageNet's statistics."""
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def raw_images(folder: Path) -> torch.Tensor:
    """All images of a folder, as our data module gives them."""
    data = ImageFolderData(str(folder), img_size=32)
    data.setup()
    return next(iter(data.predict_dataloader()))["image"]  # type: ignore[no-any-return]


@torch.no_grad()
def assert_close(found: Embeddings, expected: Callable[[], torch.Tensor]) -> None:
    torch.testing.assert_close(torch.from_numpy(found.features), expected(), rtol=1e-4, atol=1e-5)


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


# What is written ----------------------------------------------------------------------------------


def test_npz_holds_every_image_once_in_order(tmp_path: Path, weights: str) -> None:
    root = tmp_path / "set"
    for part, names, n in (("train", "ab", 5), ("val", "ab", 3), ("test", "ab", 2)):
        make_classes(root / part, n, names)
    make_images(root / "test" / "a" / "deep" / "er", 1)
    found = embed(weights, str(root), str(tmp_path / "new" / "f.npz"), **QUICK)
    with np.load(tmp_path / "new" / "f.npz", allow_pickle=False) as file:
        content = {name: file[name] for name in file}
    assert list(content) == ["features", "paths", "labels", "classes", "parts"]
    assert all(np.array_equal(content[name], getattr(found, name)) for name in content)
    assert (content["features"].dtype, content["labels"].dtype) == (np.float32, np.int64)
    assert content["features"].shape == (21, 32)
    paths = content["paths"].tolist()
    assert paths == [
        *[f"train/{c}/{i:03d}.png" for c in "ab" for i in range(5)],
        *[f"val/{c}/{i:03d}.png" for c in "ab" for i in range(3)],
        *[f"test/a/{name}.png" for name in ("000", "001", "deep/er/000")],
        *[f"test/b/{i:03d}.png" for i in range(2)],
    ]
    assert content["classes"].tolist() == ["a", "b"]
    assert content["parts"].tolist() == [path.split("/")[0] for path in paths]
    assert content["labels"].tolist() == ["ab".index(path.split("/")[1]) for path in paths]
    model, images = load_encoder(weights).eval(), images_by_hand([root / path for path in paths])
    assert_close(found, lambda: model.forward_features(images)[:, 1:].mean(1))  # type: ignore[operator]
    assert not list(tmp_path.rglob("*.unfinished"))


def test_parquet_holds_the_same(tmp_path: Path, weights: str, folder: Path) -> None:
    found = embed(weights, str(folder), str(tmp_path / "f.parquet"), **QUICK)
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["features", "paths", "labels", "classes", "parts"]
    assert str(table.schema.field("features").type).startswith("fixed_size_list")
    assert np.array_equal(np.array(table["features"].to_pylist(), np.float32), found.features)
    assert table["paths"].to_pylist() == found.paths.tolist()
    assert table["labels"].to_pylist() == [0] * 10 + [1] * 10
    assert table["classes"].to_pylist() == ["cat"] * 10 + ["dog"] * 10
    assert table["parts"].to_pylist() == found.parts.tolist()
    assert json.loads(table.schema.metadata[b"classes"]) == ["cat", "dog"]
    assert table.schema.metadata[b"features"].startswith(b"the mean of the patch tokens")


def test_the_split_is_that_of_pretraining(tmp_path: Path, weights: str, folder: Path) -> None:
    options = {"val_fraction": 0.3, "split_seed": 5}
    found = embed(weights, str(folder), str(tmp_path / "f.npz"), **options, **QUICK)
    data = ImageFolderData(str(folder), img_size=32, **options)  # type: ignore[arg-type]
    data.setup("fit")
    held_out = {data.sets["validation"].name(i) for i in range(len(data.sets["validation"]))}
    assert set(found.paths[found.parts == "val"]) == held_out
    assert len(held_out) == 6
    assert set(found.parts) == {"train", "val"}
    assert found.paths.tolist() == sorted(found.paths.tolist())  # in the folder's order


def test_test_images_of_unknown_classes_have_no_labels(tmp_path: Path, weights: str) -> None:
    for part, name in (("train", "a"), ("train", "b"), ("test", "x")):
        make_images(tmp_path / "set" / part / name, 4)
    found = embed(weights, str(tmp_path / "set"), str(tmp_path / "f.npz"), **QUICK)
    assert found.labels[found.parts == "test"].tolist() == [-1] * 4
    assert set(found.scores) == {"val/knn_top1", "val/probe_top1", "val/commonest"}


def test_images_without_labels(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "flat", 6)
    found = embed(weights, str(tmp_path / "flat"), str(tmp_path / "f.parquet"), **QUICK)
    assert found.labels.tolist() == [-1] * 6
    assert (found.scores, found.classes.shape) == ({}, (0,))
    assert "no labels" in capsys.readouterr().out
    assert parquet.read_table(tmp_path / "f.parquet")["classes"].to_pylist() == [None] * 6


@pytest.mark.slow
def test_one_image_and_one_class(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "one" / "cat", 1)
    options = {**QUICK, "map": "tsne", "neighbours": 8}
    found = embed(weights, str(tmp_path / "one"), str(tmp_path / "f.npz"), **options)
    assert found.features.shape == (1, 32)
    said = capsys.readouterr().out
    assert "one class, 'cat'" in said
    assert "no map: it takes 3" in said
    assert "no neighbours: it takes 2" in said
    make_images(tmp_path / "one" / "cat", 3)
    embed(weights, str(tmp_path / "one"), str(tmp_path / "g.npz"), **options)
    assert (tmp_path / "g.map.png").exists()
    assert (tmp_path / "g.neighbours.png").exists()


def test_gray_and_deep_scans(tmp_path: Path) -> None:
    weights = save(simmim(in_chans=1), tmp_path / "gray.ckpt")
    (root := tmp_path / "scans").mkdir()
    ramp = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(ramp * 60).save(root / "deep.png")
    Image.fromarray(ramp.astype(np.float32)).save(root / "float.tiff")
    ranges: list[dict[str, Any]] = [{"percentiles": (0, 100)}, {"window": (0, 1e6)}]
    whole, dark = (
        embed(weights, str(root), str(tmp_path / f"{i}.npz"), **QUICK, **options).features
        for i, options in enumerate(ranges)
    )
    assert np.allclose(whole[0], whole[1], atol=1e-4)  # ranges are brought to 1
    assert np.abs(dark[0] - whole[0]).max() > 0.1


@pytest.mark.slow
def test_unreadable_files_are_left_out_and_listed_by_any_number_of_workers(
    tmp_path: Path, weights: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(folder, tmp_path / "images")
    for i in (0, 1, 7):
        (root / "cat" / f"{i:03d}.png").write_bytes(b"no image")
    rows = []
    for workers in (0, 2):
        out = tmp_path / f"{workers}.npz"
        options: dict[str, Any] = {**QUICK, "num_workers": workers, "batch_size": 2}
        found = embed(weights, str(root), str(out), **options)
        assert not {"cat/000.png", "cat/001.png", "cat/007.png"} & set(found.paths)
        assert found.labels.tolist() == [0] * 7 + [1] * 10
        lines = out.with_suffix(".bad_files.txt").read_text().splitlines()
        names = [Path(line.split("\t")[0]).name for line in lines]
        assert names == ["000.png", "001.png", "007.png"]
        assert "3 of 20 images could not be read" in capsys.readouterr().out
        rows.append(found.features)
    assert np.array_equal(*rows)


# What is read -------------------------------------------------------------------------------------


def test_a_convolutional_encoder_gives_the_mean_of_its_last_features(
    tmp_path: Path, folder: Path
) -> None:
    sizes = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
    model = simmim("convnext_atto", encoder_kwargs=sizes)
    found = embed(save(model, tmp_path / "w.ckpt"), str(folder), str(tmp_path / "f.npz"), **QUICK)
    images = model.normalize(raw_images(folder))
    assert_close(found, lambda: model.eval().encoder(images).mean((2, 3)))


def test_the_statistics_are_those_of_the_weights_and_channels_are_adapted(
    tmp_path: Path, folder: Path
) -> None:
    model = simmim()
    model.mean.fill_(0.5)
    model.std.fill_(0.25)
    path = save(model, tmp_path / "b.ckpt")
    found = embed(path, str(folder), str(tmp_path / "b.npz"), **QUICK)
    images = (raw_images(folder).float() / 255 - 0.5) / 0.25
    assert_close(found, lambda: model.eval().encoder(images).mean((2, 3)))
    options: dict[str, Any] = {"img_size": [48, 32], "in_chans": 1, "val_fraction": 0, **QUICK}
    other = embed(path, str(folder), str(tmp_path / "c.npz"), **options)
    assert other.features.shape == (20, 32)
    assert np.isfinite(other.features).all()
    assert set(other.parts) == {"train"}  # nothing is held out, so nothing is scored
    assert other.scores == {}


@pytest.mark.parametrize("pooling", ["mean", exhaustive("token")])
def test_a_fine_tuned_classifier_is_read_behind_its_norm(
    tmp_path: Path, weights: str, folder: Path, pooling: Any
) -> None:
    model = Classifier(weights, num_classes=2, pooling=pooling).eval()
    tuned = save(model, tmp_path / "tuned.ckpt", classes=["cat", "dog"])
    found = embed(tuned, str(folder), str(tmp_path / "f.npz"), pooling=pooling, **QUICK)

    def expected() -> torch.Tensor:
        tokens = model.model.forward_features(model.normalize(raw_images(folder)))
        # Mean pooling has the norm behind it; the tokens get it here, as in a probe.
        return model.model.fc_norm(tokens[:, 1:]).mean(1) if pooling == "mean" else tokens[:, 0]

    assert_close(found, expected)


# Scores -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 of the digits, a quarter of them in val/."""
    root = tmp_path_factory.mktemp("data")
    prepare("digits", str(root))
    kept = tmp_path_factory.mktemp("few")
    for part, n in {"train": 30, "val": 10}.items():
        for name in map(str, range(10)):
            (kept / part / name).mkdir(parents=True)
            for path in sorted((root / "digits" / part / name).iterdir())[:n]:
                shutil.copy(path, kept / part / name)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"layer": 2, "pooling": "max", "k": 5, "temperature": 0.2, "l2": 10.0}]
)
def test_scores_are_those_of_the_online_probe(
    tmp_path: Path, weights: str, digits: Path, options: dict[str, Any]
) -> None:
    probe = OnlineProbe(**options)
    model = SimMIM.load_from_checkpoint(weights)
    data = ImageFolderData(str(digits), img_size=32, num_workers=0)
    quiet_trainer(tmp_path, probe).validate(model, data, verbose=False)
    found = embed(weights, str(digits), str(tmp_path / "f.npz"), **options, **QUICK)
    assert found.scores["val/knn_top1"] == probe.pretrained["knn_top1"]
    assert found.scores["val/probe_top1"] == probe.pretrained["probe_top1"]
    assert found.scores["val/probe_top1"] > 0.5
    assert found.scores["val/commonest"] == pytest.approx(0.1)


@pytest.mark.slow
def test_several_k_and_two_held_out_parts(
    tmp_path: Path, weights: str, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "three"
    shutil.copytree(digits, root)
    shutil.copytree(digits / "val", root / "test")
    scores = embed(weights, str(root), str(tmp_path / "f.npz"), k=[1, 20], **QUICK).scores
    one = embed(weights, str(root), str(tmp_path / "g.npz"), k=1, **QUICK)
    assert scores["val/knn_top1_k1"] == one.scores["val/knn_top1"]
    assert scores["test/knn_top1_k20"] == scores["val/knn_top1_k20"]
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:8]]
    assert " ".join(table[0]).startswith("300 training images of 10 classes")
    value = f"{scores['val/knn_top1_k1']:.3f}"
    assert table[1:3] == [
        ["top-1", "accuracy", "val", "test"],
        [*["kNN,", "k", "=", "1"], value, value],
    ]
    assert table[5][-2:] == ["0.100", "0.100"]
    assert table[6] == ["images", "100", "100"]


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_overwritten(tmp_path: Path, weights: str, folder: Path) -> None:
    options: dict[str, Any] = {**QUICK, "map": "pca", "neighbours": 2}
    (tmp_path / "f.map.png").write_text("mine")
    with pytest.raises(ValueError, match=r"f.map.png is there already: .* --overwrite true"):
        embed(weights, str(folder), str(tmp_path / "f.npz"), **options)
    assert (tmp_path / "f.map.png").read_text() == "mine"
    assert not (tmp_path / "f.npz").exists()
    embed(weights, str(folder), str(tmp_path / "f.npz"), overwrite=True, **options)
    assert picture_size(tmp_path / "f.map.png")[0] > 800


def test_what_stops_it_is_one_sentence(
    tmp_path: Path, weights: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(words: str, weights: str = weights, name: str = "f.npz", **options: Any) -> None:
        with pytest.raises(ValueError, match=words):
            embed(weights, str(folder), str(tmp_path / name), **{**QUICK, **options})
        assert not (tmp_path / name).exists()

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = simmim()
    with torch.no_grad():
        model.encoder.model.norm.bias[0] = float("nan")
    ruined = save(model, tmp_path / "w.ckpt")
    refuse(r"20 images are not finite, the first is cat/000\.png", ruined)
    monkeypatch.setattr("simmim.evaluation.readout.Reader.forward", full)
    refuse("use a smaller --batch_size than 20")
    monkeypatch.setattr("simmim.commands.embed.table.find_spec", lambda name: None)
    monkeypatch.setattr("simmim.commands.embed.pictures.find_spec", lambda name: None)
    refuse(r"pip install 'simmim\[parquet\]'", name="f.parquet")
    refuse(r"pip install 'simmim\[umap\]'", map="umap")


MISTAKES = {
    "--out=f.csv": "--out f.csv must end in .npz or .parquet",
    "--root=nowhere": "--root 'nowhere' does not exist",
    "--weights=nowhere": "nowhere does not exist",
    "--layer=4": "use 1 to 3",
    "--pooling=cls": "it takes mean or max or token",
    "--poling=max": "did you mean --pooling?",
    "--k=0": "--k 0 is too small",
    "--temperature=0": "--temperature 0.0 is too small",
    "--val_fraction=2": "--val_fraction 2.0 is out of range",
    "--group_pattern=cat": "--group_pattern 'cat' has no group",
    "--map=tsn": "did you mean tsne?",
    "--query=no.png": "--query no.png is no file",
    "--query=broken.png": "cannot be read",
    "--accelerator=mps": "--accelerator mps is not to be had",
    "--neighbours=-1": "--neighbours -1 is negative",
}


@pytest.mark.slow
def test_mistakes_are_one_sentence(
    weights: str, folder: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.png").write_text("no image")
    given = {"--weights": weights, "--root": str(folder), "--out": "f.npz", "--num_workers": "0"}
    for wrong, said in MISTAKES.items():
        args = [f"{k}={v}" for k, v in given.items() if not wrong.startswith(k)]
        assert said in refused(capsys, "embed", *args, wrong), wrong
        assert not Path("f.npz").exists()


@pytest.mark.slow
def test_from_the_command_line(
    weights: str, folder: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, "images")
    other = make_images(Path("other").absolute(), 2, size=50) / "001.png"
    queries = ["--query", "cat/003.png", f"--query={other}"]
    args = [f"--weights={weights}", "--root=images", "--out=f.npz", "--num_workers=0", *queries]
    run("embed", *args, "--k=[1, 5]", "--neighbours=3")
    said = capsys.readouterr().out
    assert "kNN, k = 5" in said
    assert "20 x 32 features, the mean of the patch tokens of the last layer" in said
    assert picture_size(Path("f.map.png"))[0] > 800
    rows, columns = 2, 1 + 3
    size = columns * (96 + 6) + 3 * 6, rows * (96 + 30 + 12) + 6
    assert picture_size(Path("f.neighbours.png")) == size
    assert "lies in --root" not in said
    run("embed", *args[:2], "--out=images/f.npz", "--map=none")
    assert "images/f.npz lies in --root" in capsys.readouterr().out
    assert "f.npz is there already" in refused(capsys, "embed", *args, status=1)


@pytest.mark.slow
def test_a_packed_folder_is_a_folder(tmp_path: Path, weights: str, folder: Path) -> None:
    packed = tmp_path / "packed"
    pack(str(folder), str(packed), "original", workers=0)
    options = {**QUICK, "neighbours": 2, "query": ["cat/003.png"]}
    found = [
        embed(weights, str(root), str(tmp_path / f"{root.name}.npz"), **options)
        for root in (folder, packed)
    ]
    assert np.array_equal(found[0].features, found[1].features)
    assert found[0].paths.tolist() == found[1].paths.tolist()
    pictures = [(tmp_path / f"{root.name}.neighbours.png") for root in (folder, packed)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
