"""What a user did wrong, or ran out of, as one sentence."""

import errno
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import simmim.base.errors
from simmim.base.errors import explain, word_warnings


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_too_little_memory_names_the_remedies(error: Exception) -> None:
    said = explain(error)
    assert said is not None
    assert said.startswith("the memory is full: use a smaller batch (--data.batch_size")
    assert "grad_checkpointing" in said


def test_the_memory_of_the_cpu_is_memory_too() -> None:
    """Torch and NumPy say it each in its own way; here by what no machine has."""
    for allocate in (torch.empty, np.empty):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate(2**52)
        assert str(explain(caught.value)).startswith("the memory is full")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "num_workers 2"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "shm-size"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.png"), "the disk is full: a.png"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "a.png"), "a.png cannot be written"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "new"), "new cannot be written: choose"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), __file__), ".py: permission denied"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG), "a"), "a limit (ulimit -f), allows: a;"),
        (Exception("Error while serializing: No space left on device"), "the disk is full; free"),
        (MisconfigurationException("No supported gpu backend found!"), "(or --accelerator cpu)"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(error: Exception, words: str) -> None:
    said = explain(error)
    assert said is not None
    assert words in said
    assert "\n" not in said


def test_a_bug_is_nobody_elses_mistake() -> None:
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert explain(KeyError("x")) is None


def test_our_warnings_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", before := warnings.formatwarning)
    word_warnings()
    word_warnings()  # once is enough
    text = warnings.formatwarning("two\nlines", UserWarning, simmim.base.errors.__file__, 3)
    assert text == "simmim: warning: two lines\n"
    theirs = ("old", DeprecationWarning, str(Path(os.__file__)), 3)
    assert warnings.formatwarning(*theirs) == before(*theirs)
