"""Say in one sentence what a user did wrong, and what to do instead.

What is no mistake of the user's is left alone: it is a bug, and keeps its traceback.
"""

import errno
import os
import re
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

TYPES = {  # as jsonargparse writes them, and as people do
    r"class 'bool'": "true or false",
    r"class 'int'": "a whole number",
    r"class 'float'": "a number",
    r"class 'str'": "a word",
    r"(list|Sequence)\[int\]": "a list [1, 2] of whole numbers",
    r"list\[float\]": "a list [1.0, 2.0] of numbers",
    r"tuple": "a list of numbers",
    r"dict": "a table {name: value}, in quotes",
}
ELSEWHERE = {  # what other tools call our options
    "epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "gpus": "trainer.devices",
    "ngpus": "trainer.devices",
    "fp16": "trainer.precision",
    "amp": "trainer.precision",
    "lr": "model.base_lr",
    "learning_rate": "model.base_lr",
    "arch": "model.encoder",
    "backbone": "model.encoder",
    "pretrained": "model.weights",
    "checkpoint": "ckpt_path",
    "resume": "ckpt_path",
    "data_path": "data.root",
    "dir": "data.root",
    "workers": "data.num_workers",
    "seed": "seed_everything",
    "output": "run_dir",
    "output_dir": "run_dir",
}
REMOVED = {  # sections of earlier versions, and what has taken their place
    "masks": "the pictures of --reconstructions show the mask of each image",
    "against": "python benchmarks/reference_pipeline.py measures the official way beside ours",
    "originals": "python benchmarks/reference_pipeline.py takes the folder of originals",
}
ROOTS = ("--root", "--data.root")
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota of the disk is used up",
    errno.EFBIG: "a file would be larger than the disk, or a limit (ulimit -f), allows",
}
NO_MEMORY = (  # as torch says it of CUDA and MPS, of the CPU, and of cuBLAS
    r"out of memory|DefaultCPUAllocator|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED"
)
PACKAGE = Path(__file__).parents[1]
LOST_WORKER = r"DataLoader worker \(pid.*(exited unexpectedly|killed by signal)"


def explain(error: BaseException) -> str | None:
    """Word a user's mistake.

    Args:
        error: What was raised.

    Returns:
        One sentence, or None where the user is not to blame.
    """
    kind = type(error)
    if isinstance(error, ArgumentError):
        return one_line(str(error))
    if said := _what_the_machine_lacks(error):
        return said
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    if found := re.match(r"Error\(s\) in loading state_dict for (\w+):\s*(.*)", str(error)):
        return f"the checkpoint holds other weights than its {found[1]} has: {found[2][:200]}"
    if found := re.match(r"You selected an invalid (\w+) name: `\w+='(.*?)'`", str(error)):
        names = re.search(r"(?:choices|names are): ([\w, ]+)", str(error))  # Lightning's
        return _unknown_name(f"--trainer.{found[1]}", found[2], names[1] if names else "")
    if kind.__name__ == "MisconfigurationException":  # Lightning's
        return one_line(f"{error}{_remedy(str(error))}")
    if kind.__module__.split(".")[0] == "simmim":
        return one_line(str(error))
    if isinstance(error, ValueError) and (is_ours(error) or _while_configuring(error)):
        return one_line(str(error))
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return one_line(str(error)) if _while_configuring(error) else None
    return None


def word_usage_error(message: str, options: Iterable[str]) -> str:
    """Turn jsonargparse's message into a sentence with the value and the remedy.

    Args:
        message: What jsonargparse says.
        options: The options that there are, "--model.mask_ratio" and so on.
    """
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        return _unknown(found[1], options)
    if found := re.search(r"arguments are required: (.*)", message):
        return f"{' and '.join(f'--{name}' for name in found[1].split(', '))} must be given"
    if found := re.search(r"does not accept (?:option|nested key|key) '([^']+)'", message):
        return _unknown(f"--{found[1].removeprefix('--')}", options)
    if found := re.search(r'Linked "(\S+)" must be given via "(\S+)"', message):
        return f"{found[1]} follows {found[2]}: give --{found[2]}"
    if found := re.search(r"Call to compute_fn of link .* failed: (.*)", message, re.DOTALL):
        return one_line(found[1])  # what our function says
    if found := re.search(r"argument (\S+): expected (.*)", message):
        return f"{found[1].split('/')[-1]} needs a value"
    if found := re.search(r"argument (\S+) --> (\S+): ", message):
        return f"{found[2]} follows {found[1]}: give --{found[1]}"
    if found := re.search(r'Parser key "(\S+?)":', message):
        return _wrong_value(found[1], message)
    return one_line(message)


def word_warnings() -> None:
    """Print our warnings as sentences, without the line of code that they come from."""
    others = warnings.formatwarning
    if getattr(others, "words_ours", False):
        return

    def word(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if Path(filename).is_relative_to(PACKAGE):
            return f"simmim: warning: {one_line(str(message))}\n"
        return others(message, category, filename, lineno, line)

    word.words_ours = True  # type: ignore[attr-defined]
    warnings.formatwarning = word


def one_line(message: str) -> str:
    """A message without line breaks."""
    return " ".join(message.split())


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint at the name that was probably meant: "did you mean ...?", or nothing."""
    near = get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else ""


def is_ours(error: BaseException) -> bool:
    """Whether we raised it on purpose: the frame that raised it is in this package."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and _module(frames[-1][0]).split(".")[0] == "simmim"


def _unknown(argument: str, options: Iterable[str]) -> str:
    option = argument.split("=")[0]
    names = [name for name in options if name not in ("-h", "--help")]
    if not option.startswith("-"):
        root = next((f", did you mean {n} {argument}?" for n in ROOTS if n in names), "")
        return f"unexpected argument {argument!r}{root}: options begin with --, configs follow -c"
    if instead := REMOVED.get(option.strip("-").split(".")[0]):
        return f"{option} was removed: {instead}"
    theirs = f"--{ELSEWHERE.get(option.strip('-').replace('-', '_'))}"
    hint = f"did you mean {theirs}?" if theirs in names else nearest(option, names)
    return f"unknown option {option}: {hint or 'see --help for those that there are'}"


def _unknown_name(option: str, name: str, names: str) -> str:
    hint = nearest(name, names.split(", "))
    return one_line(f"{option} {name} is not known: {hint} choose from {names.strip(', ')}")


def _wrong_value(key: str, message: str) -> str:
    """`Parser key "model.mask_fill": Expected a typing.Literal[...]. Got value: tokn`."""
    if found := re.search(r"Option '(\S+)' is not accepted.*class_path='([^']+)'", message):
        return f"--{key}.{found[1]}: {found[2]} has no such option"
    if found := re.search(r"module '(\S+)' has no attribute '(\S+)'", message):
        return f"--{key}: module {found[1]} has no {found[2]}"
    values = re.findall(
        r"(?:Given value|Got value|import path string|Expected a path but): ?(.*)", message
    )
    value = values[-1] if values else ""
    if "import path string" in message:
        return (
            f"--{key} {value}: no class of that name is known here: check its spelling, or give "
            "the import path (package.module.Class)"
        )
    types = _subtypes(message)
    groups = re.findall(r"Literal\[([^\]]*)\]", types)
    words = list(dict.fromkeys(word.strip("'") for g in groups for word in g.split(", ")))
    plain = [said for pattern, said in TYPES.items() if re.search(pattern, types)]
    hint = nearest(value, words)
    expected = " or ".join([*words, *plain]) or one_line(message.split(":", 1)[1])
    return one_line(f"--{key} does not take {value!r}: {hint} it takes {expected}")


def _subtypes(message: str) -> str:
    """The part of a message that names the types, without the type of what was given."""
    if found := re.search(r"Subtypes: (.*)", message):
        return found[1]
    return message.split("Got value")[0].split("Given value type")[0]


def _what_the_machine_lacks(error: BaseException) -> str | None:
    """Room on the disk, memory, open files, or the right to write."""
    if full := _lacks_space(error):
        filename = getattr(error, "filename", None)
        where = f": {filename}" if filename else ""
        return f"{full}{where}; free some space (a run goes on with --ckpt_path last)"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return (
            "too many files are open: allow more (ulimit -n 65536), or use fewer processes that "
            "read (--data.num_workers 2)"
        )
    if isinstance(error, OSError) and _cannot_be_written(error):
        return (
            f"{error.filename} cannot be written: choose another folder (--run_dir, --out, "
            "--data.data_dir)"
        )
    if _lacks_memory(error):
        return (
            "the memory is full: use a smaller batch (--data.batch_size, or --batch_size; in "
            "training with --trainer.accumulate_grad_batches the lr stays), --trainer.precision "
            "bf16-mixed, or --model.grad_checkpointing true"
        )
    if isinstance(error, RuntimeError) and re.search(LOST_WORKER, str(error)):
        return (
            "a process that reads images was ended by the system, most often for want of memory: "
            "use fewer of them (--data.num_workers 2), smaller batches, or in a container more "
            "shared memory (docker run --shm-size 8g)"
        )
    return None


def _remedy(message: str) -> str:
    """What to do where Lightning says only what is wrong."""
    if re.search(r"No supported gpu backend|CUDAAccelerator.*can not run", message):
        return (
            " torch finds no GPU here: use --trainer.accelerator cpu (or --accelerator cpu), or "
            "another build of torch"
        )
    if "restored a checkpoint with current_epoch" in message:
        return " A larger --trainer.max_epochs goes on"
    return ""


def _lacks_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of the device or of the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True  # the second is torch's, which is not imported here
    return isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error)) is not None


def _lacks_space(error: BaseException) -> str | None:
    """Say in which way the disk is full, if it is; safetensors says it in an error of its own."""
    if isinstance(error, OSError) and error.errno in FULL:
        return FULL[error.errno]
    return next((said for code, said in FULL.items() if os.strerror(code) in str(error)), None)


def _cannot_be_written(error: OSError) -> bool:
    """Whether something should have been made where nothing may be."""
    if error.errno != errno.EACCES or not error.filename:
        return error.errno == errno.EROFS
    path = os.path.abspath(os.fsdecode(error.filename))
    return not os.path.lexists(path) and os.access(os.path.dirname(path), os.X_OK)


def _while_configuring(error: BaseException) -> bool:
    """Whether it was raised while model, data and trainer were being made from options."""
    return any(
        frame.f_code.co_name in ("instantiate_classes", "instantiate_trainer")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _module(frame: object) -> str:
    return str(getattr(frame, "f_globals", {}).get("__name__", ""))
