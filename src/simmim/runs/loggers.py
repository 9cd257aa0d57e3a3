"""Where numbers go: a CSV file that goes on with its run, and a board that is never in the way."""

import configparser
import csv
import math
import netrc
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from urllib.parse import urlsplit

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from platformdirs import user_cache_path
from torch import Tensor

from simmim.base.errors import one_line
from simmim.base.files import written_whole

PROJECT = "simmim"  # on the board, where WANDB_PROJECT says no other
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # W&B's own, by its old and its new name
RUN_ID = "run_id.txt"


def run_loggers(
    folder: Path,
    given: Any,
    subcommand: str,
    before_step: int | None,
    options: Mapping[str, Any] | None = None,
) -> list[Logger]:
    """Choose a run's loggers: a CSV file always; beside it what the user names, or W&B for a fit.

    Args:
        folder: The run's folder.
        given: The trainer's option: None or True (ours), False (none), or loggers of the user's.
        subcommand: fit writes metrics.csv, validate and test their own file.
        before_step: The step at which the run goes on; see `MetricsFile`.
        options: Of the board, as `Board.options` gives them.
    """
    if given is False:
        return []
    training = subcommand == "fit"
    filename = "metrics.csv" if training else f"{subcommand}.csv"
    others = given if isinstance(given, list) else [given]
    if given is None or given is True:
        others = [board(folder, **(options or {}))] if training else []
    return [MetricsFile(folder, filename, before_step), *(x for x in others if x is not None)]


class MetricsFile(CSVLogger):
    """Metrics as rows of a CSV file, which a resumed run continues.

    Lightning's own deletes the rows that it finds.

    Args:
        folder: The run's folder.
        filename: The file in it.
        before_step: Rows of this optimiser step and later ones are dropped when the file is
            opened: the run goes on from there. None drops nothing.
    """

    def __init__(
        self, folder: Path, filename: str = "metrics.csv", before_step: int | None = None
    ) -> None:
        super().__init__(save_dir=folder, name=folder.parent.name, version=folder.name)
        self.path, self.before_step = folder / filename, before_step
        self._table: _Table | None = None

    @property
    def log_dir(self) -> str:
        """The run's folder; Lightning and its callbacks find it here."""
        return str(self.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The table that is being written."""
        if self._table is None:
            self._table = _Table(self.path, self.before_step)
            self._experiment = self._table  # type: ignore[assignment]
        return self._table


class _Table:
    """Rows of a CSV file: what stands there already, and what is added."""

    def __init__(self, path: Path, before_step: int | None) -> None:
        self.path = path
        self.metrics: list[dict[str, Any]] = []  # not yet in the file; Lightning counts them
        self.columns: list[str] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if _is_before(row, before_step)]
                self.columns = list(reader.fieldnames or [])
            self._rewrite(rows)

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add a row."""
        values = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        self.metrics.append({"step": step, **values})

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Leave the options out: config.yaml lies beside."""

    def save(self) -> None:
        """Write the new rows."""
        new = {key for row in self.metrics for key in row} - set(self.columns)
        rows, self.metrics = self.metrics, []
        if new:
            first = [key for key in ("step", "epoch") if key in new]
            self.columns += first + sorted(new - {"step", "epoch"})
            rows = [*self._read(), *rows]
            self._rewrite(rows)
        elif rows:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerows(rows)

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        with (
            written_whole(self.path) as part,
            part.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def _is_before(row: Mapping[str, str | None], step: int | None) -> bool:
    """Whether a row is whole, and of an earlier step than this."""
    text = row.get("step") or ""
    return (
        None not in row.values()
        and text.isdigit()
        and int(text) < (math.inf if step is None else step)
    )


def tensorboard(folder: Path, before_step: int | None, **options: Any) -> TensorBoardLogger:
    """Make a TensorBoard logger that writes into the run's folder, and goes on with its run.

    Args:
        folder: The run's folder; the event files lie in `tensorboard/` below it.
        before_step: The step at which the run goes on: TensorBoard hides later ones.
        options: What the user sets of Lightning's logger; save_dir "." means the run's folder.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if Path(given["save_dir"]) == Path("."):
        given |= {"save_dir": folder, "name": "tensorboard", "version": ""}
    return TensorBoardLogger(**{"default_hp_metric": False, "purge_step": before_step, **given})


# Weights & Biases --------------------------------------------------------------------------------


@dataclass
class Board:
    """What the run is called on a W&B board.

    Args:
        project: Project; "simmim", or WANDB_PROJECT of the environment, by default.
        entity: Team or user; your own by default.
        group: Runs of one group are shown together, such as the seeds of one experiment.
        tags: Words to find the run by, such as [baseline, vit].
        notes: A sentence about the run.
        job_type: Kind of the run; by default its task: pretrain, classify, segment or detect.
        log_checkpoints: Upload the best checkpoint when the run ends, as an artifact that says
            which run's weights it began with.
    """

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] | None = None
    notes: str | None = None
    job_type: str | None = None
    log_checkpoints: bool = False

    def options(self, task: str) -> dict[str, Any]:
        """As Lightning's WandbLogger and `wandb.init` take them."""
        given = {k: v for k, v in vars(self).items() if v is not None}
        given["log_model"] = given.pop("log_checkpoints")
        return {"job_type": task, **given}


def lineage(weights: str | None) -> dict[str, str]:
    """Say which run's checkpoint a run begins with, and under which name its board has it.

    Args:
        weights: As `model.weights`: of a run's folder or a checkpoint in one, or of anything else.

    Returns:
        `weights`, and where a run of ours with a board has made them `run` (its id there) and
        `artifact`; nothing without weights.
    """
    if weights is None:
        return {}
    path = Path(weights).expanduser()
    for folder in (path, path.parent.parent):
        with suppress(OSError):
            run_id = (folder / "wandb" / RUN_ID).read_text().strip()
            return {"weights": weights, "run": run_id, "artifact": f"model-{run_id}:best"}
    return {"weights": weights}


def board(folder: Path, **options: Any) -> WandbLogger | None:
    """Make the W&B logger of a run.

    Nobody is asked anything: without a login (in the environment, a netrc file or W&B's settings)
    the run is an offline one, and one line says how to sync it. WANDB_MODE is respected.

    Args:
        folder: The run's folder, which W&B's own goes into.
        options: What the user sets of Lightning's WandbLogger (project, tags, log_model ...), and
            source: where the weights come from, as `lineage` says it.

    Returns:
        The logger, or None where WANDB_MODE=disabled.
    """
    mode = os.environ.get("WANDB_MODE", "online").lower()
    if mode == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return None
    offline = options.pop("offline", False) or mode in ("offline", "dryrun") or not is_logged_in()
    source = options.pop("source", None) or {}
    given = {name: value for name, value in options.items() if value not in (None, ".")}
    defaults: dict[str, Any] = {
        "name": f"{folder.parent.name}/{folder.name}",
        "save_dir": folder.absolute(),  # its service works elsewhere if this process moves
        "project": os.environ.get("WANDB_PROJECT", PROJECT),
    }
    if "WANDB_RUN_ID" not in os.environ and "WANDB_SWEEP_ID" not in os.environ:
        defaults["id"] = _run_id(folder)
    return _Board(offline=offline, source=source, **{**defaults, **given})


def is_logged_in() -> bool:
    """Whether there are credentials for W&B, without asking the network or the user."""
    env, settings = os.environ, _wandb_settings()
    if any(env.get(key) for key in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    if settings.get("api_key"):
        return True
    url = env.get("WANDB_BASE_URL") or settings.get("base_url")
    hosts = [urlsplit(url).netloc] if url else HOSTS
    candidates = [Path(env["NETRC"])] if "NETRC" in env else [Path("~/.netrc"), Path("~/_netrc")]
    for path in candidates:
        with suppress(OSError, netrc.NetrcParseError):
            logins = netrc.netrc(path.expanduser())
            if any(logins.authenticators(host) for host in hosts):
                return True
    return False


def _wandb_settings() -> dict[str, str]:
    """W&B's settings: the user's, overruled by the working folder's."""
    home = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    parser = configparser.ConfigParser(default_section="nowhere", interpolation=None)
    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        parser.read([home / "settings", Path("wandb", "settings")])
        return dict(parser["default"]) if parser.has_section("default") else {}
    return {}


def _run_id(folder: Path) -> str:
    """The board's name for this run, which stays when it is resumed."""
    path = folder / "wandb" / RUN_ID
    with suppress(OSError):
        return path.read_text().strip()
    return secrets.token_hex(4)


class _Board(WandbLogger):
    """W&B as a run, online if it can be."""

    def __init__(self, offline: bool, source: Mapping[str, str], **options: Any) -> None:
        # Not Lightning's `offline`: it would set WANDB_MODE for whatever this process does next.
        super().__init__(**options)
        # Half a minute, not one and a half, before a machine without a network goes on offline.
        self._wandb_init.setdefault("settings", {"init_timeout": 30})
        self._wandb_init.pop("anonymous", None)  # W&B warns of it, whatever it says
        self.offline, self.source = offline, source
        self.places: dict[str, str] = {}  # of the environment, while the run goes on

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run; begun when first asked for."""
        if self._experiment is not None:
            return self._experiment
        import wandb

        if self.offline:
            self._go_offline()
        self._leave_home_alone()
        try:
            run = super().experiment
        except wandb.errors.Error as error:  # no network, a key that is none, ...
            rank_zero_info(f"W&B cannot be reached: {one_line(str(error))}")
            wandb.teardown()  # it would say that the run's id is in use
            self._go_offline()
            run = super().experiment
        folder = Path(run.dir).parent
        with suppress(OSError):
            (folder.parent / RUN_ID).write_text(run.id)
        if self.offline:
            # The whole folder: a run that was resumed has a file for each part.
            where = _short(folder.parent)
            rank_zero_info(f"W&B keeps an offline run; to sync it: wandb sync {where}")
        if self.source:
            self._use(run)
        return run

    def _leave_home_alone(self) -> None:
        """Stage files in the run's folder, where an offline run keeps all else that is to be sent.

        W&B's cache and log go there too, where there is no home that can be written.
        """
        folder = Path(str(self.save_dir), "wandb")
        names = ["WANDB_DATA_DIR", *(["WANDB_CACHE_DIR"] if not _has_home() else [])]
        self.places = {name: str(folder) for name in names if name not in os.environ}
        os.environ.update(self.places)

    def _use(self, run: Any) -> None:
        """Note where the weights come from; online the artifact, too, if the board has it."""
        run.config.update({"lineage": dict(self.source)}, allow_val_change=True)
        if self.offline or "artifact" not in self.source or not self._log_model:
            return
        try:
            run.use_artifact(self.source["artifact"], type="model")
        except Exception as error:  # it was not uploaded, or is another project's
            rank_zero_info(f"no lineage on the board: {one_line(str(error))}")

    def _go_offline(self) -> None:
        import wandb

        self.offline = True
        self._wandb_init.update(mode="offline", settings=wandb.Settings(silent=True))


def _has_home() -> bool:
    """Whether files can be written into the user's cache folder, as W&B looks for it."""
    if "HOME" not in os.environ and os.name != "nt":
        return False
    try:
        with TemporaryFile(dir=user_cache_path("wandb", ensure_exists=True)) as file:
            return file.write(b"0" * 4096) > 0
    except OSError:  # a home that is full as well
        return False


def finish_board(loggers: list[Logger], failed: bool) -> None:
    """End the W&B runs, so that the next one in this process begins its own."""
    for logger in loggers:
        if isinstance(logger, _Board) and logger._experiment is not None:
            logger._experiment.finish(exit_code=int(failed))
            logger._experiment = None
            for name in logger.places:
                os.environ.pop(name, None)


def _short(path: Path) -> str:
    """The path from here, where it is below, quoted for a shell if need be."""
    import shlex

    with suppress(ValueError):
        path = path.resolve().relative_to(Path.cwd())
    return shlex.quote(str(path))
