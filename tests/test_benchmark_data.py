"""`simmim benchmark data`: its numbers add up, its verdict follows from them; nothing is timed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from simmim.commands.benchmark.data import LoaderSpeed
from simmim.commands.benchmark.data import data as measure
from simmim.commands.benchmark.experiment import open_experiment
from simmim.commands.benchmark.loader_profile import STAGES, Endless, Feed
from simmim.data import ImageFolderData
from support.commands import refused, simmim
from support.folders import make_images

TINY = """
model:
  encoder: vit_tiny_patch16_224
  img_size: 32
  mask_patch_size: 8
  encoder_kwargs: {patch_size: 8, embed_dim: 16, depth: 1, num_heads: 1}
data: {batch_size: 4}
trainer: {accelerator: cpu}
"""
MACHINE = {"cpu": "a CPU", "cores": 8, "gpu": None}
QUICK: dict[str, Any] = {"config": ["tiny.yaml"], "workers": [0], "consumes": 10, "seconds": 0.01}


@pytest.fixture
def place(workdir: Path) -> Path:
    """A working folder with photographs and tiny.yaml."""
    make_images(Path("photos"), 8, (90, 70), ".jpg")
    Path("tiny.yaml").write_text(TINY)
    return workdir


def speed(consumes: float, workers: int = 2, cores: int = 8, **more: Any) -> LoaderSpeed:
    return LoaderSpeed(
        config="tiny",
        root="photos",
        batch_size=4,
        stages=dict.fromkeys(STAGES, 0.002),  # 5 x 2 ms: 100 images/s
        rates={workers: 100.0 * max(workers, 1)},
        workers=workers,
        consumes=consumes,
        tried=None,
        on_cpu=False,
        machine={**MACHINE, "cores": cores},
        **more,
    )


# What is said ------------------------------------------------------------------------------------


def test_the_stages_add_up_to_a_core() -> None:
    one = speed(150)
    assert one.per_core == pytest.approx(100)
    shares = [int(s) for s in re.findall(r"^  \w+ +2\.000 +(\d+)%$", str(one), re.MULTILINE)]
    assert shares == [20] * 5
    assert "10.000" in str(one)


def test_enough_is_enough() -> None:
    one = speed(150)
    assert one.waits == 0
    assert one.verdict().startswith("Training will not starve: the loader gives 200.0 images/s")


@pytest.mark.parametrize(("consumes", "cure"), [(400, 4), (401, 5), (800, 8)])
def test_starving_names_the_workers_that_cure_it(consumes: float, cure: int) -> None:
    one = speed(consumes)
    assert one.waits == pytest.approx(1 - 200 / consumes)
    assert one.verdict().startswith("Training will starve")
    assert f"{cure} workers would cure it (--data.num_workers {cure})" in one.verdict()


def test_a_machine_with_too_few_cores_is_told() -> None:
    assert (
        "takes 9 cores, and this machine has 8: use one with more, or the images packed"
        in speed(900).verdict()
    )
    packed = LoaderSpeed(**{**vars(speed(900)), "packed": True})
    assert "simmim pack" not in packed.verdict()
    on_cpu = LoaderSpeed(**{**vars(speed(800)), "on_cpu": True})
    assert "8 cores and one for the step, and this machine has 8" in on_cpu.verdict()


def test_without_workers_reading_and_training_take_turns() -> None:
    one = speed(100, workers=0)
    assert one.waits == pytest.approx(0.5)
    assert "1 worker would cure it" in one.verdict().lower()
    assert "not starve" in speed(4, workers=0).verdict()


# What is measured --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_the_table_and_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    line = "benchmark data -c tiny.yaml --root photos --workers 0 1 --seconds 0.01 --out out.json"
    simmim(line)
    text = capsys.readouterr().out
    assert all(f"  {stage} " in text for stage in STAGES)
    assert re.search(r"^Training will (not )?starve", text, re.MULTILINE)
    kept = json.loads(Path("out.json").read_text())
    assert {"machine", "versions", "command", "date", "verdict"} <= kept.keys()
    assert list(kept["rates"]) == ["0", "1"]
    assert sum(kept["stages"].values()) == pytest.approx(1 / kept["per_core"])
    assert kept["consumes"] > 0
    assert kept["tried"] == 4
    assert not (Path("runs")).exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("place")
def test_a_feed_has_no_end(workers: int) -> None:
    data = ImageFolderData("photos", img_size=32)
    data.setup("fit")
    feed = Feed(data.sets["training"], Endless(range(3)), 2, workers, data.collate)
    assert feed.rate(0.0) > 0
    assert feed.rate(0.0) > 0


def test_an_endless_order_has_every_sample_in_every_epoch() -> None:
    keys = iter(Endless([5, 7, 9]))
    for epoch in range(4):
        assert {next(keys) for _ in range(3)} == {(epoch, index) for index in (5, 7, 9)}


@pytest.mark.usefixtures("place")
def test_an_unreadable_file_is_left_out() -> None:
    for number in range(3):
        Path(f"photos/{number:03d}.jpg").write_bytes(b"no image")
    assert measure(root="photos", **QUICK).per_core > 0


# Mistakes ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--root nowhere", "'nowhere' does not exist"),
        ("--root empty", "holds no images"),
        ("--root photos -c classify/linear_probe", "is none of simmim pretrain"),
        ("--root photos -c nonsense", "neither a file nor a packaged config"),
        ("--root photos -c tiny.yaml --workers=-1", "0 or more"),
        ("--root photos --out tiny.yaml", "exists: give the name of a new file"),
        ("--root photos --consumes 0", "use a number above 0"),
        ("--root photos --seconds 0", "seconds 0 is out of range"),
        ("--root photos --against official", "python benchmarks/reference_pipeline.py"),
    ],
)
def test_mistakes_are_one_sentence(
    options: str, said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "empty").mkdir()
    assert said in refused(capsys, f"benchmark data {options}")


def test_a_root_takes_the_place_of_a_named_data_set(place: Path) -> None:
    experiment = open_experiment(None, data={"root": str(place / "photos")})
    assert experiment.data.root == str(place / "photos")
    assert experiment.data.img_size == (32, 32)  # the demo's
