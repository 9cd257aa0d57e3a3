"""The notebooks run, show pictures, and are kept without what they showed."""

import ast
import base64
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# What stands in place of a notebook's own settings, where its `parameters` cell has such a name.
SMALL = {
    "epochs": 1,
    "more_epochs": 1,
    "num_masks": 4,
    "budgets": [2],
    "folder": "my images",  # two classes of 40, which the test makes
    "batch_size": 16,
}


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def settings_cell(notebook: Any) -> Any:
    """The cell that is tagged as papermill wants it."""
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    return cell


def names_set_in(cell: Any) -> set[str]:
    found = set()
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign), "settings are plain values, one a line"
        found |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return found


def made_small(notebook: Any) -> Any:
    """Set small settings in a cell behind the notebook's own, and check each `!` command."""
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if "parameters" in cell.metadata.get("tags", []):
            lines = [f"{name} = {SMALL[name]!r}" for name in SMALL if name in names_set_in(cell)]
            cells.append(nbformat.v4.new_code_cell("\n".join(lines)))
        elif cell.cell_type == "code" and re.search(r"^!", cell.source, re.MULTILINE):
            cells.append(nbformat.v4.new_code_cell("assert _exit_code == 0, _exit_code"))
    notebook.cells = cells
    return notebook


def outputs_of(notebook: Any) -> list[Any]:
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def test_there_are_notebooks() -> None:
    assert [path.name[:3] for path in NOTEBOOKS[:3]] == ["01_", "02_", "03_"]


@pytest.mark.exhaustive
@each
def test_it_runs_and_shows_pictures(
    path: Path, tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for name in ("a", "b"):
        make_images(tmp_path / "work" / str(SMALL["folder"]) / name, 40)
    notebook = made_small(read(path))
    place = {"metadata": {"path": str(tmp_path / "work")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    outputs = outputs_of(notebook)
    said = "".join(out.text for out in outputs if out.output_type == "stream")
    assert not re.search(r"\w+Warning:|Traceback", said), said
    pictures = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    assert pictures
    for picture in pictures:
        pixels = np.asarray(Image.open(BytesIO(base64.b64decode(picture))).convert("L"))
        assert np.ptp(pixels) > 50
        assert pixels.std() > 5


@each
def test_it_is_kept_without_what_it_showed(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    how = f"jupyter nbconvert --clear-output --inplace {path}"
    assert not outputs_of(notebook), how
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None for cell in code), how
    assert notebook.metadata.keys() <= {"kernelspec", "language_info"}, "state of widgets"
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.kernelspec.display_name.startswith("Python 3")


@each
def test_it_says_what_it_is_and_begins_with_its_settings(path: Path) -> None:
    notebook = read(path)
    first, *_ = notebook.cells
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0] is settings_cell(notebook)
    assert names_set_in(code[0])
