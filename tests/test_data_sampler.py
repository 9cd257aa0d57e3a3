"""Order: a permutation by (seed, epoch), the same global batches for any number of processes."""

from itertools import chain, product

import pytest
from torch.utils.data import DataLoader

from simmim.data.draws import permutation
from simmim.data.resume import limited, position
from simmim.data.sampler import (
    EpochSampler,
    EvenSampler,
    choose,
    even_batch_size,
)


def epoch_of(n: int, batch_size: int, replicas: int, epoch: int = 0, seed: int = 0) -> list:
    """The epoch's global batches, each as a list of indices."""
    batches = n // (batch_size * replicas)
    shares = []
    for rank in range(replicas):
        sampler = EpochSampler(range(n), batch_size, batches, seed, replicas, rank)
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert len(pairs) == len(sampler) == batches * batch_size
        assert {e for e, _ in pairs} == {epoch}
        shares.append([i for _, i in pairs])
    return [
        [i for share in shares for i in share[t * batch_size : (t + 1) * batch_size]]
        for t in range(batches)
    ]


def test_an_epoch_is_its_permutation() -> None:
    assert list(chain(*epoch_of(20, 4, 1, epoch=3))) == permutation(20, 0, 3).tolist()
    assert epoch_of(20, 4, 1, epoch=3) != epoch_of(20, 4, 1, epoch=4)
    assert epoch_of(20, 4, 1, seed=1) != epoch_of(20, 4, 1, seed=2)
    assert len(set(chain(*epoch_of(25, 4, 2)))) == 24  # what fills no batch is left out
    assert [next(iter(sampler))[0] for sampler in [EpochSampler(range(8), 4, 2)] * 3] == [0, 1, 2]
    whole = EpochSampler(range(20), 4, 5)
    whole.set_epoch(2)
    later = EpochSampler(range(20), 4, 5, start=lambda: (2, 3))
    assert list(later) == list(whole)[12:]
    assert len(later) == 20  # as Lightning counts: the batches of an epoch


def test_global_batches_do_not_depend_on_the_number_of_processes() -> None:
    for batch_size, replicas in ((6, 2), (4, 3), (1, 12)):
        assert epoch_of(100, batch_size, replicas) == epoch_of(100, 12, 1)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_evaluation_sees_each_once_in_as_many_batches(batch_size: int) -> None:
    for n, replicas in product((1, 2, 5, 16, 17, 100), (1, 2, 3, 8)):
        if replicas > n:
            continue
        size = even_batch_size(n, batch_size, replicas)
        samplers = [EvenSampler(range(n), replicas, rank) for rank in range(replicas)]
        loaders = [DataLoader(range(n), batch_size=size, sampler=s) for s in samplers]
        assert len({len(loader) for loader in loaders}) == 1
        assert all(len(list(loader)) == len(loader) > 0 for loader in loaders)
        assert sorted(i for sampler in samplers for i in sampler) == list(range(n))
        if batch_size > 2 and n >= 2 * replicas:
            assert size <= batch_size
    assert list(EvenSampler(range(5), 2, 1)) == [1, 3]  # in the folder's order


@pytest.mark.parametrize(
    ("steps", "batches", "accumulation", "place"),
    [
        (0, 7, 1, (0, 0)),
        (6, 7, 1, (0, 6)),
        (7, 7, 1, (1, 0)),
        (17, 7, 1, (2, 3)),
        (4, 6, 2, (1, 2)),
        (4, 7, 2, (1, 0)),  # 2 + 2 + 2 + 1 batches are four steps
        (5, 5, 3, (2, 3)),
    ],
)
def test_the_place_follows_from_the_steps(
    steps: int, batches: int, accumulation: int, place: tuple[int, int]
) -> None:
    assert position(steps, batches, accumulation) == place


def test_limits_are_lightnings() -> None:
    assert [limited(10, limit) for limit in (1.0, 0.5, 0.25, 4, 40)] == [10, 5, 2, 4, 10]


def test_a_choice_is_always_the_same() -> None:
    assert choose(5, None).tolist() == choose(5, 9).tolist() == [0, 1, 2, 3, 4]
    chosen = choose(1000, 50).tolist()
    assert chosen == sorted(set(chosen)) == choose(1000, 50).tolist()
    assert set(chosen) <= set(choose(1000, 100).tolist())
