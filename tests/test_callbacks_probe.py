"""The online probe: what it reads, when, and that it leaves no trace."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from callback_parts import DigitsData, MiniSimMIM, trainer
from simmim.callbacks import (
    CollapseAlarm,
    NonFiniteLoss,
    OnlineProbe,
    Reconstructions,
    StopOnNonFinite,
)
from simmim.evaluation.probe import fit_linear_probe, knn_scores, top1
from simmim.pretrain import SimMIM
from simmim.training.strategies import shard
from support.commands import table
from support.processes import in_processes
from support.small import VIT
from support.training import trainer_of


def embeddings(model: MiniSimMIM, data: DigitsData) -> list[tuple[Tensor, Tensor]]:
    model.eval()
    sets = []
    for part in (data.train, data.val):
        images = part.images.float() / 127.5 - 1
        with torch.no_grad():
            embedding = model.encoder(images).mean((2, 3))
        sets.append((embedding, part.labels[part.first : part.first + len(part)]))
    return sets


def test_it_reads_the_mean_of_the_patch_tokens(tmp_path: Path) -> None:
    probe, model, data = OnlineProbe(), MiniSimMIM(), DigitsData()
    trainer(tmp_path, probe).validate(model, datamodule=data, verbose=False)
    (train, train_labels), (held_out, labels) = embeddings(model, data)
    assert probe.pretrained == {
        "knn_top1": top1(knn_scores(train, train_labels, held_out), labels),
        "probe_top1": top1(fit_linear_probe(train, train_labels)(held_out), labels),
    }
    assert probe.pretrained["probe_top1"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("stops", [False, True], ids=["as planned", "early"])
def test_it_reads_before_during_and_after_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stops: bool
) -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = stops and trainer.current_epoch == 2

    logger, data = CSVLogger(tmp_path), DigitsData()
    probe, model = OnlineProbe(2), MiniSimMIM(0.03)
    fit = trainer(tmp_path, probe, Stop(), max_epochs=5, logger=logger)
    fit.fit(model, datamodule=data)
    rows = table(Path(logger.log_dir) / "metrics.csv")
    read = [(int(r["step"]), float(r["val/probe_top1"])) for r in rows if r["val/probe_top1"]]
    # untrained, after 2 and 4 epochs, and after the last
    assert [step for step, _ in read] == ([0, 15, 23] if stops else [0, 15, 31, 39])
    assert read[0][1] == pytest.approx(probe.untrained["probe_top1"])
    assert read[-1][1] == pytest.approx(probe.pretrained["probe_top1"])
    (train, train_labels), (held_out, labels) = embeddings(model, data)
    assert probe.pretrained["knn_top1"] == top1(knn_scores(train, train_labels, held_out), labels)
    if not stops:  # else it is read after the last epoch
        assert float(fit.callback_metrics["val/probe_top1"]) == pytest.approx(read[-1][1])
    shown = capsys.readouterr().out.splitlines()[-3:]
    assert shown[0].split()[-2:] == ["untrained", "pretrained"]
    expected = [f"{scores['knn_top1']:.3f}" for scores in (probe.untrained, probe.pretrained)]
    assert shown[1].split()[-2:] == expected


def test_test_images_have_their_own_name(tmp_path: Path) -> None:
    found = trainer(tmp_path, OnlineProbe()).test(MiniSimMIM(), DigitsData(), verbose=False)[0]
    assert set(found) == {"test/loss", "test/knn_top1", "test/probe_top1"}


@pytest.mark.parametrize("kind", ["no labels", "says so in vain", "nothing held out"])
@pytest.mark.filterwarnings("ignore:Total length of `list`")  # Lightning asks whether it was meant
def test_without_labels_or_held_out_images_nothing_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    data = DigitsData(64, labels=kind == "nothing held out")
    data.has_labels = kind != "no labels"
    if kind == "nothing held out":
        monkeypatch.setattr(data, "val_dataloader", lambda: [])
    probe, pictures = OnlineProbe(1), Reconstructions(1)
    fit = trainer(tmp_path, probe, pictures, max_epochs=1)
    fit.fit(MiniSimMIM(), datamodule=data)
    assert probe.untrained == probe.pretrained == {}
    assert not any("knn" in name for name in fit.callback_metrics)
    assert len(list((tmp_path / "reconstructions").iterdir())) == 2  # of training images, if needed


def test_big_sets_are_read_in_part_and_always_the_same(tmp_path: Path) -> None:
    reads = []
    for _ in range(2):
        data = DigitsData()
        trainer(tmp_path, OnlineProbe(max_samples=40)).validate(MiniSimMIM(), data, verbose=False)
        reads.append(data.train.read)
    assert reads[0] == reads[1] == sorted(set(reads[0]))
    assert len(reads[0]) == 40
    assert max(reads[0]) > 200  # not only the first ones


def test_layer_pooling_and_mistakes(tmp_path: Path) -> None:
    first = OnlineProbe(layer=1, pooling="max", k=1000)
    trainer(tmp_path, first).validate(MiniSimMIM(), DigitsData(), verbose=False)
    assert 0.2 < first.pretrained["knn_top1"] < 1
    for wrong in ({"pooling": "cls"}, {"k": 0}, {"every_n_epochs": -1}, {"max_samples": 0}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            OnlineProbe(**wrong)  # type: ignore[arg-type]
    model = SimMIM(img_size=32, mask_patch_size=8, encoder_kwargs=VIT)
    OnlineProbe(layer=2).setup(trainer(tmp_path), model, "fit")
    with pytest.raises(ValueError, match=r"layer 4 .* use 1 to 2 \(--probe.layer\)"):
        OnlineProbe(layer=4).setup(trainer(tmp_path), model, "fit")


def watchers() -> list[L.Callback]:
    return [OnlineProbe(1), Reconstructions(1), CollapseAlarm(), StopOnNonFinite()]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_watching_changes_no_bit_of_the_weights(tmp_path: Path, precision: Any) -> None:
    weights = []
    for callbacks in ([], watchers()):
        L.seed_everything(7, verbose=False)
        model = MiniSimMIM(0.03)  # with dropout, and a loader that shuffles
        fit = trainer(tmp_path, *callbacks, precision=precision, max_epochs=2)
        fit.fit(model, datamodule=DigitsData())
        weights.append((model.state_dict(), torch.rand(3)))
        assert all(module.training for module in model.modules())
    (without, after_without), (watched, after_watched) = weights
    assert all(torch.equal(without[name], watched[name]) for name in without)
    assert torch.equal(after_without, after_watched)  # and the generator goes on where it was


def test_features_are_read_in_the_runs_precision(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Watched(MiniSimMIM):
        def configure_model(self) -> None:
            self.encoder.mix[0].register_forward_hook(lambda m, args, out: seen.append(out.dtype))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            """Nothing but the probe runs the encoder."""

    fit = trainer(tmp_path, OnlineProbe(), precision="bf16-mixed")
    fit.validate(Watched(), DigitsData(), verbose=False)
    assert set(seen) == {torch.bfloat16}


def test_a_resumed_run_still_knows_the_untrained_numbers(tmp_path: Path) -> None:
    first = OnlineProbe(1)
    keep = ModelCheckpoint(tmp_path, filename="last")
    fit = trainer(tmp_path, first, keep, max_epochs=1, enable_checkpointing=True)
    fit.fit(MiniSimMIM(0.03), datamodule=DigitsData())
    second = OnlineProbe(1)
    fit = trainer(tmp_path, second, keep, max_epochs=2, enable_checkpointing=True)
    fit.fit(MiniSimMIM(0.03), datamodule=DigitsData(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert second.untrained == first.untrained != {}
    assert second.pretrained != first.pretrained


class Dealt(DigitsData):
    def train_dataloader(self) -> DataLoader[Any]:
        ranks = self.trainer.world_size
        sampler = DistributedSampler(self.train, ranks, self.trainer.global_rank, seed=0)
        return DataLoader(self.train, batch_size=32 // ranks, sampler=sampler)


class Shared(MiniSimMIM):
    def configure_model(self) -> None:
        shard(self)


class BadInOne(Shared):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 and self.global_rank == 1 else loss


class RuinOne(L.Callback):
    """Spoil the weights that the second process holds, after a loss that was finite."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 8:
            for parameter in module.parameters():
                own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                own.detach().fill_(float("nan"))


def watch(processes: int, folder: Path, strategy: str) -> None:
    """Train with callbacks in one of some processes, then meet what is bad in one of them."""
    torch.manual_seed(0)
    probe = OnlineProbe()
    watchers = [probe, Reconstructions(num_images=2), CollapseAlarm(), StopOnNonFinite()]

    def run(*callbacks: L.Callback, **options: Any) -> L.Trainer:
        options = {"max_epochs": 2, "num_sanity_val_steps": 0, "log_every_n_steps": 4, **options}
        return trainer_of(processes, folder, *callbacks, strategy=strategy, **options)

    data, model, fit = Dealt(train=256, val=95), Shared(0.03), run(*watchers)
    model.encoder.drop.p = 0.0  # each process draws its own
    fit.fit(model, datamodule=data)
    collapse = {k: float(v) for k, v in fit.callback_metrics.items() if k.startswith("collapse/")}
    result: dict[str, Any] = {"untrained": probe.untrained, "pretrained": probe.pretrained}
    result |= {"collapse": collapse, "stopped": stopped(run(StopOnNonFinite()), BadInOne(), data)}
    keep = ModelCheckpoint(folder, filename="last")
    options = {"enable_checkpointing": True, "log_every_n_steps": 1000}
    ruin = run(StopOnNonFinite(), RuinOne(), keep, **options)
    result["ruined"] = stopped(ruin, Shared(), data)
    if fit.global_rank == 0:
        torch.save(result, folder / "result.pt")


def stopped(fit: L.Trainer, model: L.LightningModule, data: L.LightningDataModule) -> str:
    """What a run was stopped with."""
    try:
        fit.fit(model, datamodule=data)
    except NonFiniteLoss as error:
        return str(error)
    return ""


@pytest.mark.exhaustive
@pytest.mark.parametrize(("processes", "strategy"), [(2, "ddp"), (4, "ddp"), (2, "fully_shard")])
def test_processes_read_what_one_reads(workdir: Path, processes: int, strategy: str) -> None:
    """Of 95 images, which no number of processes shares evenly: to the digit, for equal weights.

    And all of them stop where one meets a loss, or holds weights, that are no numbers.
    """
    in_processes(processes, watch, processes, Path("2"), strategy)
    in_processes(1, watch, 1, Path("1"), "auto")
    one, two = (torch.load(Path(n, "result.pt")) for n in ("1", "2"))
    assert two["untrained"] == one["untrained"]
    # Sums over processes round otherwise: one image of the 95 may fall to the other side.
    assert two["pretrained"] == pytest.approx(one["pretrained"], abs=1.5 / 95)
    assert one["collapse"].keys() > {"collapse/alarm", "collapse/encoder_grad_norm"}
    assert two["collapse"] == pytest.approx(one["collapse"], rel=1e-3)
    assert (one["stopped"], one["ruined"]) == ("", "")
    assert two["stopped"].startswith("train/loss became infinite")
    assert two["ruined"].startswith("the weights are infinite")
    assert len(list((Path("2", "reconstructions")).iterdir())) == 2
