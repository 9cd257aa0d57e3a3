"""Whoever waits sees that something goes on; a log file gets whole lines."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import official_reference
from simmim.base import progress as bar
from simmim.base.progress import Bar, Lines, status
from simmim.cli import main
from simmim.data import ImageFolderData, named
from simmim.data.index import scan
from simmim.data.value_counts import count_values
from support import beyond
from support.commands import TINY, column, simmim
from support.folders import make_classes


class Terminal(io.StringIO):
    """What a terminal is sent."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@contextmanager
def terminal() -> Iterator[Terminal]:
    """A terminal for stdout and stderr, on which bars that wait a second appear at once."""
    made, screen = Bar.__init__, Terminal()

    def at_once(self: Bar, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "delay": 0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bar, "__init__", at_once)
        patch.setattr(sys, "stderr", screen)
        patch.setattr(sys, "stdout", screen)
        yield screen


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with images, and a run's weights."""
    folder = tmp_path_factory.mktemp("place")
    for split in ("train", "val"):
        make_classes(folder / "images" / split, 4)
    (folder / "tiny.yaml").write_text(TINY.replace("enable_progress_bar: false", ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        simmim("pretrain fit -c tiny.yaml --trainer.max_epochs 1")
        spec = official_reference.Swin()
        tensors = official_reference.make_tensors(spec)
        config = official_reference.config_of(spec)
        official_reference.save_file(Path("official.pth"), tensors, config)
        yield folder


@pytest.fixture
def here(place: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


RUN = "--weights runs/tiny/version_0 --root images"
TASK = "-c tiny.yaml --data.root images"
SHORT = "--root images -c tiny.yaml --workers 0 --seconds 0.01 --accelerator cpu"
COMMANDS = {
    f"pretrain fit {TASK} --trainer.max_epochs 1": ["Epoch 1/1", "Validation"],
    f"pretrain validate {TASK} --ckpt_path runs/tiny/version_0": ["Validation"],
    f"pretrain predict {TASK} --ckpt_path runs/tiny/version_0": ["Predicting"],
    f"embed {RUN} --out a.npz --map none --accelerator cpu": ["Embed", "kNN"],
    "export --weights runs/tiny/version_0 --out encoder": ["Reading", "Writing and checking"],
    "convert --weights official.pth --out ours.ckpt": ["Reading and fitting the weights"],
    "doctor --root images --workers 1 --estimate false": ["Looking", "Comparing", "/16"],
    "pack --root images --out packed --workers 1": ["Packing", "16/16"],
    f"compare {RUN} --budgets [2] --seeds 1 --epochs 1 --min_steps 1 --accelerator cpu": [
        "Run 1/2: scratch",
        "Run 2/2",
    ],
    f"benchmark {SHORT}": ["Loader", "Step", "Both together"],
    f"benchmark data {SHORT} --consumes 9": ["Reading step by step", "Reading with", "3/3"],
    "benchmark step -c tiny.yaml --steps 1 --precision 32-true --compile false": ["Steps", "4/5"],
}


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("line", beyond(1, COMMANDS), ids=lambda line: " ".join(line.split()[:2]))
def test_every_command_shows_its_progress(line: str) -> None:
    with terminal() as screen:
        status = main(line.split())
    drawn = screen.getvalue()
    assert status == 0, drawn[-2000:]
    assert "\r" in drawn
    for words in COMMANDS[line]:
        assert words in drawn


def test_what_reads_a_whole_folder_shows_its_progress(tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for i in range(5):
        values = np.random.default_rng(i).integers(0, 5000, (32, 32), dtype=np.uint16)
        Image.fromarray(values).save(scans / f"{i}.png")
    data = ImageFolderData(
        str(scans), in_chans=1, img_size=32, statistics="measured", percentiles_of="dataset"
    )
    with terminal() as screen:
        data.setup("fit")
        assert len(count_values(scan(str(scans)), None).starts) == 6
        named.prepare("digits", str(tmp_path / "data"))
    drawn = screen.getvalue()
    for words in (
        "Indexing",
        "Splitting",
        "Pixel statistics",
        "Intensities",
        "Values of the masks",
        "1797",
    ):
        assert words in drawn


# Where there is no terminal ----------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that is put forward by hand."""
    now = 1000.0

    def forward(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(bar.time, "monotonic", lambda: now)
    monkeypatch.setattr(bar, "_written", {})
    return forward


def test_a_file_gets_a_line_a_minute(clock: Callable[[float], None]) -> None:
    log = io.StringIO()
    with Bar(total=200, desc="Packing", file=log, mininterval=0) as shown:
        for _ in range(200):
            clock(1.0)
            shown.update()
    lines = log.getvalue().splitlines()
    assert [line.split("|")[0].split() for line in lines] == [
        ["Packing:", percent] for percent in ("0%", "30%", "60%", "90%", "100%")
    ]
    assert "\r" not in log.getvalue()
    assert "\x1b" not in log.getvalue()


def test_lines_of_several_bars_do_not_hide_each_other(clock: Callable[[float], None]) -> None:
    log = io.StringIO()
    for epoch in range(1, 4):
        for text in (f"\rEpoch {epoch}/3   0%|  | 0/2", "\n\x1b[A"):
            Lines(log, ends=True).write(text)
        Lines(log).write("\rValidation: 50%| | 1/2")  # leaves no line unless it takes a minute
    assert log.getvalue() == "Epoch 1/3   0%|  | 0/2\n"
    clock(60.0)
    Lines(log).write("\rValidation: 60%| | 1/2")
    assert log.getvalue().endswith("Validation: 60%| | 1/2\n")
    Lines(log, ends=True).write("\rEpoch 4/9   0%|")
    assert log.getvalue().endswith("Epoch 4/9   0%|\n")
    ends = Lines(log, ends=True)
    for text in ("\rEpoch 4/9 100%| | 2/2", "\rEpoch 4/9 100%| | 2/2, loss=1", "\r"):
        ends.write(text)
    assert log.getvalue().endswith("Epoch 4/9   0%|\nEpoch 4/9 100%| | 2/2\n")


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_run_whose_output_goes_to_a_file_leaves_whole_lines(
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    clock: Callable[[float], None],
) -> None:
    caplog.set_level("INFO")
    simmim(f"pretrain fit {TASK} --trainer.max_epochs 3 --trainer.enable_model_summary true")
    out, error = capfd.readouterr()
    assert "\r" not in out + error
    assert "\x1b" not in out + error
    epochs = [line for line in out.splitlines() if line.startswith("Epoch") and " 100%" in line]
    assert [line.split("|")[0].split() for line in epochs] == [
        ["Epoch", f"{epoch}/3", "100%"] for epoch in (1, 2, 3)
    ]
    metrics = max(Path("runs/tiny").glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    shown = [float(line.partition("val/loss=")[2].partition(",")[0]) for line in epochs]
    assert shown == pytest.approx(column(metrics, "val/loss"), abs=0.01)
    assert not any(word in out for word in ("Validation", "Training"))
    assert "Trainable params" in caplog.text
    assert "flops" not in (out + error + caplog.text).lower()


def test_a_bar_of_a_code_page_is_drawn_in_ascii() -> None:
    log = io.TextIOWrapper(io.BytesIO(), encoding="cp437", errors="strict")
    with Bar(total=2, desc="Packing", file=log) as shown:
        shown.update()
        shown.refresh()
    log.flush()
    log.buffer.seek(0)
    assert log.buffer.read().isascii()


def test_a_status_says_what_is_done() -> None:
    with terminal() as screen, status("Reading the weights"):
        pass
    assert "Reading the weights ..." in screen.getvalue()
