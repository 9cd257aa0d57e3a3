"""What pip installs: the wheel has all that it uses, and needs what it says and nothing else."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import simmim
from simmim.cli import main

ROOT = Path(__file__).parents[1]
BIN = "Scripts" if os.name == "nt" else "bin"
IMPORT_ALL = """
import importlib, pkgutil, sys
import simmim
from simmim.command_line.configuration import config_folder, packaged_configs

for module in pkgutil.walk_packages(simmim.__path__, "simmim."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
files = {str(getattr(module, "__file__", None)) for module in list(sys.modules.values())}
print(*sorted(file for file in files if file.startswith(sys.argv[1])), sep="\\n")
assert str(config_folder()).startswith(sys.prefix), config_folder()
assert len(packaged_configs()) > 20
"""
README_SNIPPET = """
import torch
from simmim import SimMIM, mask_images, mse_loss

images = torch.randn(1, 3, 64, 64)
model = SimMIM("vit_tiny_patch16_224", img_size=64)
masked_images, masks = mask_images(images)
assert mse_loss(model(masked_images), images, masks) > 0
"""


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; without what tells Python where the source tree is."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    kept = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**kept, "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-4000:]}"
    return done.stdout


def build_wheel(source: Path, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--no-index", "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


# One version -------------------------------------------------------------------------------------


def test_the_version_is_written_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", simmim.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert (ROOT / project["tool"]["hatch"]["version"]["path"]).samefile(simmim.__file__)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{simmim.__version__}\n"


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == simmim.__version__
    assert len(set(headings)) == len(headings)


# What is in it -----------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_the_wheel_has_every_module_and_every_config(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        (about,) = (n for n in file.namelist() if n.endswith("METADATA"))
        (scripts,) = (n for n in file.namelist() if n.endswith("entry_points.txt"))
        assert email.message_from_bytes(file.read(about))["Version"] == simmim.__version__
        assert "simmim = simmim.cli:main" in file.read(scripts).decode()
    source = {path for path in (ROOT / "src").rglob("*") if path.suffix == ".py"}
    expected = {path.relative_to(ROOT / "src").as_posix() for path in source}
    configs = (path for path in (ROOT / "configs").rglob("*") if path.is_file())
    expected |= {f"simmim/{path.relative_to(ROOT).as_posix()}" for path in configs}
    assert names == expected | {"simmim/py.typed"}


@pytest.mark.exhaustive
def test_the_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist"]
    run(*command, "--directory", tmp_path, cwd=ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for path in ("configs/pretrain/digits.yaml", "tests/test_wheel.py", "constraints.txt"):
        assert path in names
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "Makefile"} <= names
    assert not [name for name in names if name.startswith((".venv", "runs/", "data/", "dist/"))]
    again = build_wheel(archive, tmp_path)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert set(one.namelist()) == set(other.namelist())
        for name in one.namelist():
            assert one.read(name) == other.read(name), name


# In an environment of its own --------------------------------------------------------------------


def needed(requirements: list[str]) -> set[str]:
    """The distributions that pip would install for these requirements, at any remove."""
    found: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (requirement.name, wanted) not in found:
                found.add((requirement.name, wanted))
                theirs = metadata.requires(requirement.name) or []
                todo += [(Requirement(text), wanted) for text in theirs]
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it declares, and nothing that developers have.

    pip would unpack gigabytes for minutes. The packages are here already: those that the wheel's
    metadata asks for, and theirs, are linked into a new environment, and `pip check` says whether
    each requirement is met.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / BIN / "python"
    where = run(python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd=folder)
    site = Path(where.strip())
    with zipfile.ZipFile(wheel) as file:
        (about,) = (n for n in file.namelist() if n.endswith("METADATA"))
        requirements = email.message_from_bytes(file.read(about)).get_all("Requires-Dist") or []
    for name in needed(requirements):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():  # several distributions share a namespace
                (site / top).symlink_to(str(distribution.locate_file(top)))
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    assert "No broken requirements" in run(*pip, "check", cwd=folder)
    return folder / BIN


@pytest.mark.exhaustive
@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_the_wheel_works_with_what_it_declares(clean: Path, tmp_path: Path) -> None:
    assert run(clean / "simmim", "--version", cwd=tmp_path).strip() == simmim.__version__
    assert run(clean / "python", "-c", IMPORT_ALL, str(ROOT / "src"), cwd=tmp_path).strip() == ""
    run(clean / "python", "-c", README_SNIPPET, cwd=tmp_path)

    fit = [clean / "simmim", "pretrain", "fit"]
    printed = yaml.safe_load(run(*fit, "-c", "swin_base_100ep", "--print_config", cwd=tmp_path))
    recipe = yaml.safe_load((ROOT / "configs/pretrain/swin_base_100ep.yaml").read_text())
    assert printed["model"]["encoder"] == recipe["model"]["encoder"]
    assert printed["data"]["batch_size"] == recipe["data"]["batch_size"]

    run(*fit, "--trainer.max_epochs", "1", "--data.num_workers", "0", cwd=tmp_path)
    folder = tmp_path / "runs/digits/version_0"
    assert (folder / "checkpoints/last.ckpt").is_file()
    assert (folder / "report.html").is_file()
    out = run(clean / "simmim", "export", "--weights", folder, "--out", "encoder", cwd=tmp_path)
    assert "wrote encoder" in out


@pytest.mark.exhaustive
@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize(
    ("options", "extra"),
    [
        (["pack", "--root", ".", "--out", "packed"], "pack"),
        (["export", "--weights", "x", "--out", "y", "--format", "onnx"], "onnx"),
    ],
)
def test_an_extra_that_is_missing_is_named(
    clean: Path, tmp_path: Path, options: list[str], extra: str
) -> None:
    done = subprocess.run(
        [clean / "simmim", *options], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert f"[{extra}]" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
