"""`simmim compare`: paired runs, equal steps, going on, and what is refused."""

import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from simmim import SimMIM
from simmim.commands.compare import command, compare
from simmim.commands.compare.runs import (
    Recipe,
    choose_budgets,
    open_arm,
    open_data,
    open_model,
    train,
)
from support import exhaustive
from support.commands import refused, simmim, table
from support.folders import save
from support.training import trainer_of

pytestmark = pytest.mark.slow

TINY: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FEW: dict[str, Any] = {"budgets": [1, 1.0], "seeds": 2, "epochs": 0.5, "min_steps": 3}
ON_CPU: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "accelerator": "cpu"}
OPTIONS = [f"--{k}={v}" for k, v in {**FEW, **ON_CPU}.items()]


@pytest.fixture
def folder(workdir: Path) -> Path:
    """Three classes of stripes, below the working folder."""
    rng = np.random.default_rng(0)
    for name, angle in {"flat": 0.0, "slope": 0.8, "steep": 1.57}.items():
        for i in range(12):
            y, x = np.mgrid[:32, :32]
            wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) / 2 + rng.uniform(0, 6))
            pixels = 127 + 90 * wave + rng.normal(0, 20, (32, 32))
            save(workdir / "images" / name / f"{i:02d}.png", pixels.clip(0, 255))
    return workdir / "images"


@pytest.fixture
def weights(folder: Path) -> str:
    """The folder of a run whose encoder has seen nothing: what counts here is who gets what."""
    torch.manual_seed(77)
    model = SimMIM("vit_tiny_patch16_224", img_size=32, mask_patch_size=8, encoder_kwargs=TINY)
    state = model.state_dict()
    state["mean"], state["std"] = torch.full((1, 3, 1, 1), 0.4), torch.full((1, 3, 1, 1), 0.3)
    run = folder.parent / "runs" / "pre" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    content = {"state_dict": state, "hyper_parameters": dict(model.hparams)}
    torch.save(content, run / "checkpoints" / "last.ckpt")
    data = {"root": str(folder), "val_fraction": 0.25, "split_seed": 3, "hflip": 0.0}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return "runs/pre/version_0"


def a_recipe(folder: Path, **kwargs: Any) -> Recipe:
    options: dict[str, Any] = {"length": 100.0, "epochs": 1.0, "min_steps": 3, **kwargs}
    return Recipe(
        model={"warmup_epochs": 10, "drop_path_rate": 0.1},
        data={"root": str(folder), "batch_size": 4, "val_fraction": 0.25, "num_workers": 0},
        trainer={"accelerator": "cpu", "precision": "32-true"},
        **options,
    )


# The whole of it ---------------------------------------------------------------------------------


def test_a_comparison_leaves_a_table_a_picture_and_a_sentence(
    weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    simmim("compare -c finetune_small --weights", weights, *OPTIONS)
    out, shown = Path("runs/compare/version_0"), capsys.readouterr().out
    rows = table(out / "results.csv")
    assert list(rows[0])[:7] == ["mode", "arm", "budget", "images", "seed", "steps", "top1"]
    assert [(r["seed"], r["images"], r["arm"]) for r in rows] == [
        *product("01", ("3", "27"), ("scratch", "pretrained"))
    ]
    for images in ("3", "27"):
        assert len({row["steps"] for row in rows if row["images"] == images}) == 1
    summary = (out / "summary.md").read_text()
    assert summary in shown
    for words in ("| 3 labels (11 %, 1 a class)", "| 27 labels (100 %, 9 a class)", "were short"):
        assert words in summary
    ours, scratch = (
        np.mean([100 * float(r["top1"]) for r in rows if (r["arm"], r["images"]) == (arm, "3")])
        for arm in ("pretrained", "scratch")
    )
    last = summary.splitlines()[-1]  # two seeds after three steps show nothing
    assert last.startswith("Not shown: the difference is within the spread of the seeds")
    assert f"pretrained reaches {ours:.1f} % against {scratch:.1f} % from scratch" in last
    assert "new weights" in shown
    assert "tensors used" in shown
    picture = Image.open(out / "plot.png")
    assert picture.width > 800
    assert len(picture.convert("RGB").getcolors(10**6) or []) > 50
    data = yaml.safe_load((out / "config.yaml").read_text())["finetune"]["data"]
    assert (data["split_seed"], data["hflip"]) == (3, 0.0)  # the run's


def test_an_interrupted_comparison_goes_on_to_the_same_results(
    weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = compare(weights, **FEW, **ON_CPU)
    began: list[str] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        began.append(kwargs["name"])
        if len(began) == 4:  # once: what goes on is counted from there
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(command, "train", interrupted)
    said = refused(capsys, "compare --weights", weights, *OPTIONS, status=130)
    assert "--out runs/compare/version_1" in said.replace("\\", "/")
    out = Path("runs/compare/version_1")
    before = table(out / "results.csv")
    assert len(before) == 3
    with (out / "results.csv").open("a") as file:
        file.write("finetune,pretr")  # as a crash may leave it
    gone_on = compare(weights, **FEW, **ON_CPU, out=str(out))
    assert len(began) == 4 + 5  # what is complete is not trained again
    after = table(out / "results.csv")
    assert after[:3] == before
    assert len(after) == 8
    assert [(r.top1, r.train_top1) for r in gone_on.results] == [
        (r.top1, r.train_top1) for r in whole.results
    ]
    assert gone_on.verdict == whole.verdict
    more = compare(weights, **{**FEW, "seeds": 3}, **ON_CPU, out=str(out))  # a seed more
    assert len(more.results) == 12
    assert len(table(out / "results.csv")) == 12


def test_probes_and_public_weights_of_another_architecture(
    weights: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=7)
    timm.models.save_for_hf(model, "public", safe_serialization=False)
    few = {**FEW, "budgets": [2], "mode": "both"}
    done = compare(weights, str(folder), public="public", **few, **ON_CPU)
    assert [(r.mode, r.arm) for r in done.results[:6]] == [
        (mode, arm) for mode in ("finetune", "probe") for arm in ("scratch", "pretrained", "public")
    ]
    assert "public: test_vit" in (shown := capsys.readouterr().out)
    assert "another architecture" in shown
    one, two = done.verdict.splitlines()
    assert one.startswith("finetune: ")
    assert two.startswith("probe: ")
    assert "better than the public weights?" in done.verdict
    assert "pretrained - public" in done.summary


# Fairness ----------------------------------------------------------------------------------------


def test_arms_differ_in_nothing_but_the_weights(weights: str, folder: Path) -> None:
    recipe = a_recipe(folder)
    ours = open_arm(weights, recipe.model)
    arms = {"ours": ours, "scratch": ours.from_scratch()}
    data = {name: open_data(recipe, arm, 2, 5) for name, arm in arms.items()}
    chosen = {name: {d.sets["training"].name(i) for i in range(6)} for name, d in data.items()}
    assert chosen["ours"] == chosen["scratch"]
    other = open_data(recipe, ours, 2, 6).sets["training"]
    assert {other.name(i) for i in range(6)} != chosen["ours"]

    models = {name: open_model(recipe, arm, data["ours"], 5) for name, arm in arms.items()}
    one, two = (model.state_dict() for model in models.values())
    assert one.keys() == two.keys()
    equal = {name for name in one if torch.equal(one[name], two[name])}
    assert {"mean", "std", "encoder.model.head.weight", "encoder.model.head.bias"} <= equal
    assert one["mean"].unique().tolist() == pytest.approx([0.4])
    assert "encoder.model.blocks.0.attn.qkv.weight" not in equal
    file = torch.load(Path(weights, "checkpoints/last.ckpt"), weights_only=True)["state_dict"]
    name = "encoder.model.blocks.1.mlp.fc1.weight"
    assert torch.equal(one[name], file[name])
    assert models["ours"].hparams == models["scratch"].hparams
    again = open_model(recipe, arms["scratch"], data["ours"], 5).state_dict()
    assert torch.equal(again[name], two[name])
    later = open_model(recipe, arms["scratch"], data["ours"], 6).state_dict()
    assert not torch.equal(later[name], two[name])
    head = "encoder.model.head.weight"
    assert not torch.equal(later[head], two[head])


def test_the_accuracy_is_that_of_classify_after_the_last_step(weights: str, folder: Path) -> None:
    recipe = a_recipe(folder, min_steps=30)
    arm = open_arm(weights, recipe.model)
    budget = choose_budgets([1.0], [9, 9, 9])[0]
    bar = type("Bar", (), {"n": 0, "update": lambda self, n: setattr(self, "n", self.n + n)})()
    found = train(recipe, arm, budget, 1, mode="finetune", name="pretrained", bar=bar)
    assert found.steps == recipe.steps(27) == bar.n == 30

    data = open_data(recipe, arm, None, 1)
    model = open_model(recipe, arm, data, 1)
    options: dict[str, Any] = {"max_steps": 30, "max_epochs": None, "limit_val_batches": 1.0}
    trainer = trainer_of(1, folder.parent, num_sanity_val_steps=0, **options)
    trainer.fit(model, datamodule=data)
    curve = trainer.lr_scheduler_configs[0].scheduler
    assert curve.curve["warmup_steps"] == 3  # 10 of 100 epochs, of 30 steps
    (metrics,) = trainer.validate(model, datamodule=data, verbose=False)
    assert metrics["val/top1"] == pytest.approx(found.top1)
    assert metrics["val/top1_balanced"] == pytest.approx(found.top1_balanced)
    assert len(found.correct) == len(data.sets["validation"]) == 9


def test_the_rule_of_the_length() -> None:
    digits = a_recipe(Path("digits"), epochs=6.0, min_steps=150)
    digits.data["batch_size"] = 32
    # One batch each; 6 x 4 are fewer; 6 x 44.
    assert [digits.steps(images) for images in (10, 142, 1437)] == [150, 150, 264]
    digits.trainer["accumulate_grad_batches"] = 4
    assert digits.steps(1437) == 150  # 6 x 11 are fewer


@pytest.mark.parametrize("encoder", ["test_resnet", exhaustive("test_convnext")])
def test_other_encoders_with_a_classifier_of_their_own(folder: Path, encoder: str) -> None:
    model = timm.create_model(encoder, num_classes=3)
    timm.models.save_for_hf(model, "public", safe_serialization=False)
    recipe = a_recipe(folder)
    arm = open_arm("public", {"img_size": 32})
    data = open_data(recipe, arm, 2, 0)
    one, two = (open_model(recipe, each, data, 0).model for each in (arm, arm.from_scratch()))
    head, head_of_two = (each.get_classifier().weight for each in (one, two))
    theirs = model.get_classifier().weight
    assert head.shape == theirs.shape
    assert not torch.equal(head, theirs)  # new in both, and alike
    assert torch.equal(head, head_of_two)
    name, tensor = next(iter(model.named_parameters()))
    assert torch.equal(one.get_parameter(name), tensor)
    assert not torch.equal(two.get_parameter(name), tensor)


# Budgets -----------------------------------------------------------------------------------------


def test_budgets_are_counted_and_named() -> None:
    counts = [143] * 7 + [145] * 3
    found = choose_budgets([1.0, 0.1, 0.01, 0.001, 1, 10], counts)
    assert [(b.images, b.amount) for b in found] == [
        (10, 0.01),
        (100, 10),
        (140, 0.1),
        (1436, None),
    ]
    assert str(found[0]) == "10 labels (0.7 %, 1 a class)"
    assert str(found[2]) == "140 labels (9.7 %, 14 a class)"
    assert str(found[3]) == "1,436 labels (100 %, 143 to 145 a class)"
    assert [b.images for b in choose_budgets([0.5], [10, 1, 0])] == [6]


@pytest.mark.parametrize(("amount", "words"), [(0, "0.1 for a tenth"), (1.5, "1.5 is neither")])
def test_what_is_no_budget(amount: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose_budgets([amount], [5, 5])
    with pytest.raises(ValueError, match="more than the 5 training images of the smallest"):
        choose_budgets([6], [5, 9])


# Mistakes ----------------------------------------------------------------------------------------


MISTAKES = {
    "--weights=no/such": "no/such does not exist",
    "--weights=lone.ckpt": "give root",
    "{run} --root=nowhere": "'nowhere' does not exist",
    "{run} --root=images/flat": "has no labels",
    "{run} --root=single": "has one class, 'flat'",
    "{run} -c=finetun_small": "did you mean 'finetune_small'?",
    "{run} --mode=both -c linear_probe": "a recipe for each",
    "{run} --mode=finetune -c linear_probe": "is to probe",
    "{run} --budgets=[200]": "more than the 9 training images",
    "{run} --budgets many": "it takes a whole number or a number",
    "{run} --seeds=0": "seeds 0",
    "{run} --epochs=-1": "epochs -1",
    "{run} --labels=several.csv": "one class an image",
    "{run} --out=images": "something else than a comparison",
    "{run} --group_pattern='(x)_'": "does not match",
    "{run} -c=odd.yaml": "did you mean --model.base_lr?",
    "{run} --accelerator=gpuu": "accelerator gpuu",
    "{run} --precision=31": "precision 31",
    "": "--weights must be given",
}


def test_mistakes_are_one_sentence(
    weights: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(Path(weights, "checkpoints/last.ckpt"), "lone.ckpt")
    shutil.copytree(folder / "flat", "single/flat")
    Path("several.csv").write_text("path,label\nflat/00.png,a;b\nflat/01.png,a\n")
    Path("odd.yaml").write_text("model: {base_lrr: 1.0}\n")
    for options, words in MISTAKES.items():
        line = f"compare --accelerator=cpu {options.format(run=f'--weights={weights}')}"
        assert words in refused(capsys, line, alone=True), options
    assert not Path("runs/compare").exists()


def test_a_folder_is_not_gone_on_with_under_other_options(weights: str, folder: Path) -> None:
    few = {**FEW, "budgets": [1], "seeds": 1}
    compare(weights, **few, **ON_CPU, out="here")
    with pytest.raises(ValueError, match=r"finetune.min_steps 3, not 4"):
        compare(weights, **{**few, "min_steps": 4}, **ON_CPU, out="here")
    checkpoint = Path(weights, "checkpoints/last.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["encoder.model.blocks.0.attn.qkv.weight"].add_(0.1)
    torch.save(content, checkpoint)  # the run went on
    with pytest.raises(ValueError, match="tensors"):
        compare(weights, **few, **ON_CPU, out="here")
    run = Path(weights, "config.yaml")
    config = yaml.safe_load(run.read_text())
    run.write_text(yaml.safe_dump({**config, "model": {"label_smoothing": 0.1}}))
    with pytest.raises(ValueError, match="trained with the labels"):
        compare(weights, **FEW, **ON_CPU)
