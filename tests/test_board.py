"""The boards: what four tasks record offline, read back curve by curve and panel by panel."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from board_records import config, history, records, summary
from simmim.callbacks.pictures import cell_origin
from simmim.runs.loggers import lineage
from support.commands import QUIET, SMALL_SIMMIM, quiet, simmim, table
from support.folders import make_boxes, make_classes, save

pytestmark = pytest.mark.slow
TINY = [*SMALL_SIMMIM, "--probe.layer=2"]
LOGGED = [*QUIET, "--trainer.log_every_n_steps=1"]
DETECTOR = ["--model.fpn_channels=16", "--model.proposals=50", "--model.rois_per_image=16"]
ALL_LOGGERS = json.dumps(
    [
        {"class_path": "WandbLogger"},
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "."}},
    ]
)
CURVES = {
    "train/loss",
    "val/loss",
    "best/loss",
    "lr",
    "throughput/images_per_s",
    "throughput/data_wait",
    "throughput/batch_size",
    "train/grad_norm",
    "memory/max_gib",
}
OF_PRETRAINING = {
    "val/avg_dist",
    "collapse/effective_rank",
    "collapse/feature_variance",
    "val/knn_top1",
    "val/probe_top1",
    "best/probe_top1",
    "attention/entropy_1",
    "attention/distance_1",
}
OWN = {"_step", "_runtime", "_timestamp", "trainer/global_step", "epoch"}  # of W&B and Lightning


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A short run of each task with all three loggers, the later three from the first."""
    place = tmp_path_factory.mktemp("boards")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HOME", str(place))
        patch.setenv("SIMMIM_CACHE", str(place / "cache"))
        patch.setenv("WANDB_MODE", "offline")
        make_classes(place / "images", 20, names="cat dog")
        make_boxes(place / "boxes", train=8, val=3)
        for part, n in (("train", 8), ("val", 3)):
            squares(place / "squares" / part, n)
        board = ["--board.tags=[small, cats]", "--board.group=first", "--board.notes=two classes"]
        found = fit("pretrain", "images", 2, *TINY, "--probe.every_n_epochs=1", *board)
        begun = f"--model.weights={found}"
        yield {
            "pretrain": found,
            "classify": fit("classify", "images", 1, begun),
            "segment": fit("segment", "squares", 1, begun),
            "detect": fit("detect", "boxes", 1, begun, "--model.img_size=[48, 64]", *DETECTOR),
        }


def fit(task: str, data: str, epochs: int, *options: str) -> Path:
    few = [f"--data.root={data}", "--data.batch_size=4", f"--trainer.max_epochs={epochs}"]
    loggers = [f"--trainer.logger={ALL_LOGGERS}", "--board.log_checkpoints=true"]
    simmim(f"{task} fit --name={task}", *few, *LOGGED, *loggers, *options)
    return Path.cwd() / "runs" / task / "version_0"


def squares(folder: Path, n: int) -> None:
    """Images with a red square on gray, and masks that say where it is."""
    for i in range(n):
        mask = np.zeros((32, 40), np.uint8)
        mask[4 + i : 20 + i, 8:24] = 1
        save(folder / "images" / f"{i}.png", np.where(mask[..., None], (220, 20, 20), (90, 90, 90)))
        save(folder / "masks" / f"{i}.png", mask)


def board_of(run: Path) -> Path:
    (board,) = (run / "wandb").glob("offline-run-*")
    return board


def media(run: Path, panel: str) -> list[list[Path]]:
    """The files of a panel at each of its steps."""
    return [[run / "files" / n for n in names] for names in history(run)[f"{panel}.filenames"]]


def artifacts(run: Path) -> list[Any]:
    return records(run, "artifact")


def table_of(run: Path, panel: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The last table of a panel, and where its files lie, by their names."""
    name, found = f"{panel}.table.json", []
    for artifact in artifacts(run):
        files = {e["path"]: e["local_path"] for e in artifact["manifest"]["contents"]}
        found += [files] if name in files else []
    return json.loads(Path(found[-1][name]).read_text()), found[-1]


def events(run: Path) -> dict[str, list[str]]:
    """What TensorBoard has, by kind."""
    return EventAccumulator(str(run / "tensorboard"), {"images": 0}).Reload().Tags()


TASKS = ("pretrain", "classify", "segment", "detect")


@pytest.mark.parametrize("task", TASKS)
def test_all_loggers_have_the_same_metrics(runs: dict[str, Path], task: str) -> None:
    values = history(board_of(runs[task]))
    panels = {key.rpartition(".")[0] for key in values if key.endswith("._type")}
    wandb = {key for key in values if key.rpartition(".")[0] not in panels}
    columns = set(table(runs[task] / "metrics.csv")[0])
    assert wandb - OWN == columns - {"step", "epoch"}
    assert set(events(runs[task])["scalars"]) == columns - {"step"}
    assert wandb >= CURVES | (OF_PRETRAINING if task == "pretrain" else set())


PANELS = {  # on W&B; what TensorBoard has as pictures, and as text; what lies in the run's folder
    "pretrain": (
        {"reconstructions", "worst"},
        {"reconstructions", "worst"},
        {"worst"},
        {"reconstructions", "worst", "worst.csv"},
    ),
    "classify": (
        {"confusion_matrix", "confusion_table", "val_predictions"},
        {"confusion_matrix", "val_predictions"},
        {"val_predictions"},
        {"confusion_matrix.png", "classes.csv", "val_predictions", "val_predictions.csv"},
    ),
    "segment": ({"segmentations"}, {"segmentations"}, set(), {"segmentations"}),
    "detect": ({"detections"}, {"detections"}, set(), {"detections"}),
}


@pytest.mark.parametrize("task", TASKS)
def test_what_is_no_number_is_on_each_board_and_in_the_folder(
    runs: dict[str, Path], task: str
) -> None:
    on_wandb, pictures, texts, files = PANELS[task]
    values = history(board_of(runs[task]))
    assert {key.rpartition(".")[0] for key in values if key.endswith("._type")} == on_wandb
    found = events(runs[task])
    assert set(found["images"]) == pictures
    assert not found["histograms"]
    assert {name.removesuffix("/text_summary") for name in found["tensors"]} >= texts
    assert {path.name for path in runs[task].iterdir()} >= files
    for path in (runs[task] / name for name in files):
        assert path.stat().st_size if path.is_file() else list(path.glob("epoch_*.png"))


def test_pictures_of_pretraining_have_a_step_for_each_look(runs: dict[str, Path]) -> None:
    board = board_of(runs["pretrain"])
    steps = media(board, "reconstructions")
    assert [len(paths) for paths in steps] == [1, 1]  # untrained, and after the last
    for epoch, (panel,) in zip((0, 2), steps, strict=True):
        drawn = Image.open(runs["pretrain"] / f"reconstructions/epoch_{epoch:04d}.png")
        assert np.array_equal(Image.open(panel), drawn)
        # original, masked, reconstruction, pasted and error, of 4 images
        assert drawn.size == cell_origin(4, 5, (128, 128))


def test_the_worst_images_are_listed_with_their_pictures(runs: dict[str, Path]) -> None:
    content, files = table_of(board_of(runs["pretrain"]), "worst")
    assert content["columns"] == ["picture", "rank", "loss", "path"]
    assert all(Path(files[row[0]["path"]]).stat().st_size for row in content["data"])
    listed = [row["path"] for row in table(runs["pretrain"] / "worst.csv")]
    assert [row[3] for row in content["data"]] == listed
    assert Path(listed[0]).is_file()


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("pretrain", ("loss", "knn_top1", "probe_top1")),
        ("classify", ("loss", "top1")),
        ("segment", ("loss", "miou")),
        ("detect", ("loss", "map")),
    ],
)
def test_the_summary_has_the_last_and_the_best(
    runs: dict[str, Path], task: str, names: tuple[str, ...]
) -> None:
    board = board_of(runs[task])
    values, said = history(board), summary(board)
    for name in names:
        best = min if name == "loss" else max
        assert said[f"val/{name}"] == values[f"val/{name}"][-1]
        assert said[f"best/{name}"] == values[f"best/{name}"][-1]
        assert said[f"best/{name}"] == best(values[f"val/{name}"][-2:])  # both epochs'


def test_a_run_says_what_it_is(runs: dict[str, Path]) -> None:
    (begun,) = records(board_of(runs["pretrain"]), "run")
    assert (begun["run_group"], begun["tags"], begun["notes"], begun["project"]) == (
        "first",
        ["small", "cats"],
        "two classes",
        "simmim",
    )
    assert [records(board_of(runs[task]), "run")[0]["job_type"] for task in TASKS] == list(TASKS)


def test_checkpoints_are_artifacts_with_a_lineage(runs: dict[str, Path]) -> None:
    board = board_of(runs["pretrain"])
    (artifact,) = (a for a in artifacts(board) if a["type"] == "model")
    (begun,) = records(board, "run")
    assert artifact["name"] == f"model-{begun['run_id']}"
    assert set(artifact["aliases"]) == {"best", "latest"}
    for task in TASKS[1:]:
        assert config(board_of(runs[task]))["lineage"] == {
            "weights": str(runs["pretrain"]),
            "run": begun["run_id"],
            "artifact": f"model-{begun['run_id']}:best",
        }


def test_predictions_and_confusion_are_tables(runs: dict[str, Path]) -> None:
    content, files = table_of(board_of(runs["classify"]), "val_predictions")
    assert content["columns"] == ["picture", "path", "label", "prediction", "probability"]
    assert {row[2] for row in content["data"]} == {"cat", "dog"}
    assert all(Path(files[row[0]["path"]]).stat().st_size for row in content["data"])
    rows = [list(row.values()) for row in table(runs["classify"] / "val_predictions.csv")]
    assert [row[1:4] for row in content["data"]] == [row[:3] for row in rows]
    content, _ = table_of(board_of(runs["classify"]), "confusion_table")
    for row in table(runs["classify"] / "classes.csv"):
        counts = [cell[2] for cell in content["data"] if cell[0] == row["class"]]
        assert sum(counts) == int(row["images"])


def test_segmentations_are_masks_that_can_be_switched(runs: dict[str, Path]) -> None:
    board = board_of(runs["segment"])
    (layers,) = history(board)["segmentations.all_masks"]
    for i, layer in enumerate(layers):
        assert layer.keys() == {"mask", "predicted"}
        truth = np.asarray(Image.open(runs["segment"].parents[2] / f"squares/val/masks/{i}.png"))
        pixels = np.asarray(Image.open(board / "files" / layer["mask"]["path"]))
        assert np.array_equal(pixels, truth)
        assert (board / "files" / layer["predicted"]["path"]).stat().st_size


def test_detections_are_boxes_that_can_be_switched(runs: dict[str, Path]) -> None:
    board = board_of(runs["detect"])
    (layers,) = history(board)["detections.all_boxes"]
    annotated = json.loads((runs["detect"].parents[2] / "boxes/val/annotations.json").read_text())
    found = 0
    for layer in layers:
        assert layer.keys() == {"truth", "prediction"}
        boxes = json.loads((board / "files" / layer["truth"]["path"]).read_text())["box_data"]
        assert all(box["box_caption"] in ("cat", "dog") for box in boxes)
        found += len(boxes)
    assert found == len(annotated["annotations"])


@pytest.fixture
def offline(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with images of two classes, and nobody who is logged in."""
    monkeypatch.setenv("HOME", str(workdir))
    monkeypatch.setenv("WANDB_MODE", "offline")
    return make_classes(Path("images"), 20)


def pretrain(*args: str) -> Path:
    data = ["--data.root=images", "--data.batch_size=8"]
    simmim("pretrain fit --name=pre", *data, *TINY, *LOGGED, *args)
    return Path("runs/pre/version_0")


@pytest.mark.exhaustive
def test_a_resumed_run_is_the_same_on_the_board(offline: Path) -> None:
    quick = ["--probe.every_n_epochs=0", "--reconstructions.every_n_epochs=0"]
    run = pretrain("--trainer.max_epochs=1", *quick)
    pretrain("--trainer.max_epochs=2", "--ckpt_path=last", *quick)
    first, second = sorted((run / "wandb").glob("offline-run-*"))
    assert not [a for a in artifacts(second) if a["type"] == "model"]  # off by default
    assert first.name.split("-")[-1] == second.name.split("-")[-1]  # the id
    before, after = (history(board)["trainer/global_step"] for board in (first, second))
    assert max(before) < min(after)
    assert max(history(second)["best/loss"]) <= min(history(first)["val/loss"])
    # What is asked of its checkpoint reads the same config.
    quiet("pretrain validate --ckpt_path=last --name=pre")


def test_lineage_of_what_is_no_run_of_ours(tmp_path: Path) -> None:
    assert lineage(None) == {}
    assert lineage("timm:vit_base_patch16_224") == {"weights": "timm:vit_base_patch16_224"}
    assert lineage(str(tmp_path / "x.pth")) == {"weights": str(tmp_path / "x.pth")}
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run_id.txt").write_text("abc\n")
    expected = {"run": "abc", "artifact": "model-abc:best"}
    for weights in (tmp_path, tmp_path / "checkpoints" / "last.ckpt"):
        assert lineage(str(weights)) == {"weights": str(weights), **expected}
