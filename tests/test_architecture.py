"""The house: who imports whom, as docs/architecture.md says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import simmim

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "simmim"
FACE = {*simmim.__all__, "__version__"}  # what `from simmim import` gives
FILES = sorted(SOURCE.rglob("*.py"))


def allowed() -> dict[str, set[str]]:
    """The table: room -> rooms that it may import."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    lines = text.split("| room | may import |")[1].splitlines()[2:]
    table: dict[str, set[str]] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        rooms, names = (part.strip() for part in line.strip("|").split("|"))
        for room in rooms.split(", "):
            table[room] = set(names.split(", ")) if names else set()
    every = set(table) | {"cli"}
    return {room: every - {"cli"} if "all but cli" in may else may for room, may in table.items()}


def imports(path: Path) -> list[tuple[str, str, bool]]:
    """What a file imports of the package: (module, name, whether within a function)."""
    tree = ast.parse(path.read_text())
    at_top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "simmim":
            for name in node.names:
                found.append((str(node.module), name.name, id(node) not in at_top))
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "simmim":
                    found.append((name.name, "", id(node) not in at_top))
    return found


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def room_imported(module: str, name: str) -> str:
    below = module.split(".")[1:]
    return below[0] if below else name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_what_the_table_allows(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):  # the package's own face
        return
    may = allowed()[room] | {room}
    for module, name, _ in imports(path):
        imported = room_imported(module, name)
        assert imported in may | FACE | {""}, f"{room} imports {module} {name}"


def test_no_private_name_of_another_file_is_imported() -> None:
    private = [
        f"{path.relative_to(SOURCE)}: {module}.{name}"
        for path in FILES
        for module, name, _ in imports(path)
        if name.startswith("_") and not name.startswith("__")
    ]
    assert not private


def test_every_room_has_a_face() -> None:
    for face in SOURCE.glob("*/__init__.py"):
        lines = (ast.get_docstring(ast.parse(face.read_text())) or "").splitlines()
        assert len(lines) >= 3, face
        assert face.parent.name in allowed()


def test_method_files_stay_small_enough_to_read() -> None:
    story = "masking encoder head target loss pretrain recipe optim classify segment detect cli"
    lines = {n: len((SOURCE / f"{n}.py").read_text().splitlines()) for n in story.split()}
    assert max(lines.values()) < 500, lines


def test_importing_simmim_does_not_import_torch() -> None:
    code = "import sys, simmim, simmim.cli; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
