"""More than one process: the same training as one process with the same global batch."""

import contextlib
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.accelerators.xla import XLAAccelerator
from lightning.pytorch.strategies import FSDPStrategy
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from simmim import Classifier, Segmenter, load_encoder
from simmim.callbacks.classification import ConfusionMatrix, PredictionTable
from simmim.callbacks.segmentation import MaskWriter, Segmentations
from simmim.checkpoints import BEFORE, DurableCheckpointIO, put_in_place, there_is
from simmim.data import SegmentationData
from simmim.data.classification import ClassificationData
from simmim.durable import UNFINISHED
from simmim.pretrain import SimMIM
from simmim.run import clean_up
from simmim.strategies import FullyShard, gradient_norm, refuse_fsdp
from simmim.weights.files import read_checkpoint
from simmim.weights.shards import META
from simmim.xla import wake_xla
from support.commands import EXACT, assert_same_tensors, refused, simmim, write_tiny
from support.folders import make_classes, make_images, save
from support.processes import end, in_processes, kill, program, said, start
from support.small import TINY_VIT, ByIndex
from support.training import trainer_of

# What is trained --------------------------------------------------------------------------------

SKIP = {"hidden_tokens": "skip", "head": "transformer", "head_kwargs": {"width": 64}}
SKIP |= {"masking": "random", "masking_kwargs": None}
SWIN = {
    "encoder": "swin_tiny_patch4_window7_224",
    "mask_patch_size": 16,
    "encoder_kwargs": {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
}
MODELS: dict[str, dict[str, Any]] = {"plain": {}, "skip": SKIP, "swin_skip": {**SWIN, **SKIP}}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "finetune": {"layer_decay": 0.5},  # and its first block is frozen
    "probe": {"frozen": True},
}


class Labelled(ByIndex):
    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {**super().__getitem__(i), "label": torch.tensor(i % 3)}


class Data(L.LightningDataModule):
    """Sixteen images, in the same global batches of eight for any number of processes."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.images, self.batch_size = Labelled(n=16), batch_size
        self.images.images[::2, :, :16] = 0  # half is nodata: uneven numbers are hidden

    def train_dataloader(self) -> DataLoader[Any]:
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(self.images, ranks, rank, shuffle=False)
        return DataLoader(self.images, batch_size=self.batch_size, sampler=sampler)


class Keep(L.Callback):
    """Keep each batch's loss over all processes, gradient's norm, and the lr; end when asked to."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.curves: dict[str, list[float]] = {"losses": [], "norms": [], "rates": []}

    def on_before_optimizer_step(self, run: L.Trainer, model: Any, optimizer: Any) -> None:
        self.curves["norms"].append(float(gradient_norm(model)))

    def on_train_batch_end(self, run: L.Trainer, *args: Any) -> None:
        self.curves["losses"].append(float(run.callback_metrics["train/loss"]))
        self.curves["rates"].append(run.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, run: L.Trainer, *args: Any) -> None:
        run.should_stop = run.current_epoch + 1 >= self.epochs


def build(name: str) -> L.LightningModule:
    """A model by its name here."""
    options: dict[str, Any] = {"warmup_epochs": 1, "base_lr": 0.1}
    if name not in CLASSIFIERS:
        options |= {"masking": "foreground", "masking_kwargs": {"nodata": 0}}
        return SimMIM(**{**TINY_VIT, "mask_patch_size": 8, **options, **MODELS[name]})
    model = Classifier(**TINY_VIT, **options, **CLASSIFIERS[name], num_classes=3)
    model.model.blocks[0].requires_grad_(False)
    return model


def train(
    processes: int,
    out: Path,
    strategy: str = "ddp",
    batches: int = 1,
    clip: float | None = None,
    clip_by: str | None = None,
    epochs: int = 4,
    load: Path | None = None,
    model: str = "plain",
) -> None:
    """Train in one of some processes, keep the curves in `out`, and a checkpoint beside it.

    Args:
        processes: How many there are.
        out: The file.
        strategy: A name in support.training.STRATEGIES.
        batches: To accumulate.
        clip: The gradient's largest norm or value.
        clip_by: norm or value.
        epochs: To train, of four.
        load: A checkpoint to go on from.
        model: One of MODELS or CLASSIFIERS.
    """
    torch.manual_seed(0)
    module, keep = build(model), Keep(epochs)
    options = {"gradient_clip_val": clip, "gradient_clip_algorithm": clip_by, "max_epochs": 4}
    options |= {"accumulate_grad_batches": batches, "log_every_n_steps": 1}
    trainer = trainer_of(processes, out.parent, keep, strategy=strategy, **options)
    trainer.strategy.checkpoint_io = DurableCheckpointIO()
    trainer.fit(module, Data(8 // processes // batches), ckpt_path=load)
    trainer.save_checkpoint(out.with_suffix(".ckpt"))
    if trainer.is_global_zero:
        torch.save(keep.curves, out)


def call_each(calls: list[tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]]) -> None:
    """Call functions one after the other in the same processes."""
    for function, args, options in calls:
        function(*args, **options)


class Runs:
    """Trains each way once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[Any, Path] = {}

    def __call__(self, processes: int, *each: dict[str, Any]) -> list[dict[str, Any]]:
        """What several runs gave in the same processes: curves, and the `file` that was saved."""
        keys = [(processes, str(sorted(options.items()))) for options in each]
        calls: list[Any] = []
        for key, options in zip(keys, each, strict=True):
            if key not in self.made:
                self.made[key] = self.folder / f"{len(self.made)}.pt"
                calls.append((train, (processes, self.made[key]), options))
        if calls:
            with contextlib.chdir(self.folder):  # where the logs of the processes go
                in_processes(processes, call_each, calls)
        files = [self.made[key] for key in keys]
        return [{**torch.load(f), "file": f.with_suffix(".ckpt")} for f in files]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


# What training comes to -------------------------------------------------------------------------


def close(a: Any, b: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=atol)


def assert_same_curves(one: dict[str, Any], many: dict[str, Any]) -> None:
    close(many["losses"], one["losses"])
    close(many["norms"], one["norms"])
    assert many["rates"] == one["rates"]


def assert_same_training(one: dict[str, Any], many: dict[str, Any]) -> None:
    """Losses, learning rates, weights, and the optimiser's state of each parameter."""
    assert_same_curves(one, many)
    a, b = (read_checkpoint(run["file"]) for run in (one, many))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name in a["state_dict"]:
        close(b["state_dict"][name], a["state_dict"][name], atol=1e-5)
    (a,), (b,) = a["optimizer_states"], b["optimizer_states"]
    kept = [json.dumps([{**g, "fused": None} for g in s["param_groups"]]) for s in (a, b)]
    assert json.loads(kept[0]) == json.loads(kept[1])  # a tuple may have become a list
    for i in a["state"]:
        for name in a["state"][i]:
            close(b["state"][i][name], a["state"][i][name], atol=1e-8)


CLIPPED = {"clip": 0.05, "batches": 2}
BY_VALUE = {"clip": 1e-3, "clip_by": "value", "batches": 2}
WAYS: list[dict[str, Any]] = [
    {},
    CLIPPED,
    BY_VALUE,
    {"model": "finetune", "clip": 0.05},
    {"model": "probe", "clip": 0.05},
]
SKIPPING = [{"model": "skip"}, {"model": "swin_skip"}]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("processes", "strategy"), [(2, "ddp"), (2, "fully_shard"), (4, "ddp"), (4, "fully_shard")]
)
def test_processes_learn_what_one_learns(runs: Runs, processes: int, strategy: str) -> None:
    """Clipped by the whole gradient's norm, or by value; with layer decay, frozen, skipping."""
    several = runs(processes, *({**way, "strategy": strategy} for way in WAYS + SKIPPING))
    single = runs(1, *WAYS, *SKIPPING)
    for i, (one, many) in enumerate(zip(single, several, strict=True)):
        (assert_same_training if i < len(WAYS) else assert_same_curves)(one, many)
    (free,) = runs(1, {"batches": 2})
    for clipped in single[1:3]:  # otherwise they would prove nothing
        differences = torch.tensor(clipped["losses"]) - torch.tensor(free["losses"])
        assert differences.abs().max() > 1e-4
    groups = read_checkpoint(single[3]["file"])["optimizer_states"][0]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {0.125, 0.5, 1.0}  # 0.25: the frozen block


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("strategy", "processes"), [("auto", 1), ("fully_shard", 2), ("fully_shard_sharded", 4)]
)
def test_a_run_goes_on_in_any_way(
    runs: Runs, strategy: str, processes: int, tmp_path: Path
) -> None:
    """In shards on two processes, with one process, and from a file of `convert`."""
    (whole,) = runs(1, {"clip": 0.05})
    (half,) = runs(processes, {"strategy": strategy, "clip": 0.05, "epochs": 2})
    file = converted = half["file"]
    assert file.is_dir() == strategy.endswith("sharded")
    assert {path.name for path in file.parent.glob(".*")} == set()
    if file.is_dir():
        converted = tmp_path / "one.ckpt"
        simmim("convert --weights", str(file), "--out", str(converted))
    shards = strategy if processes > 1 else "fully_shard"
    for way, n, source in ((shards, 2, file), ("auto", 1, file), (shards, 2, converted)):
        (rest,) = runs(n, {"strategy": way, "clip": 0.05, "load": source})
        curves = {key: whole[key][:4] + rest[key] for key in ("losses", "norms", "rates")}
        assert_same_training(whole, {**rest, **curves})
    model = SimMIM.load_from_checkpoint(converted)
    assert_same_tensors(load_encoder(file).state_dict(), model.encoder.model.state_dict())


# Checkpoints that are folders -------------------------------------------------------------------


def test_a_folder_of_shards_is_replaced_and_put_back(tmp_path: Path) -> None:
    """Wherever a kill falls between the two renames, a whole checkpoint is found."""
    path, beside = tmp_path / "last.ckpt", tmp_path / f".last.ckpt{UNFINISHED}"
    for text in ("one", "two"):
        beside.mkdir()
        (beside / META).write_text(text)
        put_in_place(beside, path)
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    path.rename(tmp_path / f".last.ckpt{BEFORE}")  # and killed
    assert there_is(path)
    assert (path / META).read_text() == "two"
    assert not there_is(tmp_path / "best.ckpt")
    (tmp_path / f".last.ckpt{BEFORE}").mkdir()  # killed after both
    beside.mkdir()
    (tmp_path / "checkpoints").mkdir()
    for leftover in (beside, tmp_path / f".last.ckpt{BEFORE}"):
        leftover.rename(tmp_path / "checkpoints" / leftover.name)
    path.rename(tmp_path / "checkpoints" / "last.ckpt")
    clean_up(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.exhaustive
@pytest.mark.skipif(os.name == "nt", reason="kills a session of processes")
def test_a_run_in_shards_that_is_killed_goes_on(workdir: Path) -> None:
    """With kill -9, at any moment, and with every step written."""
    make_classes(Path("images"), 24)
    shards = {"save_distributed_checkpoint": True}
    strategy = {"class_path": "simmim.strategies.FullyShard", "init_args": shards}
    write_tiny(workdir, **EXACT, trainer={"devices": 2, "max_epochs": 5, "strategy": strategy})
    fit = [sys.executable, "-m", "simmim", "pretrain", "fit", "-c", "tiny.yaml"]
    often = [*fit, "--checkpoint.every_n_minutes=0"]
    end(start(program, *often, "--name=whole"))
    whole, last = (Path(f"runs/{name}/version_0/checkpoints/last.ckpt") for name in ("whole", "b"))
    steps = [0]
    for i in range(3):
        run = start(program, *often, "--name=b", *(["--ckpt_path=last"] if i else []))
        began, before = time.time(), last.stat().st_ino if last.exists() else None
        while run.is_alive() and (not last.exists() or last.stat().st_ino == before):
            assert time.time() - began < 120
            time.sleep(0.001)
        time.sleep(0.03 * i)
        assert kill(run) == -signal.SIGKILL, said()[-3000:]
        assert there_is(last)
        steps.append(read_checkpoint(last)["global_step"])
    one = read_checkpoint(whole)
    assert steps == sorted(steps)
    assert steps[-1] < one["global_step"]
    end(start(program, *often, "--name=b", "--ckpt_path=last"))
    other = read_checkpoint(last)
    assert other["global_step"] == one["global_step"]
    assert_same_tensors(one["state_dict"], other["state_dict"])
    assert {path.name for path in last.parent.iterdir()} == {"last.ckpt", "best.ckpt"}
    simmim("embed --weights runs/b/version_0 --root images --out f.npz")
    simmim("export --weights runs/b/version_0 --out encoder")
    simmim("pretrain validate --ckpt_path runs/b/version_0 -c cpu")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


def test_an_index_of_shards_runs_no_code(workdir: Path) -> None:
    torch.save({}, workdir / META)
    with pytest.raises(ValueError, match=r"is no whole checkpoint in shards: \.metadata"):
        read_checkpoint(workdir)
    (workdir / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"it asks to run (posix|nt)\.system"):
        read_checkpoint(workdir)
    assert not Path("evil").exists()


def test_other_strategies_are_refused(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(Path("images"), 4)
    line = "pretrain fit -c cpu --data.root=images --trainer.strategy=fsdp"
    assert "use its successor, --trainer.strategy fully_shard" in refused(capsys, line, status=1)
    with pytest.raises(ValueError, match="fully_shard"):
        refuse_fsdp(FSDPStrategy())
    with pytest.raises(ValueError, match="tensor_parallel_size 2 is not supported"):
        FullyShard(tensor_parallel_size=2)


# What is scored ---------------------------------------------------------------------------------


def score_labels(processes: int) -> None:
    torch.manual_seed(0)
    model = Classifier(**TINY_VIT, ema_decay=0.5)
    options: dict[str, Any] = {"img_size": 32, "num_workers": 0, "val_fraction": 0.35}
    data = ClassificationData(root="images", batch_size=8 // processes, **options)
    watchers = ConfusionMatrix(), PredictionTable()
    trainer = trainer_of(processes, Path(str(processes)), *watchers, max_epochs=2)
    trainer.fit(model, data)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.predict(model, data, return_predictions=False)
    if trainer.is_global_zero:
        torch.save({**scores, "confusion": model.confusion_matrix}, f"{processes}/labels.pt")


def score_masks(processes: int, strategy: str) -> None:
    torch.manual_seed(0)
    deep = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    still = {"base_lr": 0.0, "warmup_lr": 0.0}  # a BatchNorm sees other batches in two processes
    encoder = {"encoder": "vit_tiny_patch16_224", "img_size": 32, "encoder_kwargs": deep}
    model = Segmenter(**encoder, **still, decoder_channels=16)
    data = SegmentationData("d", img_size=32, batch_size=4 // processes, num_workers=0)
    out = Path(str(processes))
    trainer = trainer_of(processes, out, Segmentations(), MaskWriter(), strategy=strategy)
    trainer.fit(model, data)  # every trained parameter is reached, or DDP stops here
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    trainer.validate(model, data, verbose=False)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.predict(model, data, return_predictions=False)
    if trainer.is_global_zero:
        torch.save(scores, out / "masks.pt")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fully_shard"])
def test_two_processes_learn_and_score_what_one_does(
    runs: Runs, workdir: Path, strategy: str
) -> None:
    """Gradients are clipped by the whole norm; each validation image counts once.

    13 images of classes, and five of two sizes with masks, cannot be dealt out evenly, nor can
    the windows of those: with weights in shards no process waits for another for ever.
    """
    for name, n in (("a", 11), ("b", 9), ("c", 17)):
        make_images(Path("images", name), n)
    rng = np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 5)):
        for i in range(n):
            size = (40, 50) if i % 2 else (20, 64)
            save(Path(f"d/{part}/images/{i}.png"), rng.integers(0, 256, (*size, 3)))
            save(Path(f"d/{part}/masks/{i}.png"), rng.integers(0, 3, size))
    for n in (1, 2):
        Path(str(n)).mkdir()
        calls: list[Any] = [(train, (n, workdir / f"{n}.pt", strategy), CLIPPED)]
        calls += [(score_masks, (n, strategy), {})]
        if strategy == "ddp":  # an average of the weights needs them whole
            calls += [(score_labels, (n,), {})]
        in_processes(n, call_each, calls)
    one, two = ({**torch.load(f"{n}.pt"), "file": Path(f"{n}.ckpt")} for n in (1, 2))
    assert_same_training(one, two)
    assert_same_scores("masks", ["loss", "miou", "pixel_accuracy", "iou/0", "iou/2"])
    masks = [sorted(Path(n, "predictions").rglob("*.png")) for n in "12"]
    assert [len(paths) for paths in masks] == [13, 13]
    for first, second in zip(*masks, strict=True):
        assert first.relative_to("1") == second.relative_to("2")
        assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))
    if strategy == "ddp":
        names = ["loss", "top1", "top1_balanced", "calibration_error", "top1_class/a"]
        one, two = assert_same_scores("labels", names)
        assert torch.equal(one["confusion"], two["confusion"])
        assert int(one["confusion"].sum()) == 13
        assert_same_tables()


def assert_same_scores(name: str, metrics: list[str]) -> list[dict[str, Any]]:
    scores = [torch.load(f"{n}/{name}.pt") for n in (1, 2)]
    for metric in metrics:
        one, two = (score[f"val/{metric}"] for score in scores)
        assert two == pytest.approx(one, rel=1e-4), metric
    return scores


def assert_same_tables() -> None:
    tables = [Path(n, "predictions.csv").read_text().splitlines() for n in "12"]
    rows = [[line.split(",") for line in table[1:]] for table in tables]
    assert len(rows[0]) == 37
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    shares = [torch.tensor([[float(x) for x in row[2:]] for row in table]) for table in rows]
    torch.testing.assert_close(shares[1], shares[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("accelerator", "devices", "there", "woken"),
    [
        ("tpu", "auto", 1, True),
        ("auto", 1, 8, True),
        ("tpu", [3], 8, True),
        ("tpu", "auto", 8, False),  # eight processes, each of which makes its own
        ("cpu", 1, 8, False),
        ("auto", "auto", 0, False),
    ],
)
def test_a_single_xla_device_is_there_before_the_model(
    accelerator: str, devices: Any, there: int, woken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    fake = SimpleNamespace(device=lambda: calls.append(True))
    monkeypatch.setitem(sys.modules, "torch_xla", fake)
    monkeypatch.setattr(XLAAccelerator, "auto_device_count", lambda: there)
    monkeypatch.setattr(XLAAccelerator, "is_available", lambda: there > 0)
    wake_xla(accelerator, devices)
    assert calls == [True] * woken
