"""Mutation test of the suite: puts small wrong changes into the source, one at a time.

Each change is made in a copy of the repository, and the tests are run there until one fails. Those
that are most likely to notice run first, then all of the suite. A row is written as each ends, and
rows that are there already are not repeated:

    python benchmarks/mutations.py --suite fast --out mutations.csv
    python benchmarks/mutations.py --suite test --survivors-of mutations.csv --out rest.csv
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SUITES = {"fast": "not slow and not exhaustive", "test": "not exhaustive"}
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "runs", "dist", ".*_cache")


class Mutation(NamedTuple):
    """A wrong change: one place in one file.

    Attributes:
        file: Path below src/simmim.
        right: What stands there, once.
        wrong: What replaces it.
        tests: Names of test files, as a glob, that run first.
    """

    file: str
    right: str
    wrong: str
    tests: str


MUTATIONS = [
    # masking: ceil, keys, the side that is hidden
    Mutation("masking.py", "return -(-cells * share", "return (cells * share", "test_masking*"),
    Mutation("masking.py", "_mix(index.long() + start)", "_mix(index.long())", "test_masking*"),
    Mutation("masking.py", "draw % (high - low + 1)", "draw % (high - low)", "test_masking*"),
    # encoder: the token's place, what fills hidden pixels, the layer that is probed
    Mutation(
        "encoder.py",
        "torch.where(hidden, token, tokens)",
        "torch.where(hidden, tokens, token)",
        "test_encoder*",
    ),
    Mutation("encoder.py", "indices=[layer - 1]", "indices=[layer]", "test_encoder*"),
    Mutation("encoder.py", '"mean" if self._adds else "zero"', '"zero"', "test_encoder*"),
    # head, target, loss
    Mutation("head.py", "transpose(1, 2) + positions", "transpose(1, 2)", "test_head*"),
    Mutation(
        "target.py",
        "padded[..., :-2] - padded[..., 2:]  #",
        "padded[..., 2:] - padded[..., :-2]  #",
        "test_target*",
    ),
    Mutation(
        "target.py",
        "torch.var_mean(patches, (1, 3, 5))",
        "torch.var_mean(patches, (3, 5))",
        "test_target*",
    ),
    Mutation("loss.py", "hidden.sum() * error.shape[1]", "hidden.sum()", "test_loss*"),
    Mutation("loss.py", "torch.where(hidden, error, 0)", "(error * hidden)", "test_loss*"),
    # pretraining: masks of validation, epochs, the fixed seed
    Mutation(
        "pretrain.py",
        "(VAL_SEED, 0) if validation",
        "(VAL_SEED, self.current_epoch) if validation",
        "test_pretrain*",
    ),
    Mutation(
        "pretrain.py",
        "else (self.seed, self.current_epoch)",
        "else (self.seed, 0)",
        "test_pretrain*",
    ),
    # optimisation
    Mutation(
        "optim.py",
        "layer_decay ** (last - levels[name])",
        "layer_decay ** levels[name]",
        "test_optim*",
    ),
    Mutation("optim.py", "global_batch_size / 512", "global_batch_size / 256", "test_optim*"),
    Mutation("optim.py", "if t < warmup_steps:", "if t <= warmup_steps:", "test_optim*"),
    Mutation("optim.py", "levels[name] -= 1  # timm", "levels[name] -= 0  # timm", "test_optim*"),
    # data: order, split, crops, scans, statistics
    Mutation(
        "data/draws.py", "key=np.array([seed, epoch]", "key=np.array([seed, 0]", "test_data_*"
    ),
    Mutation(
        "data/sampler.py", "range(rank, n, replicas)", "range(0, n, replicas)", "test_data_sampler*"
    ),
    Mutation(
        "data/resume.py", "return epoch, step * accumulation", "return epoch, step", "test_data_*"
    ),
    Mutation("data/split.py", "np.maximum(sizes - 1, 0)", "sizes", "test_data_split*"),
    Mutation(
        "data/split.py", 'salt=seed.to_bytes(8, "little")', "salt=bytes(8)", "test_data_split*"
    ),
    Mutation(
        "data/transforms.py",
        "next(draws) * (height - h + 1)",
        "next(draws) * (height - h)",
        "test_data_transforms*",
    ),
    Mutation("data/transforms.py", "images.flip(-1)", "images.flip(-2)", "test_data_transforms*"),
    Mutation("data/scans.py", "np.subtract(1, unit, out=unit)", "pass", "test_data_*"),
    Mutation("data/dataset.py", "self.unreadable[index] = 1", "pass", "test_data_*"),
    Mutation(
        "data/classification.py",
        "max(round(amount * size), 1)",
        "round(amount * size)",
        "test_classify_data*",
    ),
    # tasks
    Mutation(
        "classify.py",
        "(1 - smoothing) + smoothing / classes",
        "(1 - smoothing) + smoothing",
        "test_classify*",
    ),
    Mutation(
        "segment.py",
        "counts.sum(0) + counts.sum(1) - hits",
        "counts.sum(0) + counts.sum(1)",
        "test_segment*",
    ),
    Mutation("segment.py", "ignore_index=VOID, reduction", "reduction", "test_segment*"),
    Mutation("detect.py", "(original / size).flip(0)", "(original / size)", "test_detect*"),
    Mutation(
        "decoders/sliding_window.py",
        "counts[here[1:]] += 1",
        "counts[here[1:]] = 1",
        "test_segment*",
    ),
    Mutation("evaluation/metrics.py", "images / (len(n) * n)", "images / n", "test_classify*"),
    # weights, probes
    Mutation(
        "weights/fit.py",
        "return kernel.sum(1, keepdim=True)",
        "return kernel.mean(1, keepdim=True)",
        "test_weights*",
    ),
    Mutation(
        "evaluation/probe.py", "(similarity / temperature).exp()", "similarity.exp()", "test_probe*"
    ),
    Mutation(
        "evaluation/readout.py",
        "[layer - 1 for layer in layers]",
        "[layer for layer in layers]",
        "test_readout*",
    ),
    # runs, callbacks, commands
    Mutation("base/files.py", "part.unlink(missing_ok=True)", "pass", "test_*run*"),
    Mutation(
        "callbacks/probe.py", "0 < last <= epochs", "0 < last < epochs", "test_callbacks_probe*"
    ),
    Mutation("commands/export/check.py", "TOLERANCE * torch.stack", "torch.stack", "test_export*"),
    Mutation(
        "commands/compare/significance.py",
        "self.mean - self.margin > 0",
        "self.mean + self.margin > 0",
        "test_compare*",
    ),
]


def main() -> None:
    """Run all mutations, and count those that are noticed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="fast")
    parser.add_argument("--out", type=Path, default=Path("mutations.csv"))
    parser.add_argument("--survivors-of", type=Path, help="only what an earlier file let through")
    parser.add_argument("--workers", default="auto", help="of pytest-xdist")
    options = parser.parse_args()
    wanted = range(len(MUTATIONS))
    if options.survivors_of:
        wanted = [n for n, noticed in read(options.survivors_of).items() if not noticed]
    done = read(options.out)
    for number in wanted:
        if number not in done:
            done[number] = run(number, options.suite, options.workers, options.out)
    print(f"{sum(done.values())} of {len(done)} noticed by the suite {options.suite!r}")


def read(file: Path) -> dict[int, bool]:
    """The mutations that were run, and whether each was noticed."""
    if not file.exists():
        return {}
    with file.open(newline="") as rows:
        return {int(row["number"]): bool(row["failing"]) for row in csv.DictReader(rows)}


def run(number: int, suite: str, workers: str, out: Path) -> bool:
    """Make one mutation in a copy, run the tests there, and append a row."""
    mutation, begin = MUTATIONS[number], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ROOT.name
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
        apply(mutation, copy)
        first = sorted(str(p) for p in (copy / "tests").glob(f"{mutation.tests}.py"))
        failing = test(copy, first, suite, "0") or test(copy, [], suite, workers)
    is_new = not out.exists()
    with out.open("a", newline="") as rows:
        writer = csv.writer(rows)
        if is_new:
            writer.writerow(["number", "file", "wrong", "failing", "seconds"])
        seconds = round(time.monotonic() - begin)
        writer.writerow([number, mutation.file, mutation.wrong, failing, seconds])
    print(f"{number:2} {mutation.file}: {failing or 'SURVIVED'}", flush=True)
    return bool(failing)


def apply(mutation: Mutation, root: Path) -> None:
    """Change a copy of the source.

    Raises:
        ValueError: If the right text does not stand there exactly once: the list is out of date.
    """
    path = root / "src" / "simmim" / mutation.file
    text = path.read_text()
    if text.count(mutation.right) != 1:
        raise ValueError(
            f"{mutation.file} has {mutation.right!r} {text.count(mutation.right)} times"
        )
    path.write_text(text.replace(mutation.right, mutation.wrong))


def test(root: Path, files: list[str], suite: str, workers: str) -> str:
    """Run tests until one fails: its name; "" where all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", SUITES[suite], *files]
    command += ["--numprocesses", workers, "-p", "no:cacheprovider", "--no-header"]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "CI": "true"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if result.returncode == 0 or (files and result.returncode == 5):  # 5: none of them was chosen
        return ""
    lines = result.stdout.splitlines()
    named = [line.split()[1] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return named[0] if named else f"exit status {result.returncode}"


if __name__ == "__main__":
    main()
