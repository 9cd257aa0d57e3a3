"""The table of what is trained and scored on, its warnings and its refusal."""

import pytest

from simmim.data.summary import DataSummary, LeftOut, SplitSummary

CROWDS = LeftOut("objects", "they are crowds", 9, "3.png")


def summary(train: SplitSummary, val: SplitSummary, **options: object) -> DataSummary:
    given = {"unit": "objects", "classes": ["red", "blue"], "needs_labels": True, **options}
    return DataSummary("scenes", {"train": train, "val": val}, **given)  # type: ignore[arg-type]


def test_table_has_a_column_for_each_split_and_a_row_for_each_class() -> None:
    left_out = [LeftOut("files", "no reader", 2, "a.heic")]
    train = SplitSummary(1200, {"objects": 31}, [30, 1], left_out)
    table = summary(train, SplitSummary(8, {"objects": 2}, [2, 0])).table()
    rows = [line.split() for line in table.splitlines()]
    assert rows[1:6] == [
        ["train", "val"], ["images", "1,200", "8"], ["objects", "31", "2"],
        ["red", "30", "2"], ["blue", "1", "0"],
    ]  # fmt: skip
    assert table.endswith("train: 2 files left out: no reader (first: a.heic)")


def test_many_classes_are_summed_up() -> None:
    counts = list(range(1, 41))
    table = summary(
        SplitSummary(9, {}, counts),
        SplitSummary(3, {}, [0, *counts[1:]]),
        classes=[*map(str, counts)],
    ).table()
    rows = [line.split()[-2:] for line in table.splitlines()[-3:]]
    assert rows == [["40", "39"], ["1", "0"], ["40", "40"]]


def test_nothing_to_train_on_is_refused_with_the_reason() -> None:
    val = SplitSummary(3, {}, [3, 1])
    refused = summary(SplitSummary(8, {}, [0, 0], [CROWDS]), val)
    assert (refused.refusal() or "").endswith(f"in 'scenes': {CROWDS}")
    assert summary(SplitSummary(8, {}, [1, 0]), val).refusal() is None
    assert summary(SplitSummary(8), val, needs_labels=False).refusal() is None


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (SplitSummary(8, {}, [4, 4]), SplitSummary(3, {}, [1, 1]), []),
        (SplitSummary(8, {}, [4, 4]), SplitSummary(3, {}, [0, 0], [CROWDS]), ["scores nothing"]),
        (SplitSummary(8, {}, [4, 0]), SplitSummary(3, {}, [1, 1]), ["'blue', which cannot be"]),
        (SplitSummary(8, {}, [4, 4]), SplitSummary(3, {}, [0, 1]), ["'red', which is not scored"]),
        (SplitSummary(8, {}, [4, 4], [CROWDS]), SplitSummary(3, {}, [1, 1]), ["9 of the 17"]),
    ],
)
def test_warnings(train: SplitSummary, val: SplitSummary, words: list[str]) -> None:
    found = summary(train, val).warnings()
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))
