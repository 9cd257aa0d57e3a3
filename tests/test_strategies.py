"""More than one process: the same training as one process with the same global batch."""

import contextlib
import json
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.accelerators.xla import XLAAccelerator
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from simmim import Classifier, load_encoder
from simmim.checkpoints import BEFORE, DurableCheckpointIO, put_in_place, there_is
from simmim.durable import UNFINISHED
from simmim.pretrain import SimMIM
from simmim.run import clean_up
from simmim.strategies import FullyShard, gradient_norm, refuse_fsdp
from simmim.weights.files import read_checkpoint
from simmim.weights.shards import META
from simmim.xla import wake_xla
from support import exhaustive
from support.commands import assert_same_tensors, refused, simmim
from support.folders import make_images
from support.processes import in_processes
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


def train_each(processes: int, runs: dict[Path, dict[str, Any]]) -> None:
    """Train several times in the same processes."""
    for out, options in runs.items():
        train(processes, out, **options)


class Runs:
    """Trains each way once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Path] = {}

    def __call__(self, processes: int, *each: dict[str, Any]) -> list[dict[str, Any]]:
        """What several runs gave: their curves, and the `file` that was saved."""
        keys, calls = [str((processes, options)) for options in each], {}
        for key, options in zip(keys, each, strict=True):
            if key not in self.made:
                self.made[key] = self.folder / f"{len(self.made)}.pt"
                calls[self.made[key]] = options
        if calls:
            with contextlib.chdir(self.folder):  # where the logs of the processes go
                in_processes(processes, train_each, processes, calls)
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
    groups = [json.dumps([{**g, "fused": None} for g in s["param_groups"]]) for s in (a, b)]
    assert groups[0] == groups[1]
    for i in a["state"]:
        for name in a["state"][i]:
            close(b["state"][i][name], a["state"][i][name], atol=1e-8)


CLIPPED = {"clip": 0.05, "batches": 2}

WAYS = {
    "plain": {},
    "clipped": CLIPPED,
    "clipped_by_value": {"clip": 1e-3, "clip_by": "value", "batches": 2},
    "finetune": {"model": "finetune", "clip": 0.05},
    "probe": {"model": "probe", "clip": 0.05},
    "skip": {"model": "skip"},
    "swin_skip": {"model": "swin_skip"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "strategy", "names"),
    [
        (2, "ddp", ["clipped"]),
        (2, "fully_shard", ["clipped"]),
        *(exhaustive(n, strategy, [*WAYS]) for n in (2, 4) for strategy in ("ddp", "fully_shard")),
    ],
)
def test_processes_learn_what_one_learns(
    runs: Runs, processes: int, strategy: str, names: list[str]
) -> None:
    """Clipped by the whole gradient's norm, or by value; with layer decay, frozen, skipping."""
    ways = [WAYS[name] for name in names]
    several = runs(processes, *({**way, "strategy": strategy} for way in ways))
    free, *single = runs(1, {"batches": 2}, *ways)
    for name, one, many in zip(names, single, several, strict=True):
        (assert_same_curves if "skip" in name else assert_same_training)(one, many)
        if "clipped" in name:  # otherwise they would prove nothing
            differences = torch.tensor(one["losses"]) - torch.tensor(free["losses"])
            assert differences.abs().max() > 1e-4
        if name == "finetune":
            groups = read_checkpoint(one["file"])["optimizer_states"][0]["param_groups"]
            scales = {group["lr_scale"] for group in groups}
            assert scales == {0.125, 0.5, 1.0}  # 0.25: the frozen block


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


def test_a_single_xla_device_is_there_before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    fake = SimpleNamespace(device=lambda: calls.append(True))
    monkeypatch.setitem(sys.modules, "torch_xla", fake)
    for accelerator, devices, there, woken in (
        ("tpu", "auto", 1, True),
        ("auto", 1, 8, True),
        ("tpu", [3], 8, True),
        ("tpu", "auto", 8, False),  # eight processes, each of which makes its own
        ("cpu", 1, 8, False),
        ("auto", "auto", 0, False),
    ):
        calls.clear()
        monkeypatch.setattr(XLAAccelerator, "auto_device_count", lambda there=there: there)
        monkeypatch.setattr(XLAAccelerator, "is_available", lambda there=there: there > 0)
        wake_xla(accelerator, devices)
        assert calls == [True] * woken
