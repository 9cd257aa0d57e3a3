"""What `--help` says is short, true and there at once."""

import os
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from simmim.cli import COMMANDS, SUBCOMMANDS
from simmim.command_line.configuration import EXPERIMENTS, find_config, packaged_configs
from simmim.command_line.help.function import GROUPS, SOURCES, read_options
from simmim.command_line.help.task import PAGE, rows_of
from simmim.command_line.lightning import TaskCLI
from simmim.commands import benchmark
from simmim.commands import functions as commands
from support.commands import refused, simmim

Out = pytest.CaptureFixture[str]
TASK_PAGES = [f"{task} {subcommand}" for task in EXPERIMENTS for subcommand in SUBCOMMANDS]
PAGES = ["", *COMMANDS, *TASK_PAGES, *(name for name in SOURCES if " " in name)]


def page(command: str, out: Out, *more: str) -> str:
    simmim(command, "--help", *more)
    return out.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("command", PAGES)
def test_a_page_fits_the_terminal_and_is_short(
    command: str, columns: int, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    said = page(command, capsys).splitlines()
    assert said[0].startswith(f"usage: simmim {command}".rstrip())
    assert max(map(len, said)) <= min(columns, 100)
    assert not any(line != line.rstrip() for line in said)
    assert len(said) < (75 if columns == 200 else 150), len(said)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from simmim.cli import main; "
        "status = [main([*line.split(), '--help']) for line in sys.argv[1:]]; "
        "print(status, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *PAGES], capture_output=True, text=True)
    assert done.stderr.strip() == f"{[0] * len(PAGES)} False"


@pytest.fixture(scope="module")
def parsers() -> Callable[[str, str], Any]:
    """The parser of a task's subcommand, as jsonargparse makes it."""
    made: dict[tuple[str, str], Any] = {}

    class Stop(Exception):
        pass

    def parser(task: str, subcommand: str) -> Any:
        def keep(self: TaskCLI, *_: Any) -> None:
            made[task, subcommand] = self.options
            raise Stop

        if (task, subcommand) not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(TaskCLI, "parse_arguments", keep)
                with pytest.raises(Stop):
                    COMMANDS[task].load()([subcommand])
        return made[task, subcommand]

    return parser


@pytest.mark.parametrize("command", TASK_PAGES)
def test_the_page_of_a_task_is_true(command: str, parsers: Callable[[str, str], Any]) -> None:
    """Each option exists, and its default is what it says where no config overrules it."""
    task, subcommand = command.split()
    actions = {action.dest: action for action in parsers(task, subcommand)._actions}
    rows = [row for group in PAGE.values() for row in rows_of(group, task, subcommand)]
    assert len(rows) <= 36
    assert len({row.option for row in rows}) == len(rows)
    configs = [
        yaml.safe_load(path.read_text())
        for name, path in packaged_configs().items()
        if name.startswith(f"{task}/")
    ]
    assert rows.pop().option == "print_config"  # jsonargparse's own
    for row in rows:
        default = actions[row.option].default
        group, _, key = row.option.partition(".")
        if row.default and default is not None and row.option != "config":
            assert yaml.safe_load(row.default) == default, row
        elif isinstance(default, bool | int | float | str):
            assert all(key in config[group] for config in configs), row


def test_the_page_shows_what_the_configs_say(capsys: Out) -> None:
    said = page("pretrain fit", capsys, "-c", "swin_base_100ep", "-c", "bf16")
    recipe = yaml.safe_load(find_config("swin_base_100ep", "pretrain").read_text())
    assert "in the config `swin_base_100ep`" in " ".join(said.split())
    assert f"any timm image model [{recipe['model']['encoder']}]" in said
    assert "16-mixed, ... [bf16-mixed]" in said
    assert "[digits]" not in said
    assert "[true]" in page("classify fit", capsys, "--model.frozen", "true")  # linear_probe's
    said = refused(capsys, "pretrain fit --help -c swinbase", status=2)
    assert "did you mean 'swin_base_" in said


def test_help_can_come_first(capsys: Out) -> None:
    simmim("help pretrain fit")
    assert capsys.readouterr().out == page("pretrain fit", capsys)


@pytest.mark.parametrize("command", SOURCES)
def test_the_page_of_a_function_is_that_of_its_parser(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same options, defaults and texts as jsonargparse finds when it imports the function."""
    called = {}
    monkeypatch.setattr(commands, "call", lambda name, function, _: called.update({name: function}))
    name, *which = command.split()
    getattr(commands, name)(which)
    parser = ArgumentParser()
    parser.add_function_arguments(called[command])
    expected = {a.dest: a for a in parser._actions if a.dest and "help" not in a.dest}
    shown = {option.name: option for option in read_options(command)[1]}
    assert set(shown) == set(expected)
    assert len(" ".join(GROUPS[command].values()).split()) == len(shown)
    for name, option in shown.items():
        assert option.text == " ".join(expected[name].help.split())
        assert (option.default is None) == expected[name].required
        if option.default is not None:
            assert eval(option.default) == expected[name].default


def test_every_measure_has_its_page() -> None:
    names = {f"benchmark {measure}".strip() for measure in benchmark.MEASURES}
    assert names == {name for name in SOURCES if name.startswith("benchmark")}
    assert set(SOURCES) == set(GROUPS)
    plain = {name for name in COMMANDS if name not in EXPERIMENTS}
    assert {name.split()[0] for name in SOURCES} == plain
    assert all(list(signature(m).parameters) for m in benchmark.MEASURES.values())


@pytest.mark.parametrize(
    ("about", "has", "lacks"),
    [
        ("model", ["--model.mask_ratio", "--model.head_kwargs"], ["--data.root", "--trainer."]),
        ("mask_ratio", ["--model.mask_ratio", "the paper's section 4.1"], ["--model.encoder"]),
        ("model.mask_ratio", ["--model.mask_ratio"], ["--model.mask_fill"]),
        ("trainer", ["--trainer.benchmark"], ["--model.", ":param"]),
        ("all", ["--trainer.benchmark", "--data.root", "--model.encoder", "--ckpt_path"], []),
    ],
)
def test_a_word_behind_help_explains_in_full(
    about: str, has: list[str], lacks: list[str], capsys: Out
) -> None:
    said = page("pretrain fit", capsys, about)
    assert all(words in said for words in has)
    assert not any(words in said for words in lacks)
    simmim(f"pretrain fit --help={about}")
    assert capsys.readouterr().out == said


def test_a_word_that_no_option_has_is_a_mistake(capsys: Out) -> None:
    said = refused(capsys, "pretrain fit --help maks_ratio", status=2)
    assert "did you mean mask_ratio?" in said


def test_what_nobody_reads_to_its_end_is_no_error() -> None:
    """`simmim pretrain fit --help | head -1`."""
    command = [sys.executable, "-m", "simmim", "pretrain", "fit", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141
