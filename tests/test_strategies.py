"""More than one process: the same training as one process with the same global batch."""

import contextlib
import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.accelerators.xla import XLAAccelerator
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
from simmim.strategies import FullyShard, gradient_norm
from simmim.weights.files import read_checkpoint
from simmim.weights.shards import META
from simmim.xla import wake_xla
from support import exhaustive
from support.commands import assert_same_tensors, simmim, write_tiny
from support.folders import make_classes, make_images, save
from support.processes import end, in_processes, kill, program, said, start
from support.small import ByIndex
from support.training import fsdp_on_cpu, trainer_of
from test_exact import OPTIONS
from test_pretrain import TINY, tiny

# What is trained --------------------------------------------------------------------------------

SKIP = {"hidden_tokens": "skip", "head": "transformer", "head_kwargs": {"width": 64}}
SKIP |= {"masking": "random", "masking_kwargs": None}
SWIN = {
    "encoder": "swin_tiny_patch4_window7_224",
    "mask_patch_size": 16,
    "encoder_kwargs": {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "skip": SKIP,
    "swin_skip": {**SWIN, **SKIP},
}
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
    """What each batch gave: its loss over all processes, its gradient's norm, the lr after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, run: L.Trainer, model: Any, optimizer: Any) -> None:
        self.norms.append(float(gradient_norm(run, model)))

    def on_train_batch_end(self, run: L.Trainer, *args: Any) -> None:
        self.losses.append(float(run.callback_metrics["train/loss"]))
        self.rates.append(run.optimizers[0].param_groups[0]["lr"])


class Stop(L.Callback):
    """End after some of the epochs, as a run does that is stopped."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, run: L.Trainer, *args: Any) -> None:
        run.should_stop = run.current_epoch + 1 >= self.epochs


def build(name: str) -> L.LightningModule:
    """A model by its name here."""
    options: dict[str, Any] = {"warmup_epochs": 1, "base_lr": 0.1}
    if name not in CLASSIFIERS:
        options |= {"masking": "foreground", "masking_kwargs": {"nodata": 0}}
        return tiny(**{**options, **MODELS[name]})
    shape = {k: v for k, v in TINY.items() if k != "mask_patch_size"}
    model = Classifier(**shape, **options, **CLASSIFIERS[name], num_classes=3)
    model.model.blocks[0].requires_grad_(False)
    return model


def train_each(processes: int, runs: list[tuple[Path, dict[str, Any]]]) -> None:
    """Train in one of some processes, once for each file and its options.

    Options: strategy, batches (to accumulate), clip, clip_by (norm or value), epochs, save (a
    checkpoint), load (one to go on from), model (one of MODELS or CLASSIFIERS).
    """
    fsdp_on_cpu()
    for out, options in runs:
        train(processes, out, **options)


def train(
    processes: int,
    out: Path,
    strategy: str = "ddp",
    batches: int = 1,
    clip: float | None = None,
    clip_by: str | None = None,
    epochs: int = 4,
    save: Path | None = None,
    load: Path | None = None,
    model: str = "plain",
) -> None:
    torch.manual_seed(0)
    module, keep = build(model), Keep()
    assert not [m for m in module.modules() if isinstance(m, nn.Dropout) and m.p]
    trainer = trainer_of(
        processes,
        out.parent,
        keep,
        Stop(epochs),
        strategy=strategy,
        max_epochs=4,
        gradient_clip_val=clip,
        gradient_clip_algorithm=clip_by,
        accumulate_grad_batches=batches,
        log_every_n_steps=1,
    )
    trainer.strategy.checkpoint_io = DurableCheckpointIO()
    trainer.fit(module, Data(8 // processes // batches), ckpt_path=load)
    if save:
        trainer.save_checkpoint(save)
    if trainer.is_global_zero:
        torch.save({"losses": keep.losses, "norms": keep.norms, "rates": keep.rates}, out)


# What training comes to -------------------------------------------------------------------------


class Runs:
    """Trains each way once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[Any, dict[str, Any]] = {}

    def __call__(self, processes: int, **options: Any) -> dict[str, Any]:
        """What a run gave, and the `file` of its last checkpoint."""
        return self.together(processes, options)[0]

    def together(self, processes: int, *options: dict[str, Any]) -> list[dict[str, Any]]:
        """What several runs gave, one after the other in the same processes."""
        keys = [(processes, str(sorted(each.items()))) for each in options]
        new = {}
        for key, each in zip(keys, options, strict=True):
            if key not in self.made and key not in new:
                out = self.folder / f"{len(self.made) + len(new)}.pt"
                new[key] = (out, {**each, "save": out.with_suffix(".ckpt")})
        if new:
            with contextlib.chdir(self.folder):  # where the logs of the processes go
                in_processes(processes, train_each, processes, list(new.values()))
        for key, (out, each) in new.items():
            self.made[key] = {**torch.load(out, weights_only=True), "file": each["save"]}
        return [self.made[key] for key in keys]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def close(a: Any, b: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=atol)


def assert_same_training(one: dict[str, Any], many: dict[str, Any], optimizer: bool = True) -> None:
    """Losses, learning rates, weights, and the optimiser's state of each parameter."""
    for key in ("losses", "norms"):
        close(many[key], one[key])
    assert many["rates"] == one["rates"]
    a, b = (read_checkpoint(run["file"]) for run in (one, many))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name in a["state_dict"]:
        close(b["state_dict"][name], a["state_dict"][name], atol=1e-5)
    (a,), (b,) = a["optimizer_states"], b["optimizer_states"]
    kept = [json.dumps([{**g, "fused": None} for g in s["param_groups"]]) for s in (a, b)]
    assert json.loads(kept[0]) == json.loads(kept[1])  # a tuple may have become a list
    for i in a["state"] if optimizer else ():
        for name in a["state"][i]:
            close(b["state"][i][name], a["state"][i][name], atol=1e-8)


SHARDED = ("fully_shard", "fully_shard_sharded", "fsdp", "fsdp_sharded")
# Where there is no GPU to copy from, torch's FSDP gives the moments of all names one buffer.
WHOLE = {"fsdp": False, "fsdp_no_shard": False}


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(runs: Runs) -> None:
    assert_same_training(runs(1), runs(2))


@pytest.mark.exhaustive
def test_four_processes_learn_what_one_learns(runs: Runs) -> None:
    assert_same_training(runs(1), runs(4))


@pytest.mark.exhaustive
def test_clipping_and_accumulation_mean_the_same(runs: Runs) -> None:
    """What is clipped is the norm of the whole gradient: otherwise the weights would differ."""
    options = {"clip": 0.05, "batches": 2}
    one, free = runs.together(1, options, {"batches": 2})
    assert max(abs(a - b) for a, b in zip(one["losses"], free["losses"], strict=True)) > 1e-4
    ways = ("ddp", *SHARDED, "fsdp_no_shard")  # the last has the whole norm in every process
    of_two = runs.together(2, *({"strategy": way, **options} for way in ways))
    for way, many in zip(ways, of_two, strict=True):
        assert_same_training(one, many, WHOLE.get(way, True))


@pytest.mark.exhaustive
def test_clipping_by_value_means_the_same(runs: Runs) -> None:
    """Gradients are averaged over processes before each value is cut off, in shards too."""
    options: dict[str, Any] = {"clip": 1e-3, "clip_by": "value", "batches": 2}
    one, free = runs.together(1, options, {"batches": 2})
    assert max(abs(a - b) for a, b in zip(one["losses"], free["losses"], strict=True)) > 1e-4
    ways = ("ddp", "fully_shard", "fsdp")
    of_two = runs.together(2, *({**options, "strategy": way} for way in ways))
    for way, many in zip(ways, of_two, strict=True):
        assert_same_training(one, many, WHOLE.get(way, True))
    assert_same_training(one, runs(4, **options, strategy="fully_shard"))


@pytest.mark.exhaustive
def test_layer_decay_and_frozen_parameters_mean_the_same(runs: Runs) -> None:
    models = ("finetune", "probe")
    ways = ("ddp", "fully_shard", "fsdp")
    singles = runs.together(1, *({"model": model, "clip": 0.05} for model in models))
    cases = [(model, way) for model in models for way in ways]
    of_two = runs.together(2, *({"model": m, "clip": 0.05, "strategy": w} for m, w in cases))
    for (model, way), many in zip(cases, of_two, strict=True):
        one = singles[models.index(model)]
        assert_same_training(one, many, WHOLE.get(way, True))
    groups = read_checkpoint(singles[0]["file"])["optimizer_states"][0]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {0.125, 0.5, 1.0}  # 0.25: the frozen block


@pytest.mark.slow
def test_shards_learn_what_one_process_learns(runs: Runs) -> None:
    assert_same_training(runs(1), runs(2, strategy="fully_shard"))


@pytest.mark.exhaustive
def test_four_shards_learn_what_one_process_learns(runs: Runs) -> None:
    assert_same_training(runs(1), runs(4, strategy="fully_shard"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["fully_shard", "fsdp"])
@pytest.mark.parametrize("model", ["skip", "swin_skip"])
def test_hidden_tokens_are_skipped_in_shards(runs: Runs, model: str, strategy: str) -> None:
    """Blocks and stages are called as timm does: their weights are gathered for the call only."""
    one, many = runs(1, model=model), runs(2, model=model, strategy=strategy)
    for key in ("losses", "norms"):
        close(many[key], one[key])
    assert many["rates"] == one["rates"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "ways", [("fully_shard", 2), ("fully_shard_sharded", 4), ("fsdp_sharded", 2)]
)
def test_a_sharded_run_goes_on_in_any_way(
    runs: Runs, ways: tuple[str, int], tmp_path: Path
) -> None:
    """With the same strategy on two processes, with one process, and from a file of `convert`."""
    strategy, processes = ways
    whole = runs(1, clip=0.05)
    half = runs(processes, strategy=strategy, clip=0.05, epochs=2)["file"]
    assert half.is_dir() == strategy.endswith("sharded")
    assert {path.name for path in half.parent.glob(".*")} == set()
    converted = half
    if half.is_dir():
        converted = tmp_path / "one.ckpt"
        simmim("convert --weights", str(half), "--out", str(converted))
    for strategies, processes, file in (
        (strategy, 2, half),
        ("auto", 1, half),
        (strategy, 2, converted),
    ):
        rest = runs(processes, strategy=strategies, clip=0.05, load=file)
        rest = {**rest, **{key: whole[key][:4] + rest[key] for key in ("losses", "norms", "rates")}}
        assert_same_training(whole, rest)
    model = SimMIM.load_from_checkpoint(converted)
    assert load_encoder(half).state_dict().keys() == model.encoder.model.state_dict().keys()
    for name, tensor in load_encoder(half).state_dict().items():
        assert torch.equal(tensor, model.encoder.model.state_dict()[name])


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", SHARDED[::2])
def test_a_run_of_one_process_goes_on_in_shards(runs: Runs, strategy: str) -> None:
    whole, half = runs(1, clip=0.05), runs(1, clip=0.05, epochs=2)
    rest = runs(2, strategy=strategy, clip=0.05, load=half["file"])
    rest = {**rest, **{key: whole[key][:4] + rest[key] for key in ("losses", "norms", "rates")}}
    assert_same_training(whole, rest, WHOLE.get(strategy, True))


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
    strategy = {"save_distributed_checkpoint": True}
    strategy = {"class_path": "simmim.strategies.FullyShard", "init_args": strategy}
    two = {"devices": 2, "max_epochs": 5, "strategy": strategy}
    write_tiny(workdir, **{**OPTIONS, "trainer": two})
    fit = [sys.executable, "-m", "simmim", "pretrain", "fit", "-c", "tiny.yaml"]
    often = [*fit, "--checkpoint.every_n_minutes=0"]
    end(start(program, *often, "--name=whole"))
    whole, last = (Path(f"runs/{name}/version_0/checkpoints/last.ckpt") for name in ("whole", "b"))
    steps = [0]
    for i in range(3):
        more = ["--name=b", *(["--ckpt_path=last"] if i else [])]
        run = start(program, *often, *more)
        began, before = time.time(), last.stat().st_ino if last.exists() else None
        while run.is_alive() and (not last.exists() or last.stat().st_ino == before):
            assert time.time() - began < 120
            time.sleep(0.001)
        time.sleep(0.03 * i)
        assert kill(run) == -signal.SIGKILL, said()[-3000:]
        assert there_is(last)
        steps.append(read_checkpoint(last)["global_step"])
    assert steps == sorted(steps)
    one = read_checkpoint(whole)
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


def test_an_index_of_shards_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({}, tmp_path / META)
    with pytest.raises(ValueError, match=r"is no whole checkpoint in shards: \.metadata"):
        read_checkpoint(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"it asks to run (posix|nt)\.system"):
        read_checkpoint(tmp_path)
    assert not Path("evil").exists()


def test_tensor_parallel_is_refused() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size 2 is not supported"):
        FullyShard(tensor_parallel_size=2)


# What is scored ---------------------------------------------------------------------------------


def score_labels(processes: int, out: Path) -> None:
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = Classifier(
        encoder="vit_tiny_patch16_224", img_size=32, encoder_kwargs=kwargs, ema_decay=0.5
    )
    options: dict[str, Any] = {"img_size": 32, "num_workers": 0, "val_fraction": 0.35}
    data = ClassificationData(root="images", batch_size=8 // processes, **options)
    watchers = ConfusionMatrix(), PredictionTable()
    trainer = trainer_of(processes, out, *watchers, max_epochs=2)
    trainer.fit(model, data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.predict(model, data, return_predictions=False)
    if trainer.is_global_zero:
        torch.save({"metrics": found, "confusion": model.confusion_matrix}, out / "found.pt")


def in_one_and_two(function: Any, *args: Any) -> list[Any]:
    """What one process and two have found, in the folders 1 and 2."""
    for processes in (1, 2):
        Path(str(processes)).mkdir()
        in_processes(processes, function, processes, Path(str(processes)), *args)
    return [torch.load(f"{processes}/found.pt", weights_only=True) for processes in (1, 2)]


@pytest.mark.slow
def test_two_processes_score_what_one_scores(workdir: Path) -> None:
    """Each validation image counts once, though 13 cannot be dealt out evenly."""
    for name, n in (("a", 11), ("b", 9), ("c", 17)):
        make_images(Path("images", name), n)
    one, two = in_one_and_two(score_labels)
    assert torch.equal(one["confusion"], two["confusion"])
    assert int(one["confusion"].sum()) == 13
    for name in ("loss", "top1", "top1_balanced", "calibration_error", "top1_class/a"):
        shares = [run["metrics"][f"val/{name}"] for run in (one, two)]
        assert shares[1] == pytest.approx(shares[0], rel=1e-4), name
    tables = [Path(n, "predictions.csv").read_text().splitlines() for n in "12"]
    rows = [[line.split(",") for line in table[1:]] for table in tables]
    assert len(rows[0]) == 37
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    shares = [torch.tensor([[float(x) for x in row[2:]] for row in table]) for table in rows]
    torch.testing.assert_close(shares[1], shares[0], rtol=1e-3, atol=1e-4)


def score_masks(processes: int, out: Path, strategy: str) -> None:
    torch.manual_seed(0)
    model = Segmenter(
        encoder="vit_tiny_patch16_224",
        img_size=32,
        encoder_kwargs={"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
        decoder_channels=16,
        base_lr=0.0,  # a BatchNorm sees other batches in two processes: nothing is to be learned
        warmup_lr=0.0,
    )
    data = SegmentationData("d", img_size=32, batch_size=4 // processes, num_workers=0)
    trainer = trainer_of(processes, out, Segmentations(), MaskWriter(), strategy=strategy)
    trainer.fit(model, data)  # every trained parameter is reached, or DDP stops here
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    trainer.validate(model, data, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.predict(model, data, return_predictions=False)
    if trainer.is_global_zero:
        torch.save(found, out / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", exhaustive("fully_shard")])
def test_two_processes_segment_what_one_segments(workdir: Path, strategy: str) -> None:
    """Each validation image counts once, though five of two sizes cannot be dealt out evenly.

    Nor can their windows: with weights in shards no process waits for another for ever.
    """
    rng = np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 5)):
        for i in range(n):
            size = (40, 50) if i % 2 else (20, 64)
            save(Path(f"d/{part}/images/{i}.png"), rng.integers(0, 256, (*size, 3)))
            save(Path(f"d/{part}/masks/{i}.png"), rng.integers(0, 3, size))
    found = in_one_and_two(score_masks, strategy)
    for name in ("loss", "miou", "pixel_accuracy", "iou/0", "iou/2"):
        shares = [scores[f"val/{name}"] for scores in found]
        assert shares[1] == pytest.approx(shares[0], rel=1e-4), name
    masks = [sorted(Path(n, "predictions").rglob("*.png")) for n in "12"]
    assert [len(paths) for paths in masks] == [13, 13]
    for one, two in zip(*masks, strict=True):
        assert one.relative_to("1") == two.relative_to("2")
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))


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
