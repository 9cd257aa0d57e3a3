"""A short run of each task, made once for all processes of a test session."""

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

from filelock import FileLock

from support.commands import QUIET, SMALL
from support.folders import make_boxes, make_classes, make_masks
from support.processes import run_command

DATA: dict[str, Callable[[], Path]] = {
    "pretrain": lambda: make_classes(Path("images"), names="cat dog"),
    "classify": lambda: make_classes(Path("images"), names="cat dog"),
    "segment": lambda: make_masks(Path("masks"), train=8, val=3),
    "detect": lambda: make_boxes(Path("boxes"), train=8, val=3),
}
OPTIONS: dict[str, list[str]] = {
    "pretrain": ["--data.root=images", "--model.mask_patch_size=8", "--probe.every_n_epochs=0"],
    "classify": ["--data.root=images"],
    "segment": ["--data.root=masks", "--model.decoder_channels=16"],
    "detect": [
        "--data.root=boxes", "--model.img_size=[48, 64]", "--model.fpn_channels=16",
        "--model.proposals=50", "--model.rois_per_image=16", "--model.score_threshold=0.0",
    ],
}  # fmt: skip


def make_run(task: str, base: Path) -> Path:
    """A working folder with the data of a task and runs/TASK/version_0; to be copied, not changed.

    An epoch of four images a step, with a ViT of two blocks on 32 px (detection: 48 x 64).
    """
    folder = base / f"run_{task}"
    with FileLock(base / f"{task}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()
            few = ["--model.warmup_epochs=0", "--data.batch_size=4"]
            few += ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", f"--name={task}"]
            with chdir(folder):
                DATA[task]()
                run_command(task, "fit", *SMALL, *few, *OPTIONS[task], *QUIET)
            (folder / "done").touch()
    return folder
