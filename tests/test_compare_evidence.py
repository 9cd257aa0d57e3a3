"""What a comparison's runs show: the margin covers what it says, and the sentence is honest."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import binomtest

from simmim.commands.compare.significance import (
    Gap,
    Result,
    Validation,
    counted_steps,
    gap,
    gaps,
    markdown,
    table,
    verdict,
)
from simmim.commands.compare.significance import unlearned as notes_of

Bools = npt.NDArray[np.bool_]


def a_gap(mean: float, margin: float, labels: str = "10 labels", **kwargs: float) -> Gap:
    options = {"seeds": 3, "images": 360, "spread": margin / 4, **kwargs}
    return Gap(labels, first=0.4 + mean, second=0.4, margin=margin, **options)  # type: ignore[arg-type]


def result(arm: str, images: int, seed: int, correct: Bools, **kwargs: float) -> Result:
    labels = np.arange(len(correct)) % 2
    options = {"train_top1": 1.0, **kwargs}
    return Result(
        mode="finetune",
        arm=arm,
        budget=0.1,
        images=images,
        seed=seed,
        steps=7,
        top1=float(correct.mean()),
        top1_balanced=float(np.mean([correct[labels == k].mean() for k in (0, 1)])),
        seconds=1.0,
        correct=correct,
        **options,
    )


# The sentence ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "begins", "words"),
    [
        ([a_gap(0.133, 0.05)], "Yes: at 10 labels pretrained reaches 53.3 %", "13.3 ± 5.0 points"),
        ([a_gap(-0.133, 0.05)], "No: at 10 labels from scratch reaches 40.0 %", "against 26.7 %"),
        ([a_gap(0.03, 0.05)], "Not shown:", "3.0 ± 5.0 points over 3 seeds and 360 validation"),
        ([a_gap(-0.03, 0.05)], "Not shown:", "-3.0 ± 5.0"),
        ([a_gap(0.002, 0.004)], "No: nowhere is it worth a point", "0.2 ± 0.4"),
        ([a_gap(0.2, 0.05), a_gap(-0.1, 0.05, "all labels")], "It depends:", "at all labels from"),
        ([a_gap(0.2, 0.05), a_gap(0.01, 0.05, "all")], "Yes:", "; not shown at all by 1.0 points."),
        ([a_gap(0.01, 0.05), a_gap(0.2, 0.05, "all")], "Yes: at all", "not shown at 10 labels by"),
        ([a_gap(0.2, 0.05, learned=0.5)], "Yes, after so short a training: at 10 labels", "20.0"),
        ([a_gap(0.2, np.nan, seeds=1)], "Not shown: one seed does not tell", "use 3 seeds"),
    ],
)
def test_the_verdict_says_yes_no_or_not_shown(found: list[Gap], begins: str, words: str) -> None:
    said = verdict(found)
    assert said.startswith(begins)
    assert words in said
    assert said.endswith(".")
    assert said.count("\n") == 0


def test_an_interval_beyond_what_accuracies_can_be_is_not_given() -> None:
    said = verdict([a_gap(-0.08, 2.039, seeds=2)])
    assert "±" not in said
    assert "over 2 seeds, too few for an interval, and 360 validation images" in said
    rows = np.array([[True, True, False], [False, False, False]])
    runs = [result("pretrained", 3, seed, row) for seed, row in enumerate(rows)]
    runs += [result("scratch", 3, seed, ~row) for seed, row in enumerate(rows)]
    shown = table(runs, Validation(np.array([0, 1, 0]), np.arange(3)))
    assert shown[0]["interval"] == "too few seeds"
    assert [counted_steps(n) for n in (1, 1200)] == ["1 step", "1,200 steps"]


# The margin --------------------------------------------------------------------------------------


def test_with_equal_seeds_the_margin_is_mcnemars() -> None:
    """b - c of n, with the variance (b + c - (b - c)^2 / n) / n^2 (McNemar, 1947)."""
    first, second = np.zeros((2, 1, 400), dtype=bool)
    first[0, :90], second[0, 60:110] = True, True  # b = 60, c = 20
    both = np.repeat(first, 2, axis=0), np.repeat(second, 2, axis=0)
    found = gap(*both, np.full(400, 1 / 400), np.arange(400))
    variance = (60 + 20 - 40**2 / 400) / 400**2 * 400 / 399 + 1 / 400**2
    assert found.mean == pytest.approx(0.1)
    assert found.margin == pytest.approx(1.966 * variance**0.5, rel=1e-3)
    assert found.spread == 0


def test_the_margin_covers_the_truth_as_often_as_it_says() -> None:
    """Two arms that are equally good, with luck of images and of seeds: 5 % may be judged."""
    rng = np.random.default_rng(0)
    for of_seeds in (0.0, 0.3, 1.0):
        wrong, tries, n = 0, 300, 200
        for _ in range(tries):
            easy = rng.normal(0, 1.5, n) + rng.normal(0, 1, (2, 1, n))
            logits = easy + rng.normal(0, of_seeds, (2, 3, 1)) + rng.normal(0, 0.7, (2, 3, n))
            correct = rng.random((2, 3, n)) < 1 / (1 + np.exp(-logits))
            found = gap(*correct, np.full(n, 1 / n), np.arange(n))
            wrong += found.judgement in ("better", "worse")
        assert binomtest(wrong, tries, 0.05, "greater").pvalue > 0.01, (of_seeds, wrong)


def test_what_makes_the_margin_wider() -> None:
    rng = np.random.default_rng(0)
    n = 120
    easy = np.repeat(rng.normal(0, 2, n // 4), 4)  # four images of a patient are alike
    correct = rng.normal(0, 0.3, (2, 3, n)) + easy + np.array([0.3, 0])[:, None, None] > 0
    even, alone, patients = np.full(n, 1 / n), np.arange(n), np.arange(n) // 4
    one = gap(*correct, even, alone)
    assert gap(*correct, even, alone, judged=3).margin > one.margin
    assert gap(*correct[:, :2], even, alone).margin > one.margin
    same = np.zeros((2, 3, n), dtype=bool)
    same[0, :, :12] = True  # three patients, not twelve images
    assert gap(*same, even, patients).margin > 1.5 * gap(*same, even, alone).margin
    assert gap(*np.ones((2, 3, n), dtype=bool), even, alone).margin > 1 / n  # all alike


def test_classes_count_alike_where_they_are_imbalanced() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    validation = Validation(labels, np.arange(100))
    assert validation.imbalanced
    assert not Validation(np.array([0, 0, 1]), np.arange(3)).imbalanced  # one image more
    assert not Validation(np.arange(100) % 2, np.arange(100)).imbalanced
    weights = validation.weights(balanced=True)
    assert weights.sum() == pytest.approx(1)
    large, small = np.zeros((2, 2, 100), dtype=bool)
    large[:, :90], small[:, 90:] = True, True
    assert gap(large, small, validation.weights(False), validation.groups).mean == pytest.approx(
        0.8
    )
    assert gap(large, small, weights, validation.groups).mean == pytest.approx(0)


# The table ---------------------------------------------------------------------------------------


def test_the_table_has_means_spreads_and_paired_differences() -> None:
    runs = []
    for seed, (low, high) in enumerate([(2, 5), (4, 6), (6, 9)]):
        runs += [result("pretrained", 20, seed, np.arange(10) < high)]
        runs += [result("scratch", 20, seed, np.arange(10) < low)]
    validation = Validation(np.arange(10) % 2, np.arange(10))
    found = gaps(runs, validation, ("pretrained", "scratch"))
    assert found[0].mean == pytest.approx((0.3 + 0.2 + 0.3) / 3)
    assert found[0].steps == 7
    row = table(runs, validation)[0]
    assert list(row)[:4] == ["labels", "steps", "scratch", "pretrained"]
    assert row["labels"] == "20 labels"
    assert row["scratch"] == "40.0 ± 20.0"
    assert row["pretrained"] == "66.7 ± 20.8"
    assert row["pretrained - scratch"] == "+26.7 ± 5.8"
    text = markdown([row])
    assert len({len(line) for line in text.splitlines()}) == 1
    runs.append(result("scratch", 20, 3, np.ones(10, dtype=bool)))  # its partner is not done
    assert gaps(runs, validation, ("pretrained", "scratch"))[0].seeds == 3


def test_training_that_was_too_short_is_said() -> None:
    short = [result("scratch", 20, 0, np.ones(10, dtype=bool), train_top1=0.5)]
    long = [result("pretrained", 20, 0, np.ones(10, dtype=bool), train_top1=0.99)]
    (note,) = notes_of([*short, *long], "{} labels".format)
    assert "7 steps were short" in note
    assert "scratch 50 %, pretrained 99 %" in note
    assert notes_of(long, "{} labels".format) == []
