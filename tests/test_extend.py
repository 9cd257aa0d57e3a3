"""Parts of a user's own, from a file in the working folder: no file of ours is changed."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import mutation_guard

import simmim
from simmim import Classifier, SimMIM, load_encoder
from simmim.base.files import read_config
from simmim.cli import main
from simmim.parts.names import _registered
from simmim.target import Target
from simmim.testing import (
    check_encoder,
    check_head,
    check_loss,
    check_masking,
    check_target,
)

PARTS = """
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import simmim
from simmim.head import LinearHead
from simmim.target import Target


@simmim.register("masking")
def checker(keys, grid, counts, size=1):
    y, x = torch.meshgrid(*(torch.arange(n, device=keys.device) for n in grid), indexing="ij")
    return (y // size + x // size + keys[:, None, None]) % 2 == 0


class Gray(Target):
    def __init__(self, in_chans, img_size, mean, std):
        super().__init__(in_chans, img_size, mean, std)
        self.out_chans = 1

    def forward(self, images):
        return images.float().mean(1, keepdim=True)


class Deep(LinearHead):
    def forward(self, features):
        return super().forward(torch.tanh(features))


def fourth(prediction, target):
    return (prediction.float() - target.float()) ** 4


@simmim.register("encoder", "patches")
class Patches(nn.Module):
    def __init__(self, in_chans=3, width=32):
        super().__init__()
        self.num_features = width
        self.stem = nn.Conv2d(in_chans, width, 8, stride=8)
        self.mix = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU())

    def forward_features(self, images):
        return self.mix(self.stem(images))


class Say(L.Callback):
    def __init__(self, word: str = "hello"):
        self.word = word

    def on_train_start(self, trainer, model):
        print("callback:", self.word)


@simmim.register("data", "noise")
class Noise(L.LightningDataModule):
    classes = ["dark", "bright"]

    def __init__(self, batch_size: int = 4, images: int = 8, img_size: int = 32):
        super().__init__()
        self.batch_size, self.images, self.img_size = batch_size, images, img_size

    def train_dataloader(self):
        labels = torch.arange(self.images) % 2
        pixels = torch.randn(self.images, 3, self.img_size, self.img_size)
        images = pixels + labels[:, None, None, None]
        return DataLoader(TensorDataset(images, labels), self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""
OWN = """
model:
  encoder: my_parts.Patches
  encoder_kwargs: {width: 16}
  img_size: 32
  mask_patch_size: 8
  masking: my_parts.checker
  masking_kwargs: {size: 2}
  target: my_parts.Gray
  head: my_parts.Deep
  loss: my_parts.fourth
data: {root: images, batch_size: 4, num_workers: 0}
trainer:
  callbacks: [{class_path: my_parts.Say, init_args: {word: ahoy}}]
"""
QUIET = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""
SILENT = f"{QUIET}probe: &none {{every_n_epochs: 0}}\nreconstructions: *none\nworst: *none\n"
TINY = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What a command imports and registers is there for that test alone."""
    path, tables = [*sys.path], {kind: {**table} for kind, table in _registered.items()}
    yield
    sys.path[:] = path
    for kind, table in tables.items():
        _registered[kind].clear()
        _registered[kind].update(table)
    sys.modules.pop("my_parts", None)


@pytest.fixture
def place(
    tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working folder with images, and a user's own file and config."""
    for name in ("a", "b"):
        make_images(tmp_path / "images" / name, 6)
    files = {"my_parts.py": PARTS, "own.yaml": OWN, "quiet.yaml": QUIET, "silent.yaml": SILENT}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(*options: str) -> int:
    return main(["pretrain", "fit", "-c", *options, "-c", "silent.yaml"])


def forget_parts() -> None:
    """As in a new process."""
    sys.modules.pop("my_parts", None)
    for table in _registered.values():
        table.clear()


# On the command line -----------------------------------------------------------------------------


@pytest.mark.slow
def test_each_kind_is_named_by_its_import_path_and_opens_with_trust_alone(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("own.yaml") == 0
    assert "callback: ahoy" in capsys.readouterr().out
    run = "runs/own/version_0"
    model = SimMIM.load_from_checkpoint(f"{run}/checkpoints/last.ckpt", trust=True)
    kinds = (model.encoder.model, model.target, model.head, model.masking, model.error)
    names = [getattr(kind, "__name__", type(kind).__name__) for kind in kinds]
    assert names == ["Patches", "Gray", "Deep", "checker", "fourth"]
    keys = torch.arange(2)
    assert model.masking(keys, (4, 4), keys, size=2)[1].int().tolist()[0] == [0, 0, 1, 1]

    data = ["--data.root=images", "--data.batch_size=4", "--data.num_workers=0", "-c", "quiet.yaml"]
    plain = ["--model.layer_decay=null", "--model.drop_path_rate=0"]
    commands = {
        "validate": ["pretrain", "validate", "--ckpt_path", run, *data],
        "predict": ["pretrain", "predict", "--ckpt_path", run, *data],
        "go on": ["pretrain", "fit", "--ckpt_path", run, "--trainer.max_epochs=2"],
        "classify": ["classify", "fit", "-c", "finetune_small", "--model.weights", run, *data],
        "export": ["export", "--weights", run, "--out", "e", "--format", "torch"],
        "embed": ["embed", "--weights", run, "--root", "images", "--out", "f.npz", "--map", "none"],
    }
    commands["classify"] += plain
    commands["export"] += ["--output", "features"]
    for name, command in commands.items():
        forget_parts()
        assert main(command) == 1, name
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "code from outside simmim" in said, name
        assert "--trust" in said, name
        assert "my_parts" not in sys.modules, name
        assert main([*command, "--trust"]) == 0, name
    forget_parts()
    assert fit("own.yaml", "--ckpt_path=last", "--trainer.max_epochs=3") == 0  # named once more


@pytest.mark.exhaustive
def test_compare_takes_an_own_encoder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model.img_size=32", "--model.mask_patch_size=8", "--model.drop_path_rate=0"]
    own = ["--model.encoder=my_parts.Patches", "--data.root=images", "--data.batch_size=4"]
    assert fit("image_folder", *model, *own, "--data.num_workers=0") == 0
    (place / "plain.yaml").write_text("model: {frozen: false, warmup_epochs: 1}\n")
    length = ["--seeds=1", "--epochs=1", "--min_steps=1", "--budgets=[1.0]", "--batch_size=4"]
    for recipe in (["--config", "plain.yaml"], ["--mode", "probe"]):
        command = ["compare", "--weights", "runs/image_folder/version_0", *recipe, *length]
        assert main(command) == 1
        assert "--trust" in capsys.readouterr().err
        assert main([*command, "--trust"]) == 0


@pytest.mark.exhaustive
def test_the_script_finds_modules_of_the_working_folder_behind_those_that_are_installed(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = tmp_path_factory.mktemp("bin") / "run.py"  # as the console script: its folder is first
    script.write_text("import sys\nfrom simmim.cli import main\nsys.exit(main())\n")
    for installed in ("yaml", "timm", "PIL"):  # `python -m` would take these
        (place / f"{installed}.py").write_text("raise SystemExit('caught')\n")
    command = [sys.executable, str(script), "pretrain", "fit", "-c", "own.yaml", "quiet.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "callback: ahoy" in done.stdout


@pytest.mark.exhaustive
def test_a_folder_where_nothing_is_named_is_not_searched(place: Path) -> None:
    before = [*sys.path]
    (place / "missing.py").write_text("raise SystemExit('caught')\n")
    assert main(["pretrain", "fit", "-c", "quiet.yaml", "--data.root=nowhere"]) == 1
    assert sys.path == before


@pytest.mark.slow
def test_parts_are_registered_by_a_module_that_the_config_imports(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = "imports: my_parts\ndata_class: noise\nmodel: {masking: checker, encoder: patches, "
    (place / "short.yaml").write_text(f"{config} img_size: 32, mask_patch_size: 8}}\n")
    assert fit("short.yaml", "--data.images=6", "--data.batch_size=2") == 0
    run = Path("runs/short/version_0")
    kept = read_config(run / "config.yaml")
    assert (kept["imports"], kept["data_class"]) == (["my_parts"], "noise")
    assert kept["data"] == {"batch_size": 2, "images": 6}  # img_size follows the model
    assert kept["model"]["masking"] == "checker"
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3

    forget_parts()
    assert main(["pretrain", "validate", "--ckpt_path", str(run)]) == 1
    assert f"{run}/config.yaml names my_parts, code" in capsys.readouterr().err.replace("\\", "/")
    assert main(["pretrain", "validate", "--ckpt_path", str(run), "--trust"]) == 0
    forget_parts()
    with pytest.raises(ValueError, match="'patches' is not a model of timm"):
        load_encoder(run)
    embed = ["embed", "--weights", str(run), "--root", "images", "--out", "f.npz", "--map", "none"]
    assert main([*embed, "--imports", "my_parts"]) == 0


@pytest.mark.slow
def test_an_own_data_module_trains_a_classifier(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data_class=my_parts.Noise", "--data.images=12", "--model.img_size=32"]
    config = ["-c", "finetune_small", "-c", "quiet.yaml"]
    vit = ["--model.encoder=vit_tiny_patch16_224", f"--model.encoder_kwargs={TINY}"]
    command = ["classify", "fit", *config, *data, *vit, "--model.drop_path_rate=0"]
    assert main(command) == 0
    run = "runs/finetune_small/version_0"
    kept = torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)
    assert kept["classes"] == ["dark", "bright"]
    assert main(["classify", "validate", "--ckpt_path", run, "--trust"]) == 0
    assert "val/top1" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_slurm_goes_on_with_what_the_same_command_names(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert fit("own.yaml", "--trainer.plugins=null") == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    forget_parts()
    assert fit("own.yaml", "--trainer.plugins=null") == 0
    assert [path.name for path in Path("runs/own").iterdir()] == ["version_0"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--model.masking=my_part.checker", "masking 'my_part.checker' cannot be imported: No mod"),
        ("--model.masking=my_parts.chequer", "module 'my_parts' has no attribute 'chequer'"),
        ("--model.masking=chequer --imports my_parts", "did you mean 'checker'"),
        ("--imports mine", "imports: 'mine' cannot be imported"),
        ("--data_class=my_parts.Gray", "data_class 'my_parts.Gray' is no LightningDataModule"),
        ("--data_class=my_parts.Noise --data.image=3", "--data.image: did you mean --data.images"),
        ("--model.encoder=my_parts.Gray", "encoder 'my_parts.Gray' is Gray(in_chans, img_size"),
        ("--trainer.callbacks+=my_parts.Sy", "--trainer.callbacks: module my_parts has no Sy"),
    ],
)
def test_what_cannot_be_found_is_one_sentence(
    place: Path, options: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", "fit", "-c", "quiet.yaml", *options.split()]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert sentence in said[-1]
    assert not any("Traceback" in line for line in said)


# In Python ---------------------------------------------------------------------------------------


def tiny(**options: Any) -> SimMIM:
    given: dict[str, Any] = {"encoder": "vit_tiny_patch16_224", "encoder_kwargs": TINY}
    return SimMIM(**{**given, "img_size": 32, "mask_patch_size": 8, "trust": True, **options})


def two_arguments(keys: Tensor, grid: tuple[int, int]) -> Tensor:
    return torch.ones(len(keys), *grid, dtype=torch.bool)


def whole_numbers(keys: Tensor, grid: tuple[int, int], counts: Tensor) -> Tensor:
    return torch.ones(len(keys), *grid, dtype=torch.int64)


def one_mask(keys: Tensor, grid: tuple[int, int], counts: Tensor, share: float = 1) -> Tensor:
    return torch.ones(grid, dtype=torch.bool)


def one_number(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs().mean()


class Flat(Target):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Coarse(nn.Module):
    def __init__(self, in_features: int, out_chans: int, upsample: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_features, out_chans, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)  # not enlarged


class Bare(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"masking": "two_arguments"}, r"two_arguments\(keys.*cannot be called as simmim calls a"),
        ({"masking": "whole_numbers"}, r"gives torch.int64 \(1, 4, 4\): return torch.bool"),
        ({"masking": "one_mask"}, r"gives torch.bool \(4, 4\): return torch.bool \(1, 4, 4\)"),
        (
            {"masking": "one_mask", "masking_kwargs": {"shar": 2}},
            "masking_kwargs: .* has no option 'shar', it has share",
        ),
        ({"loss": "one_number"}, r"loss .* gives \(B\): return \(B, C, 32, 32\)"),
        ({"target": "Flat"}, r"target .* gives \(B, 3072\): return \(B, C, 32, 32\)"),
        ({"target": "Bare"}, r"target .* is Bare.*cannot be called|no option"),
        ({"head": "Coarse"}, r"head .* gives \(B, 3, 4, 4\): return \(B, 3, 32, 32\)"),
        ({"encoder": "Bare", "encoder_kwargs": None}, "has no forward_features: define"),
        ({"encoder": "Bare", "encoder_kwargs": {"width": 1}}, "has no option 'width', it has none"),
        ({"encoder": "one_number"}, "encoder_kwargs: .* has no option 'patch_size'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_data(
    options: dict[str, Any], sentence: str
) -> None:
    named = {k: f"test_extend.{v}" if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=sentence) as error:
        tiny(**named)
    assert "\n" not in str(error.value)


def test_a_module_without_options_is_known_after_torch_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nn.Module, "__init__", nn.Module.__init__)  # to have it back
    mutation_guard.install_generation_tagging_init()  # what the first compilation does
    with pytest.raises(ValueError, match="has no option 'width', it has none"):
        tiny(encoder="test_extend.Bare", encoder_kwargs={"width": 1})


def test_a_file_does_not_trust_itself(tmp_path: Path) -> None:
    model = tiny()
    hparams = {**model.hparams, "masking": "test_extend.one_mask", "trust": True}
    file = {"state_dict": model.state_dict(), "hyper_parameters": hparams}
    torch.save({**file, "pytorch-lightning_version": "2.6.6"}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="trust=True"):
        SimMIM.load_from_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"return torch\.bool"):  # it is imported, and tried
        SimMIM.load_from_checkpoint(tmp_path / "last.ckpt", trust=True)
    hparams |= {"masking": "random", "encoder": "test_extend.Own", "encoder_kwargs": None}
    torch.save({**file, "pytorch-lightning_version": "2.6.6"}, tmp_path / "last.ckpt")
    for opens in (
        load_encoder,
        lambda path: tiny(weights=str(path), trust=False),
        lambda path: Classifier(weights=str(path)),
    ):
        with pytest.raises(ValueError, match=r"test_extend\.Own' is code from outside simmim"):
            opens(tmp_path / "last.ckpt")


def test_a_registered_name_needs_no_trust_and_takes_no_name_of_ours() -> None:
    simmim.register("loss", "whole")(one_number)
    simmim.register("loss", "whole")(one_number)  # a cell that is run again
    with pytest.raises(ValueError, match=r"loss 'whole' gives \(B\)"):
        tiny(loss="whole", trust=False)
    with pytest.raises(ValueError, match=r"is test_extend\.one_number already"):
        simmim.register("loss", "whole")(two_arguments)
    simmim.register("masking", "random")(two_arguments)
    with pytest.raises(ValueError, match=r"masking 'random' is simmim's own: register test_extend"):
        tiny()
    with pytest.raises(ValueError, match="parts of kind 'mask' are not known: use encoder, mask"):
        simmim.register("mask")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"masking 'a\.b' is no name"):
        simmim.register("masking", "a.b")(two_arguments)


def test_a_package_registers_its_parts_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = SimpleNamespace(load=lambda: simmim.register("loss", "packaged")(one_number))
    simmim.parts.names._load_entry_points.cache_clear()
    monkeypatch.setattr("simmim.parts.names.entry_points", lambda group: [point])
    with pytest.raises(ValueError, match=r"loss 'packaged' gives \(B\)"):
        tiny(loss="packaged", trust=False)
    simmim.parts.names._load_entry_points.cache_clear()


# The checks for users ----------------------------------------------------------------------------


def test_the_checks_pass_what_is_right(place: Path) -> None:
    sys.path.append(str(place))
    import my_parts  # type: ignore[import-not-found]

    check_masking(my_parts.checker, tolerance=0.52)
    check_target(my_parts.Gray)
    check_head(my_parts.Deep)
    check_loss(my_parts.fourth)
    check_encoder("my_parts.Patches", img_size=32, mask_patch_size=8)
    check_encoder("patches", img_size=32, mask_patch_size=8, width=16)


def draws(keys: Tensor, grid: tuple[int, int], counts: Tensor) -> Tensor:
    return torch.rand(len(keys), *grid) < 0.5


def by_place(keys: Tensor, grid: tuple[int, int], counts: Tensor) -> Tensor:
    cells = torch.arange(grid[0] * grid[1]) + torch.arange(len(keys))[:, None]
    return (cells % (grid[0] * grid[1]) < counts[:, None]).unflatten(1, grid)


class Chance(Target):
    def forward(self, images: Tensor) -> Tensor:
        return images.float() + torch.rand_like(images)


class Mixed(Target):
    def forward(self, images: Tensor) -> Tensor:
        return images.float() - images.float().mean(0)


class Liar(Coarse):
    is_pointwise = True

    def __init__(self, in_features: int, out_chans: int, upsample: int) -> None:
        super().__init__(in_features, out_chans, upsample)
        self.proj = nn.Conv2d(in_features, out_chans, 3, padding=1)


class Idle(Coarse):
    def __init__(self, in_features: int, out_chans: int, upsample: int) -> None:
        super().__init__(in_features, out_chans, upsample)
        self.unused = nn.Linear(2, 2)


class Own(nn.Module):
    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, stride=8)
        self.unused = nn.Linear(2, 2)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.stem(images) + images.mean()  # past the stem


def smooth(prediction: Tensor, target: Tensor) -> Tensor:
    return nn.functional.avg_pool2d((prediction - target).abs(), 3, 1, 1).float()


@pytest.mark.parametrize(
    ("check", "part", "options", "sentence"),
    [
        (check_masking, draws, {"tolerance": 1}, "draws from torch's global generator"),
        (check_masking, by_place, {}, "another one in another batch"),
        (check_masking, two_arguments, {}, "two_arguments"),
        (check_target, Chance, {}, "another one the second time"),
        (check_target, Mixed, {}, "depends on the others in its batch"),
        (check_head, Liar, {"upsample": 1}, "says is_pointwise"),
        (check_head, Idle, {"upsample": 1}, "no gradient reaches unused"),
        (check_head, Coarse, {}, r"gives \(B, 5, 4, 6\): return \(B, 5, 16, 24\)"),
        (check_loss, smooth, {}, "depends on other places"),
        (check_loss, one_number, {}, r"gives \(B\)"),
    ],
)
def test_the_checks_find_what_is_wrong(
    check: Callable[..., None], part: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises((AssertionError, TypeError), match=sentence):
        check(part, **options)


def test_an_encoder_that_lets_hidden_pixels_through_has_them_filled() -> None:
    check_encoder("test_extend.Own", img_size=32, mask_patch_size=8)  # its unused part is frozen
