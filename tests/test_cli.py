"""The command line as a user meets it: help, mistakes, runs, going on."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor

import official_reference
from simmim.cli import COMMANDS, main
from simmim.command_line.configuration import find_config
from simmim.runs.folder import hold_run, let_go
from simmim.runs.loggers import finish_board
from support.commands import (
    TINY,
    assert_same_tensors,
    column,
    refused,
    simmim,
    state,
    table,
    write_tiny,
)
from support.folders import make_classes, make_images

FIT = "pretrain fit -c tiny.yaml"


@pytest.fixture
def place(workdir: Path) -> Iterator[Path]:
    """A working folder with images/ and tiny.yaml, without a board."""
    make_classes(Path("images"))
    write_tiny(workdir)
    before = signal.getsignal(signal.SIGINT)
    yield workdir
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored after Ctrl+C


def fit(*options: str) -> int:
    return main([*FIT.split(), *options])


def first_cells(keys: Tensor, grid: tuple[int, int], counts: Tensor, **_: Any) -> Tensor:
    """A masking of the user's own."""
    return (torch.arange(grid[0] * grid[1]) < counts[:, None]).view(-1, *grid)


class Stop(L.Callback):
    """End a run from inside, as people and schedulers do."""

    def __init__(self, epoch: int = 1, batch: int = 0, how: str = "interrupt") -> None:
        self.epoch, self.batch, self.how = epoch, batch, how

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if (trainer.current_epoch, args[-1]) == (self.epoch, self.batch):
            if self.how == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if self.how == "interrupt":
                raise KeyboardInterrupt
            if self.how == "bug":
                raise ZeroDivisionError
            for _ in range(2 if self.how == "ctrl_c_twice" else 1):
                signal.raise_signal(signal.SIGINT if "ctrl_c" in self.how else signal.SIGTERM)


# Help --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_the_table_names_what_exists(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    examples = re.findall(r"^  simmim .*", out, flags=re.MULTILINE)
    assert len(examples) == 3
    assert all(command.load() for command in COMMANDS.values())


def test_the_table_is_quick() -> None:
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-m", "simmim"], capture_output=True, check=True)
    assert b"pretrain" in out.stdout
    assert time.monotonic() - began < 5  # 0.2 s on a quiet machine; torch takes several


@pytest.mark.parametrize("subcommand", ["fit", "predict"])
def test_every_option_is_explained(
    subcommand: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    simmim("pretrain", subcommand, "--help", "all")
    out = capsys.readouterr().out
    options = re.findall(r"^  (--\S+)[^\n]*?(?:  |\n {10,})(\S[^\n]*)", out, flags=re.MULTILINE)
    assert len(options) > 80
    silent = [name for name, text in options if text.startswith("(type:")]
    assert not silent
    assert "--probe.layer" in out
    assert "swin_base_100ep" in out  # what -c can name


def test_help_of_the_task_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("pretrain --help", "pretrain help", "help pretrain"):
        assert main(line.split()) == 0
        assert "simmim pretrain predict" in capsys.readouterr().out


# Mistakes ----------------------------------------------------------------------------------------

MISTAKES = [
    ("fit --model.mask_ration 0.5", 2, "did you mean --model.mask_ratio?"),
    ("fit --epochs 3", 2, "did you mean --trainer.max_epochs?"),
    ("fit --masks.every_n_epochs=0", 2, "was removed: the pictures of --reconstructions"),
    ("fit --learning-rate 3", 2, "did you mean --model.base_lr?"),
    ("fit --batch_size 3", 2, "did you mean --data.batch_size?"),
    ("fit -config x", 2, "did you mean -c or --config?"),
    ("fit --model.mask_ratio abc", 2, "'abc': it takes a number or a list"),
    ("fit --model.mask_fill tokn", 2, "did you mean token?"),
    ("fit --model.encoder_kwargs.depthh 3", 1, "depthh"),
    ("fit --model.encoder vit_tinny_patch16_224", 1, "vit_tiny_patch16_224"),
    ("fit --model.encoder vit_smal", 1, "did you mean vit_small_patch"),
    ("fit --model.mask_patch_size 6", 1, "mask_patch_size 6"),
    ("fit --model.img_size 0", 1, "img_size 0 must be at least 1 pixel"),
    ("fit --model.in_chans 0", 1, "in_chans 0 must be at least 1"),
    ("fit --model.optimizer.momentun 0.9", 2, "--model.optimizer.momentun: torch.optim.AdamW has"),
    ("fit --model.optimizer Adamm", 2, "no class of that name"),
    ("fit --model.weights none.ckpt", 1, "none.ckpt"),
    ("fit --model.seed 3", 2, "give --seed_everything"),
    ("fit --data.img_size 64", 2, "give --model.img_size"),
    ("fit --data.root nowhere", 1, "nowhere"),
    ("fit --data.batch_size 0", 1, "batch_size 0"),
    ("fit --trainer.precision bf16-mxed", 2, "did you mean bf16-mixed?"),
    ("fit --trainer.strategy dpp", 1, "--trainer.strategy dpp is not known: did you mean ddp?"),
    ("fit --trainer.accelerator cdua", 1, "did you mean cuda?"),
    ("fit --trainer.devices 999", 1, "use --trainer.devices 1"),
    ("fit --trainer.max_epochs 0", 1, "trainer.max_epochs 0"),
    ("fit --trainer.max_epochs -1", 1, "use --trainer.max_epochs 100"),
    ("fit --trainer.max_epochs", 2, "--trainer.max_epochs needs a value"),
    ("fit --trainer.default_root_dir x", 1, "--run_dir"),
    ("fit stray", 2, "'stray'"),
    ("fit --name x stray", 2, "'stray', did you mean --data.root stray?"),
    ("fit -c", 2, "needs a value"),
    ("fit -c swin_base", 2, "did you mean 'swin_base_"),
    ("fit -c images", 2, "'images'"),
    ("fit -c broken.yaml", 2, "broken.yaml is not valid YAML"),
    ("fit -c list.yaml", 2, "list.yaml holds a list"),
    ("fit -c typo.yaml", 2, "did you mean --model.mask_ratio?"),
    ("fit -c linked.yaml", 2, "data.img_size follows model.img_size"),
    ("fit --name a/b", 2, "'a/b'"),
    ("fit --name a:b", 2, "'a:b' cannot be a folder"),
    ("fit --name=", 2, "'' cannot be a folder"),
    ("fit --ckpt_path last", 1, "no run runs/tiny/version_* with a checkpoint"),
    ("fit --ckpt_path none.ckpt", 1, "none.ckpt"),
    ("fit --ckpt_path https://example.org/x.ckpt", 1, "download"),
    ("validate --ckpt_path tiny.yaml", 1, "tiny.yaml is no checkpoint"),
    ("predict --data.root nowhere", 1, "nowhere"),
    ("fitt", 2, "did you mean fit?"),
    ("", 2, "choose from fit, validate, test, predict"),
]


@pytest.mark.parametrize(("line", "status", "words"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], line: str, status: int, words: str
) -> None:
    Path("broken.yaml").write_text("model: {mask_ratio: 0.6\n")
    Path("list.yaml").write_text("- model\n")
    Path("typo.yaml").write_text("model: {mask_ration: 0.6}\n")
    Path("linked.yaml").write_text("data: {img_size: 64}\n")
    args = line.split()
    tiny = ["-c", "tiny.yaml"] if args[:1] in (["fit"], ["validate"], ["predict"]) else []
    assert words in refused(capsys, "pretrain", *args[:1], *tiny, *args[1:], status=status)
    assert not list(Path().glob("runs/*/*"))  # and no folder is left behind


def test_an_unknown_command_proposes_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for line, words in {
        "pretrian": "did you mean simmim pretrain?",
        "fitt": "did you mean simmim pretrain fit?",
        "fit -c image_folder": "did you mean simmim pretrain fit?",
        "finetune": "did you mean simmim classify fit?",
        "pretrain ftt": "did you mean fit?",
        "benchmark stp": "did you mean step?",
    }.items():
        assert words in refused(capsys, line, status=2)


def test_debugging_shows_where_a_mistake_was_found(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMMIM_DEBUG", "1")
    with pytest.raises(ValueError, match="nowhere"):
        fit("--data.root", "nowhere")


def test_words_that_are_no_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """As a folder in another encoding is: no config could hold its name."""
    sentence = refused(capsys, "pretrain fit --data.root", os.fsdecode(b"caf\xe9"), status=2)
    assert "'caf\\udce9' is no text in UTF-8: rename it, or give a" in sentence


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(place: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fit("--trainer.callbacks+=test_cli.Stop", "--trainer.callbacks.how=bug")


def test_a_mistake_of_a_plain_command_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for line, status, words in (
        ("convert", 2, "--weights and --out must be given"),
        ("convert --weigths x", 2, "did you mean --weights?"),
        ("doctor images", 2, "did you mean --root images?"),
        ("doctor --root images --config imagefolder", 2, "did you mean 'image_folder'?"),
        ("doctor --root images -c imagefolder", 2, "did you mean 'image_folder'?"),
        ("pack --root images --out x --format jpg", 2, "did you mean jpeg?"),
        ("benchmark dta", 2, "did you mean data?"),
        ("benchmark startup", 2, "python benchmarks/startup.py"),
        ("benchmark data --wrokers 2", 2, "did you mean --workers?"),
        ("benchmark -c digit", 2, "did you mean 'digits'?"),
        ("compare --weights x --mode finetun", 2, "did you mean finetune?"),
        ("convert --weights none.pth --out x.ckpt", 1, "none.pth does not exist"),
        ("convert --weights none.pth --out x.ckpt --img_size big", 2, "it takes a whole number"),
    ):
        assert words in refused(capsys, line, status=status, alone=True)


def test_a_terminal_that_lacks_a_letter_shows_its_number(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for option in ("stdout", "stderr"):
        monkeypatch.setattr(sys, option, io.TextIOWrapper(io.BytesIO(), "ascii"))
    simmim("pack --root images --out größe --workers 0")
    assert main(["größe"]) == 2
    said = {sys.stdout: b"into gr\\xf6\\xdfe: 1 shard", sys.stderr: b"'gr\\xf6\\xdfe'"}
    for stream, words in said.items():
        stream.flush()
        assert words in stream.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.exhaustive
@pytest.mark.skipif(os.name == "nt", reason="there the encoding is not chosen by the environment")
def test_a_config_is_utf_8_wherever_it_is_read(place: Path) -> None:
    Path("mine.yaml").write_text("data: {root: bücher}  # größer\n", encoding="utf-8")
    old = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "simmim", "pretrain", "fit", "-c", "mine.yaml"]
    done = subprocess.run(
        [*command, "--print_config=skip_default"],
        env=os.environ | old,
        capture_output=True,
        check=True,
    )
    assert yaml.safe_load(done.stdout)["data"] == {"root": "bücher"}


@pytest.mark.slow
def test_an_official_release_becomes_a_run_that_can_be_shown(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = official_reference.Swin()
    tensors = official_reference.make_tensors(spec)
    official_reference.save_file(Path("official.pth"), tensors, official_reference.config_of(spec))
    simmim("convert --weights=official.pth --out=ours.ckpt")
    assert "tensors used" in capsys.readouterr().out
    args = ["--ckpt_path=ours.ckpt", "--data.root=images", "--data.num_workers=0"]
    simmim("pretrain predict -c cpu", *args)
    assert len(list(Path("runs/digits/version_0/predictions").rglob("*.png"))) == 20
    sentence = refused(capsys, "pretrain fit --ckpt_path=ours.ckpt", status=1)
    assert "--model.weights ours.ckpt" in sentence


# Runs --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_has_what_the_design_says(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--reconstructions.every_n_epochs=2", "--probe.every_n_epochs=2") == 0
    run = Path("runs/tiny/version_0")
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= names
    assert any(re.fullmatch(r"reconstructions/.*\.png", name) for name in names)
    assert not any(name.endswith(".unfinished") for name in names)
    metrics = table(run / "metrics.csv")
    assert {"train/loss", "val/loss", "lr", "val/knn_top1", "val/probe_top1"} <= set(metrics[0])
    losses = column(run / "metrics.csv", "val/loss")
    assert len(losses) == 4
    best = state(run, "best")
    assert best["epoch"] == losses.index(min(losses))
    assert "pretrained" in capsys.readouterr().out


@pytest.mark.slow
def test_the_kept_config_is_whole_and_can_be_given_again(place: Path) -> None:
    assert fit("--trainer.max_epochs=1", "--model.mask_ratio=0.75", "--name=x") == 0
    kept = yaml.safe_load(Path("runs/x/version_0/config.yaml").read_text())
    assert kept["name"] == "x"
    assert kept["model"]["mask_ratio"] == 0.75
    assert kept["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert not {"ckpt_path", "trust"} & set(kept)
    simmim("pretrain fit -c runs/x/version_0/config.yaml")
    again = yaml.safe_load(Path("runs/x/version_1/config.yaml").read_text())
    assert again == kept
    simmim("pretrain validate -c runs/x/version_0/config.yaml")


def test_the_printed_config_gives_the_same_config(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--model.mask_ratio=[0.4,0.8]", "--print_config") == 0
    first = capsys.readouterr().out
    Path("printed.yaml").write_text(first)
    simmim("pretrain fit -c printed.yaml --print_config")
    assert capsys.readouterr().out == first
    assert yaml.safe_load(first)["name"] == "tiny"
    assert fit("--print_config=skip_default") == 0
    short = yaml.safe_load(capsys.readouterr().out)
    assert short["model"] == yaml.safe_load(TINY)["model"]


def test_a_recipe_is_printed_as_it_was_published(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it agrees with the defaults; and nothing else."""
    simmim("pretrain fit -c swin_base_100ep --print_config=skip_default")
    recipe = yaml.safe_load(capsys.readouterr().out)
    assert recipe.pop("name") == "swin_base_100ep"
    assert recipe == yaml.safe_load(find_config("swin_base_100ep", "pretrain").read_text())
    options = ["--model.mask_ratio=0.7", "--print_config=skip_default"]
    simmim("pretrain fit -c swin_base_100ep", *options)
    assert yaml.safe_load(capsys.readouterr().out)["model"] == {
        **recipe["model"],
        "mask_ratio": 0.7,
    }


def test_options_overrule_overlays_and_overlays_overrule_configs(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text("model: {mask_ratio: 0.5, mask_fill: zero}\n")
    for args in (
        ["-c", "tiny.yaml", "mine.yaml", "bf16", "--model.mask_ratio=0.7"],
        ["--model.mask_ratio=0.7", "-c", "tiny.yaml", "-c", "mine.yaml", "--config=bf16"],
    ):
        simmim("pretrain fit", *args, "--print_config")
        config = yaml.safe_load(capsys.readouterr().out)
        assert (config["model"]["mask_ratio"], config["model"]["mask_fill"]) == (0.7, "zero")
        assert config["trainer"]["precision"] == "bf16-mixed"
        assert config["name"] == "tiny"


def test_without_an_experiment_it_is_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    simmim("pretrain fit -c cpu --print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["name"], config["data"]["dataset"]) == ("digits", "digits")
    simmim("pretrain fit -c swin_base_100ep --print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["name"], config["data"]["dataset"]) == ("swin_base_100ep", None)


@pytest.mark.slow
def test_a_short_epoch_is_logged_all_the_same(place: Path) -> None:
    assert fit("--trainer.max_epochs=2", "--trainer.log_every_n_steps=50") == 0
    metrics = table(Path("runs/tiny/version_0/metrics.csv"))
    assert [row["epoch"] for row in metrics if row["train/loss"]] == ["0", "1"]


@pytest.mark.slow
def test_a_users_callback_joins_ours(place: Path) -> None:
    assert fit("--trainer.max_epochs=2", "--trainer.callbacks+=LearningRateMonitor") == 0
    columns = set(table(Path("runs/tiny/version_0/metrics.csv"))[0])
    assert {"lr", "throughput/images_per_s"} <= columns
    assert any(name.startswith("lr-AdamW") for name in columns)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["-c", "debug"], ["--trainer.fast_dev_run=2"]])
def test_a_try_leaves_nothing(place: Path, options: list[str]) -> None:
    assert fit(*options) == 0
    assert not Path("runs").exists()


@pytest.mark.exhaustive
def test_two_runs_in_a_row_with_a_board(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for number in range(2):
        assert fit("--trainer.max_epochs=1", "--reconstructions.every_n_epochs=1") == 0
        run = Path(f"runs/tiny/version_{number}")
        boards = list((run / "wandb").glob("offline-run-*"))
        assert len(boards) == 1
        assert list(boards[0].rglob("reconstructions*.png"))
    ids = {path.read_text() for path in Path("runs").rglob("run_id.txt")}
    assert len(ids) == 2


@pytest.mark.slow
def test_the_board_gets_the_full_config(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(
        "simmim.command_line.tasks.finish_board",
        lambda loggers, failed: (
            configs.extend(dict(x.experiment.config) for x in loggers[1:]),
            finish_board(loggers, failed),
        ),
    )
    assert fit("-c", "wandb", "--trainer.max_epochs=1", "--model.mask_ratio=0.3") == 0
    (config,) = configs
    assert config["model"]["mask_ratio"] == 0.3
    assert config["data"]["batch_size"] == 4
    assert config["trainer"]["max_epochs"] == 1
    assert config["probe"]["every_n_epochs"] == 0


@pytest.mark.slow
def test_without_loggers_the_run_is_kept_all_the_same(place: Path) -> None:
    assert fit("--trainer.max_epochs=1", "--trainer.logger=false") == 0
    names = {path.name for path in Path("runs/tiny/version_0").iterdir()}
    assert names == {"config.yaml", "checkpoints", "report.html", "worst.csv", "worst"}


@pytest.mark.slow
def test_a_logger_of_the_users_own_is_respected(place: Path) -> None:
    logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=board"]
    assert fit("--trainer.max_epochs=1", *logger) == 0
    assert list(Path("board").rglob("events.out.tfevents*"))
    assert table(Path("runs/tiny/version_0/metrics.csv"))
    assert not Path("runs/tiny/version_0/wandb").exists()


# Going on ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_going_on_is_bitwise_what_was_not_interrupted(place: Path) -> None:
    assert fit("--name=whole") == 0
    interrupt = ["--trainer.callbacks+=test_cli.Stop", "--trainer.callbacks.epoch=2"]
    assert fit("--name=parts", *interrupt, "--trainer.callbacks.batch=1") == 130
    assert fit("--name=parts", "--ckpt_path=last", "--trainer.callbacks=null") == 0
    whole, parts = state("runs/whole/version_0"), state("runs/parts/version_0")
    assert [path.name for path in Path("runs/parts").iterdir()] == ["version_0"]
    assert whole["global_step"] == parts["global_step"] == 16
    assert_same_tensors(whole["state_dict"], parts["state_dict"])
    one, two = (table(Path(f"runs/{name}/version_0/metrics.csv")) for name in ("whole", "parts"))
    for key in ("step", "epoch", "lr", "train/loss", "val/loss"):
        assert [row[key] for row in one] == [row[key] for row in two], key


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [("terminate", 143), ("ctrl_c", 130)])
def test_a_signal_keeps_where_the_run_stands(place: Path, how: str, status: int) -> None:
    assert fit("--name=whole") == 0
    stop = ["--trainer.callbacks+=test_cli.Stop", f"--trainer.callbacks.how={how}"]
    assert fit("--name=parts", *stop, "--trainer.callbacks.batch=2") == status
    assert state("runs/parts/version_0")["global_step"] == 7  # in the middle of an epoch
    assert fit("--name=parts", "--ckpt_path=last", "--trainer.callbacks=null") == 0
    whole, parts = state("runs/whole/version_0"), state("runs/parts/version_0")
    assert_same_tensors(whole["state_dict"], parts["state_dict"])


@pytest.mark.slow
def test_a_run_in_bf16_goes_on_with_clipped_gradients(place: Path) -> None:
    assert fit("-c", "bf16", "--trainer.max_epochs=1") == 0
    assert fit("-c", "bf16", "--ckpt_path=last", "--trainer.max_epochs=2") == 0
    assert state("runs/tiny/version_0")["epoch"] == 1


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(place: Path) -> None:
    stop = ["--trainer.callbacks+=test_cli.Stop", "--trainer.callbacks.how=ctrl_c_twice"]
    assert fit(*stop, "--trainer.callbacks.batch=2") == 130
    assert state("runs/tiny/version_0")["global_step"] == 4  # of the epoch before


@pytest.mark.slow
def test_an_interruption_says_how_to_go_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop = ["--trainer.callbacks+=test_cli.Stop"]
    line = refused(capsys, FIT, "--run_dir=here", *stop, status=130)
    command = "simmim pretrain fit --name tiny --run_dir here --ckpt_path last"
    assert line == f"simmim: stopped; go on with: {command}"
    sentence = refused(capsys, FIT, *stop, "--trainer.callbacks.epoch=0", status=130)
    assert "no checkpoint yet" in sentence


@pytest.mark.slow
def test_too_little_memory_costs_no_checkpoint(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = ["--trainer.callbacks+=test_cli.Stop", "--trainer.callbacks.how=memory"]
    sentence = refused(capsys, FIT, *stop, status=1)
    assert sentence.startswith("simmim: the memory is full: use a smaller batch")
    assert state("runs/tiny/version_0")["global_step"] == 4  # of the epoch before
    smaller = ["--data.batch_size=2", "--trainer.accumulate_grad_batches=2"]
    assert fit("--ckpt_path=last", "--trainer.callbacks=null", *smaller) == 0
    assert state("runs/tiny/version_0")["epoch"] == 3


@pytest.mark.slow
def test_a_run_that_is_training_is_left_alone(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command may look at it, and must not train in its folder."""
    monkeypatch.setattr("simmim.runs.folder.LOCK_SECONDS", 0.1)
    assert fit("--trainer.max_epochs=1") == 0
    run = Path("runs/tiny/version_0")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    lock = hold_run(run)
    (run / "checkpoints/.last.ckpt.unfinished").write_text("it is being written")
    simmim("pretrain validate --name=tiny --ckpt_path=last")
    sentence = refused(capsys, FIT, "--ckpt_path=last", "--trainer.max_epochs=2", status=1)
    assert "another process trains in runs/tiny/version_0" in sentence
    assert (run / "checkpoints/.last.ckpt.unfinished").exists()
    assert {path: path.read_bytes() for path in before} == before
    let_go(lock)
    assert fit("--ckpt_path=last", "--trainer.max_epochs=2") == 0
    assert not [path for path in run.rglob(".*") if path.is_file()]


@pytest.mark.slow
def test_last_alone_goes_on_with_the_default_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "simmim.command_line.configuration.config_folder", lambda: place / "configs"
    )
    (place / "configs" / "pretrain").mkdir(parents=True)
    (place / "configs" / "pretrain" / "digits.yaml").write_text(TINY)
    simmim("pretrain fit --trainer.max_epochs=1 --model.mask_ratio=0.3")
    simmim("pretrain fit --ckpt_path=last --trainer.max_epochs=2")
    assert [path.name for path in Path("runs/digits").iterdir()] == ["version_0"]
    kept = yaml.safe_load(Path("runs/digits/version_0/config.yaml").read_text())
    assert (kept["trainer"]["max_epochs"], kept["model"]["mask_ratio"]) == (2, 0.3)
    assert state("runs/digits/version_0")["epoch"] == 1
    rows = table(Path("runs/digits/version_0/metrics.csv"))
    assert max(int(row["epoch"]) for row in rows if row["epoch"]) == 1


@pytest.mark.slow
def test_what_the_checkpoint_contradicts_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert fit("--trainer.max_epochs=1") == 0
    options = ["--model.base_lr=9", "--seed_everything=3", "--model.optimizer=SGD"]
    caplog.clear()
    assert fit("--ckpt_path=last", "--trainer.max_epochs=2", *options) == 0
    (line,) = [m for m in caplog.messages + capsys.readouterr().err.splitlines() if "ignored" in m]
    assert "--model.base_lr 9.0 (it has 0.1)" in line
    assert "--seed_everything 3 (it has 0)" in line
    assert "--model.optimizer torch.optim.SGD (it has torch.optim.AdamW)" in line
    (line,) = [m for m in caplog.messages if "goes on with other options" in m]
    assert line.endswith("than before: --trainer.max_epochs 2 (it was 1)")
    kept = yaml.safe_load(Path("runs/tiny/version_0/config.yaml").read_text())
    assert kept["model"]["base_lr"] == 0.1
    assert kept["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert state("runs/tiny/version_0")["hyper_parameters"]["seed"] == 0


@pytest.mark.slow
def test_a_part_of_the_users_own_is_trusted_where_he_names_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_epochs=1", "--model.masking=test_cli.first_cells") == 0
    line = "pretrain validate --name=tiny --ckpt_path=last"
    assert "--trust" in refused(capsys, line, status=1)  # a checkpoint may come from anyone
    simmim(line, "--trust")


@pytest.mark.slow
def test_an_earlier_checkpoint_begins_a_run_of_its_own(place: Path) -> None:
    assert fit("--trainer.max_epochs=2") == 0
    best = "runs/tiny/version_0/checkpoints/best.ckpt"
    before = Path("runs/tiny/version_0/metrics.csv").read_bytes()
    assert fit(f"--ckpt_path={best}", "--trainer.max_epochs=4") == 0
    assert state("runs/tiny/version_1")["epoch"] == 3
    assert Path("runs/tiny/version_0/metrics.csv").read_bytes() == before
    simmim(f"pretrain fit --ckpt_path={best} --trainer.max_epochs=3")
    assert state("runs/tiny/version_2")["epoch"] == 2  # the name is the run's


@pytest.mark.slow
def test_a_runs_folder_says_which_run_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_epochs=1", "--run_dir=here", "--name=x") == 0
    stop = ["--trainer.callbacks+=test_cli.Stop", "--trainer.max_epochs=3"]
    line = refused(capsys, "pretrain fit --ckpt_path=here/x/version_0", *stop, status=130)
    assert line.endswith("simmim pretrain fit --name x --run_dir here --ckpt_path last")
    assert [path.name for path in Path().rglob("version_*")] == ["version_0"]
    assert yaml.safe_load(Path("here/x/version_0/config.yaml").read_text())["name"] == "x"


@pytest.mark.slow
def test_the_board_keeps_its_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert fit("--trainer.max_epochs=1") == 0
    assert fit("--ckpt_path=last", "--trainer.max_epochs=2") == 0
    folders = list(Path("runs/tiny/version_0/wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({re.split("[-_]", folder.name)[4] for folder in folders}) == 1


# Scoring and showing -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_scored_and_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(place / "others", 3)
    assert fit("--trainer.max_epochs=2") == 0
    run = Path("runs/tiny/version_0")
    metrics = (run / "metrics.csv").read_bytes()
    for given in ("last", str(run), str(run / "checkpoints" / "last.ckpt")):
        simmim(f"pretrain validate --name=tiny --ckpt_path={given}")
        loss = [row["val/loss"] for row in table(run / "metrics.csv") if row["val/loss"]][-1]
        assert table(run / "validate.csv")[-1]["val/loss"] == loss
    simmim("pretrain test --name=tiny --ckpt_path=last")
    assert table(run / "test.csv")[-1]["test/loss"] == loss
    simmim(f"pretrain predict --ckpt_path={run} --data.root=others")
    assert len(list((run / "predictions").rglob("*.png"))) == 3
    assert (run / "metrics.csv").read_bytes() == metrics
    assert [path.name for path in Path("runs").rglob("version_*")] == ["version_0"]


@pytest.mark.slow
def test_scoring_takes_another_mask_ratio(place: Path) -> None:
    assert fit("--trainer.max_epochs=1") == 0
    scores = []
    for options in ([], ["--model.mask_ratio=0.9"]):
        simmim("pretrain validate --name=tiny --ckpt_path=last", *options)
        scores.append(table(Path("runs/tiny/version_0/validate.csv"))[-1]["val/loss"])
    assert scores[0] != scores[1]


@pytest.mark.slow
@pytest.mark.parametrize("subcommand", ["validate", "predict"])
def test_an_untrained_model_is_said_to_be_one(
    place: Path, caplog: pytest.LogCaptureFixture, subcommand: str
) -> None:
    simmim("pretrain", subcommand, "-c", "tiny.yaml")
    assert "untrained" in caplog.text
    assert Path("runs").exists() is (subcommand == "predict")


# Processes ---------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_two_processes_share_one_run(place: Path) -> None:
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1"]
    command = [sys.executable, "-m", "simmim", "pretrain", "fit", "-c", "tiny.yaml", *two]
    done = subprocess.run(
        [*command, "--reconstructions.every_n_epochs=1", "--probe.every_n_epochs=1"],
        env={**os.environ, "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in Path("runs").rglob("version_*")] == ["version_0"]
    run = Path("runs/tiny/version_0")
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert state(run)["global_step"] == 2
    assert len([row for row in table(run / "metrics.csv") if row["val/loss"]]) == 1
