"""The split: a function of names and seed, near its share, true to classes and groups."""

import sys
from pathlib import Path

import numpy as np
import pytest

from simmim.data.layout import read_parts
from simmim.data.split import check_group_pattern, validation_mask
from support.processes import run_program


def mask(
    names: list[str],
    labels: list[int] | None = None,
    fraction: float = 0.1,
    seed: int = 0,
    pattern: str | None = None,
) -> np.ndarray:
    return validation_mask(
        names, np.array(labels or [0] * len(names)), fraction, seed, group_pattern=pattern
    )


def test_it_is_a_known_function_of_names_and_seed() -> None:
    names = [f"class/{i}.jpg" for i in range(20)]
    assert np.flatnonzero(mask(names, fraction=0.25)).tolist() == [1, 2, 5, 11, 17]
    assert np.flatnonzero(mask(names, fraction=0.25, seed=1)).tolist() == [2, 4, 6, 7, 17]


def test_each_class_gives_its_share() -> None:
    names = [f"{label}/{i}" for label in range(7) for i in range(40)]
    labels = [label for label in range(7) for _ in range(40)]
    chosen = mask(names, labels)
    assert np.bincount(np.array(labels)[chosen]).tolist() == [4] * 7


@pytest.mark.parametrize(("size", "fraction"), [(4, 0.1), (1, 0.5), (3, 0.34), (25, 0.1)])
def test_many_small_classes_give_their_share_together(size: int, fraction: float) -> None:
    labels = np.repeat(np.arange(300), size)
    names = [f"{label}/{i}" for i, label in enumerate(labels)]
    chosen = mask(names, labels.tolist(), fraction)
    if size > 1:
        assert chosen.sum() == pytest.approx(fraction * len(names), abs=1)
        assert np.bincount(labels[chosen], minlength=300).max() < size  # never a whole class
    else:
        assert chosen.sum() == 1  # of classes with one image none can spare it; one must


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_two_images_are_one_and_one(fraction: float) -> None:
    assert mask(["a", "b"], fraction=fraction).sum() == 1
    # Nothing validates where nothing shall or can.
    assert not mask(["a", "b", "c"], fraction=0).any()
    assert not mask(["a"], fraction=0.5).any()


def test_added_images_move_few_others() -> None:
    names = [f"{i}.png" for i in range(1000)]
    before, after = mask(names), mask([*names, *(f"new{i}.png" for i in range(100))])
    assert (before != after[:1000]).sum() <= 20
    assert (before <= mask(names, fraction=0.2)).all()  # a smaller share is part of a larger one
    # Accents hash alike, composed or not.
    others = [f"{i}.png" for i in range(9)]
    assert mask(["\u00e9.png", *others]).tolist() == mask(["e\u0301.png", *others]).tolist()


def test_groups_stay_together() -> None:
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 60, 600)
    labels = rng.integers(0, 3, 600)  # patients have images in all classes
    names = [f"{c}/p{p:02d}_{i}.png" for i, (p, c) in enumerate(zip(patients, labels, strict=True))]
    chosen = mask(names, labels.tolist(), 0.2, pattern=r"(p\d+)_")
    assert set(patients[chosen]).isdisjoint(patients[~chosen])
    assert chosen.mean() == pytest.approx(0.2, abs=0.05)


def test_groups_within_classes_are_stratified() -> None:
    names = [f"{c}/{c}{p}_{i}.png" for c in "abc" for p in range(20) for i in range(5)]
    labels = np.repeat([0, 1, 2], 100)
    chosen = mask(names, labels.tolist(), 0.1, pattern=r"(\w\d+)_")
    assert np.bincount(labels[chosen]).tolist() == [10, 10, 10]


def test_a_class_does_not_lose_its_only_group() -> None:
    names = [f"{c}/{c}{p}_{i}.png" for c, n in (("a", 1), ("b", 9)) for p in range(n) for i in "xy"]
    labels = np.array([0] * 2 + [1] * 18)
    for seed in range(20):
        chosen = mask(names, labels.tolist(), 0.2, seed, pattern=r"(\w\d)_")
        assert np.bincount(labels[chosen], minlength=2).tolist() == [0, 4]


def test_folders_of_patients_are_no_classes() -> None:
    names = [f"p{p}/{i}.png" for p in range(10) for i in range(3)]
    labels = np.repeat(np.arange(10), 3)
    chosen = mask(names, labels.tolist(), 0.3, pattern=r"(p\d)/")
    assert sorted(np.bincount(labels[chosen], minlength=10).tolist()) == [0] * 7 + [3] * 3


def test_one_group_trains_and_two_are_divided() -> None:
    assert not mask(["p1_a", "p1_b"], fraction=0.5, pattern="(p.)").any()
    assert mask(["p1_a", "p2_b", "p2_c"], fraction=0.01, pattern="(p.)").sum() in (1, 2)


def test_a_pattern_must_name_every_image() -> None:
    with pytest.raises(ValueError, match=r"'\(p\\\\d\+\)' does not match 'x.png': its first group"):
        mask(["p1.png", "x.png"], pattern=r"(p\d+)")
    with pytest.raises(ValueError, match="has no group: put what names the patient in brackets"):
        check_group_pattern("p[0-9]+")
    with pytest.raises(ValueError, match="is no regular expression"):
        check_group_pattern("(p")


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def validation(root: Path) -> list[str]:
    part = read_parts(str(root), 0.2)["val"]
    return [part.files.name(i) for i in part.places.tolist()]


@pytest.mark.exhaustive
def test_it_depends_neither_on_the_place_nor_on_the_process(workdir: Path) -> None:
    for place in ("here", "there/deeper"):
        touch(*(workdir / place / "ab"[i % 2] / f"{i}.png" for i in range(30)))
    code = (
        "from simmim.data.layout import read_parts\npart = read_parts('there/deeper', 0.2)['val']\n"
        "print(*map(part.files.name, part.places.tolist()), sep='\\n')"
    )
    found = run_program(sys.executable, "-c", code, PYTHONHASHSEED="7").splitlines()
    assert found == validation(Path("here")) == validation(Path("there/deeper"))


def test_train_folder_is_split_like_the_folder_itself(tmp_path: Path) -> None:
    touch(*(tmp_path / "train" / "a" / f"{i}.png" for i in range(20)))
    assert validation(tmp_path) == validation(tmp_path / "train")
