"""What frozen features are worth: kNN and a linear probe, as plain functions on features.

Both are deterministic, and run where the features lie.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_scores(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 256,
) -> Tensor:
    """Let the nearest training samples vote, as DINO does.

    Weighted vote of the k nearest by cosine similarity s, with weights exp(s / temperature);
    k = 20 and 0.07 are DINO's (arXiv:2104.14294, section 4.1 and `eval_knn.py`).

    Args:
        train_features: (N, D).
        train_labels: Classes from 0, int64, (N,).
        features: (M, D).
        k: Neighbours; no more than there are training samples.
        temperature: Of the votes.
        chunk: Rows of `features` that are compared at a time: bounds the memory.

    Returns:
        The votes, float32, (M, classes).
    """
    train = F.normalize(train_features.float(), dim=1)
    classes = int(train_labels.max()) + 1
    votes = []
    for part in F.normalize(features.float(), dim=1).split(chunk):
        similarity, nearest = (part @ train.T).topk(min(k, len(train)))
        weights = (similarity / temperature).exp()
        hits = F.one_hot(train_labels[nearest], classes).float()  # (chunk, k, classes)
        votes.append(torch.einsum("mk,mkc->mc", weights, hits))
    return torch.cat(votes)


class LinearProbe(NamedTuple):
    """A linear classifier on standardised features; `probe(features)` gives logits."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Classify features, (M, D) -> (M, classes)."""
        return (features.float() - self.mean) / self.scale @ self.weight.T + self.bias


@torch.inference_mode(False)  # what Lightning computes while it validates cannot be differentiated
def fit_linear_probe(
    features: Tensor, labels: Tensor, l2: float = 1.0, max_iter: int = 200
) -> LinearProbe:
    """Fit multinomial logistic regression on standardised features by L-BFGS.

    The same problem as scikit-learn's `LogisticRegression(C=1 / l2)` behind a `StandardScaler`,
    starting from zero, on whichever device the features lie.

    Args:
        features: (N, D).
        labels: Classes from 0, int64, (N,).
        l2: Weight of half the squared norm of the weights, beside the summed cross-entropy.
        max_iter: Iterations of L-BFGS.

    Returns:
        The classifier.
    """
    features, labels = features.clone().float(), labels.clone()
    std, mean = torch.std_mean(features, dim=0, correction=0)
    probe = LinearProbe(
        mean=mean,
        scale=torch.where(std > 1e-12, std, 1),  # a constant feature says nothing; keep it finite
        weight=features.new_zeros(int(labels.max()) + 1, features.shape[1], requires_grad=True),
        bias=features.new_zeros(int(labels.max()) + 1, requires_grad=True),
    )
    optimizer = torch.optim.LBFGS(
        [probe.weight, probe.bias],
        max_iter=max_iter,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = l2 / 2 * probe.weight.square().sum() / len(features)
        loss = F.cross_entropy(probe(features), labels) + penalty
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return probe._replace(weight=probe.weight.detach(), bias=probe.bias.detach())


def top1(scores: Tensor, labels: Tensor) -> float:
    """Share of the samples whose highest score is at their label, 0 to 1."""
    return int((scores.argmax(1) == labels).sum()) / len(labels)


def effective_rank(features: Tensor) -> Tensor:
    """Count the directions that features of different samples really use.

    The exponential of the entropy of the normalised singular values of the centred features (Roy
    and Vetterli, 2007): 1 where all samples lie on a line, at most min(N - 1, D).

    Args:
        features: (N, D).

    Returns:
        A scalar; 0 where all samples have the same features, nan where a feature is not finite.
    """
    if not features.isfinite().all():
        return features.new_tensor(float("nan"))
    features = features.float()
    values = torch.linalg.svdvals(features - features.mean(0))
    share = values / values.sum().clamp_min(1e-30)
    rank = torch.special.entr(share).sum().exp()
    return torch.where(values.norm() > 1e-6 * features.norm(), rank, 0.0)  # below: rounding
