"""`simmim classify`: from a run of pretraining to predictions, pictures, and every config."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageFont

from simmim.callbacks.classification import (
    _brief,
    _row_names,
    draw_confusion,
    label_of,
    merge_parts,
)
from simmim.classify import Classifier
from simmim.data.classification import ClassificationData
from simmim.task import Task
from simmim.weights import load_encoder
from support.commands import QUIET, SMALL, column, quiet, refused, state, table
from support.folders import make_classes, save

FROM_SCRATCH = [*SMALL, "--data.root=images", "--data.batch_size=4", "--model.warmup_epochs=0"]


@pytest.fixture
def folder(workdir: Path) -> Path:
    """A folder of two classes, in the working folder."""
    return make_classes(Path("images"), names="cat dog")


@pytest.mark.slow
def test_from_pretraining_to_predictions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.mask_patch_size=8", "--trainer.max_epochs=1", "--probe.every_n_epochs=0"]
    statistics = "--data.statistics=[[0.5, 0.5, 0.5], [0.3, 0.3, 0.3]]"
    quiet("pretrain fit --name=pre --trainer.logger=false", *FROM_SCRATCH, *options, statistics)
    begun = ["--model.weights=runs/pre/version_0", "--data.root=images"]
    few = ["--data.batch_size=8", "--trainer.max_epochs=2", "--model.warmup_epochs=1"]
    few += ["--trainer.log_every_n_steps=1", "--model.ema_decay=0.5"]
    quiet("classify fit --name=cls", *begun, *few)
    done = Path("runs/cls/version_0")
    last = state(done)
    assert last["hyper_parameters"]["num_classes"] == 2
    assert last["hyper_parameters"]["img_size"] == 32  # the weights'
    assert last["state_dict"]["mean"].unique().tolist() == [0.5]
    assert {"val/top1", "val/loss", "train/loss", "lr"} <= set(table(done / "metrics.csv")[0])
    shares = column(done / "metrics.csv", "val/top1")
    assert state(done, "best")["epoch"] == shares.index(max(shares))
    assert (done / "confusion_matrix.png").exists()
    assert (done / "classes.csv").read_text().startswith("class,images,recognised,accuracy\ncat,1,")

    sentence = refused(capsys, "classify validate", *begun, *QUIET, status=1)
    assert "not trained yet" in sentence
    sentence = refused(capsys, "classify fit --data.root=images --model.weights=no/such")
    assert sentence.startswith("simmim: no/such does not exist: give")
    Path("notes.txt").write_text("cats and dogs\nand more\n")
    sentence = refused(capsys, "classify fit --data.root=images --model.weights=notes.txt")
    assert "notes.txt is not a file of weights" in sentence

    shutil.rmtree("runs/pre")  # a run goes on without what it began from
    quiet("classify fit --name=cls --ckpt_path=last --trainer.max_epochs=3")
    config = yaml.safe_load((done / "config.yaml").read_text())
    assert config["model"]["weights"] == "runs/pre/version_0"
    assert sorted(path.name for path in Path("runs/cls").iterdir()) == ["version_0"]
    quiet("classify validate --ckpt_path=runs/cls/version_0")
    quiet("classify predict --ckpt_path=runs/cls/version_0 --data.root=images/cat")
    rows = [list(row.items()) for row in table(done / "predictions.csv")]
    names = ["path", "label", "probability of cat", "probability of dog"]
    assert [name for name, _ in rows[0]] == names
    assert [Path(row[0][1]).name for row in rows] == [f"{i:03d}.png" for i in range(10)]
    for _, (_, label), *shares in rows:
        cat, dog = (float(share) for _, share in shares)
        assert cat + dog == pytest.approx(1, abs=1e-5)
        assert label == ["cat", "dog"][dog > cat]


@pytest.mark.slow
def test_the_average_is_what_is_validated_kept_and_predicted_with(folder: Path) -> None:
    options = ["--name=ema", "--model.ema_decay=0.9", "--model.base_lr=1", "--seed_everything=1"]
    quiet("classify fit --trainer.max_epochs=4", *FROM_SCRATCH, *options)
    done = Path("runs/ema/version_0")
    average, current = (state(done)[name] for name in ("state_dict", "current_model_state"))
    head = "encoder.model.head.weight"
    assert not torch.equal(average[head], current[head])
    logged = column(done / "metrics.csv", "val/loss")
    quiet("classify validate --ckpt_path=runs/ema/version_0")
    again = column(done / "validate.csv", "val/loss")
    assert again[-1] == pytest.approx(logged[-1], rel=1e-5)
    quiet("classify predict --ckpt_path=runs/ema/version_0 --data.root=images")
    share = column(done / "predictions.csv", "probability of dog")[0]
    model = Classifier.load_from_checkpoint(done / "checkpoints/last.ckpt").eval()
    pixels = torch.tensor(np.asarray(Image.open(folder / "cat" / "000.png"))).permute(2, 0, 1)
    with torch.no_grad():
        found = float(model(model.normalize(pixels[None])).softmax(1)[0, 1])
    assert found == pytest.approx(share, abs=1e-4)
    assert torch.equal(load_encoder(done).head.weight, average[head])  # what is exported
    quiet("classify fit --trainer.max_epochs=5 --ckpt_path=last", *FROM_SCRATCH, *options)


@pytest.mark.slow
def test_several_labels_from_fit_to_predict(folder: Path) -> None:
    rows = [
        f"{kind}/{i:03d}.png,{kind};{'odd' if i % 2 else 'even'}"
        for kind in ("cat", "dog")
        for i in range(10)
    ]
    Path("labels.csv").write_text("\n".join(["path,labels", *rows]))
    options = ["--data.labels=labels.csv", "--model.multi_label=true", "--trainer.max_epochs=2"]
    options += ["--model.class_weights=balanced", "--data.val_fraction=0.3"]
    quiet("classify fit --name=several", *FROM_SCRATCH, *options)
    done = Path("runs/several/version_0")
    shares = column(done / "metrics.csv", "val/mean_ap")
    assert state(done, "best")["epoch"] == shares.index(max(shares))
    rows = (done / "classes.csv").read_text().splitlines()
    assert rows[0] == "class,images,ap,auroc,f1"
    assert [row.split(",")[0] for row in rows[1:]] == ["cat", "dog", "even", "odd"]
    quiet("classify test --ckpt_path=runs/several/version_0")
    Path("labels.csv").unlink()  # not needed to predict
    for name in ("predictions.csv", "predictions_2.csv"):  # an earlier table stays
        quiet("classify predict --ckpt_path=runs/several/version_0 --data.root=images/cat")
        found = table(done / name)
        assert len(found) == 10
        for row in found:
            names = ("cat", "dog", "even", "odd")
            likely = [name for name in names if float(row[f"probability of {name}"]) > 0.5]
            assert row["label"] == ";".join(likely)


@pytest.mark.slow
def test_a_folder_that_lacks_a_class_is_scored_by_name(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gray = {"cat": 20, "dog": 130, "eel": 240}
    for root, names in {"all": "cat dog eel", "two": "dog eel", "new": "dog fox"}.items():
        for name in names.split():
            for i in range(10):
                save(Path(root, name, f"{i}.png"), np.full((32, 32), gray.get(name, 0) + i))
    options = ["--data.batch_size=6", "--data.val_fraction=0.5", "--model.base_lr=0.05"]
    options += ["--model.warmup_epochs=0", "--trainer.max_epochs=40", "--data.root=all"]
    quiet("classify fit --name=three", *SMALL, *options)
    Path("two/cat").mkdir()
    shares = []
    for root in ("all", "two"):
        quiet(f"classify validate --ckpt_path=runs/three/version_0 --data.root={root}")
        shares.append(table(Path("runs/three/version_0/validate.csv"))[-1])
    for name in ("dog", "eel"):
        assert shares[1][f"val/top1_class/{name}"] == shares[0][f"val/top1_class/{name}"]
    assert float(shares[1]["val/top1_class/eel"]) > 0.5
    line = "classify test --ckpt_path=runs/three/version_0 --data.root=new"
    said = refused(capsys, line, status=1)
    assert "the data has the classes dog, fox, this classifier knows cat, dog, eel" in said


@pytest.mark.slow
def test_a_probe_is_one_option_away(tiny_run: Callable[[str], Path]) -> None:
    options = ["--data.root=images", "--model.frozen=true", "--model.layer=1"]
    quiet(f"classify fit --model.weights={tiny_run('pretrain')} --trainer.max_epochs=1", *options)
    kept = yaml.safe_load(Path("runs/linear_probe/version_0/config.yaml").read_text())
    assert kept["model"]["frozen"]
    assert kept["model"]["base_lr"] == 0.1  # the probe's recipe, not that of fine-tuning


@pytest.mark.parametrize(
    ("monitor", "mode"), [("val/loss", "min"), ("val/top1", "max"), ("val/map", "max")]
)
def test_the_best_is_chosen_by_what_the_task_says(monitor: str, mode: str) -> None:
    def best_by(said: Any) -> tuple[str, str]:
        task = Task("classify", Classifier, ClassificationData, "", {}, monitor=said)
        return task.best_by(Classifier(encoder="resnet10t", num_classes=2))

    assert best_by(monitor) == best_by(lambda model: monitor) == (monitor, mode)


# Pictures and tables -----------------------------------------------------------------------------


def test_the_confusion_matrix_is_drawn() -> None:
    counts = torch.tensor([[9, 1], [0, 0]])
    picture = draw_confusion(counts, ["cat", "dog"])
    corner = picture.width - 8 - 2 * 120, picture.height - 8 - 2 * 120
    shades = [
        picture.getpixel((corner[0] + x * 120 + 3, corner[1] + y * 120 + 3))
        for y in range(2)
        for x in range(2)
    ]
    assert shades[0] < shades[1] < shades[2] == shades[3]  # dark = 9 of 10, ..., 0 of 0
    assert draw_confusion(torch.eye(1000).long(), [str(i) for i in range(1000)]).width > 2000


def test_names_that_cannot_be_drawn_are_numbers_and_long_ones_keep_both_ends() -> None:
    font = ImageFont.load_default(size=12)
    long = "a very long class name"
    names = ["cat", "10", "日本語", f"{long} of cats", f"{long} of dogs"]
    shown = _row_names(names, font)
    assert shown[:3] == ["cat", "10", "class 2"]
    assert len(set(shown)) == 5
    assert max(map(len, shown)) == 18
    many = _row_names([f"name {i}" for i in range(100)], font)
    assert [name for name in many if name] == [str(i) for i in range(0, 100, 10)]
    assert [_brief(n) for n in (7, 9999, 11_367, 123_456)] == ["7", "9999", "11k", "123k"]


def test_tables_of_several_processes_are_merged_in_order(tmp_path: Path) -> None:
    parts = [tmp_path / "0", tmp_path / "1"]
    parts[0].write_text("0,a.png,cat\n2,c.png,cat\n")
    parts[1].write_text("1,b.png,dog\n")
    merge_parts(parts, tmp_path / "all.csv", ["path", "label"])
    merged = (tmp_path / "all.csv").read_text().split()
    assert merged == ["path,label", "a.png,cat", "b.png,dog", "c.png,cat"]
    assert not parts[0].exists()
    assert label_of([0.2, 0.5, 0.3], ["a", "b", "c"], several=False) == "b"
    assert label_of([0.7, 0.2, 0.6], ["a", "b", "c"], several=True) == "a;c"
