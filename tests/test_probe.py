"""kNN and linear probe: against scikit-learn, by hand, and at their edges."""

import time

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from simmim.evaluation.probe import effective_rank, fit_linear_probe, knn_scores, top1


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    features, labels = torch.from_numpy(x).float(), torch.from_numpy(y)
    return features[:1437], labels[:1437], features[1437:], labels[1437:]


def test_linear_probe_solves_scikit_learns_problem(
    digits: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    train, train_labels, held_out, labels = digits
    started = time.process_time()
    probe = fit_linear_probe(train, train_labels)
    assert time.process_time() - started < 5  # "seconds for 1,437 x 64 on one core"
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000, tol=1e-8))
    theirs.fit(train.numpy(), train_labels.numpy())
    expected = torch.from_numpy(theirs.predict_proba(held_out.numpy())).float()
    assert torch.allclose(probe(held_out).softmax(1), expected, atol=5e-3)
    accuracy = top1(probe(held_out), labels)
    assert accuracy == pytest.approx(theirs.score(held_out.numpy(), labels.numpy()), abs=0.003)


def test_linear_probe_is_deterministic_and_works_on_what_lightning_computes(
    digits: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    train, labels = digits[0][:200], digits[1][:200]
    first = fit_linear_probe(train, labels)
    with torch.inference_mode():
        second = fit_linear_probe(train * 1.0, labels + 0)
        assert torch.equal(first(train), second(train))
    assert not first.weight.requires_grad


def test_knn_votes_by_hand() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    votes = knn_scores(train, torch.tensor([0, 1, 1]), torch.tensor([[3.0, 4.0]]), k=2)
    # Cosines 0.6, 0.8, 0.8: the two nearest are both of class 1.
    assert votes.tolist() == [[0.0, pytest.approx(2 * np.exp(0.8 / 0.07), rel=1e-5)]]
    votes = knn_scores(train, torch.tensor([0, 1, 1]), torch.tensor([[3.0, 4.0]]), k=20)
    assert votes[0, 0].item() == pytest.approx(np.exp(0.6 / 0.07), rel=1e-5)  # k is capped at 3


def test_knn_is_the_same_in_chunks(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    train, train_labels, held_out, labels = digits
    votes = knn_scores(train, train_labels, held_out)
    small = knn_scores(train, train_labels, held_out, chunk=7)
    assert torch.allclose(votes, small, rtol=1e-4)
    assert top1(votes, labels) > 0.9  # raw pixels are good features for kNN here


def test_top1_counts() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert top1(scores, torch.tensor([1, 0, 0, 0])) == 0.75


def test_effective_rank_counts_directions() -> None:
    torch.manual_seed(0)
    line = torch.randn(50, 1) @ torch.randn(1, 8)
    assert effective_rank(line).item() == pytest.approx(1.0, abs=1e-2)
    assert 7 < effective_rank(torch.randn(2000, 8)).item() <= 8
    assert effective_rank(torch.ones(5, 8)).item() == 0
    assert effective_rank(torch.full((5, 8), float("nan"))).isnan()
