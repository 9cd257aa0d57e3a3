"""Embeddings of a loader by every layer, against one layer of one batch at a time."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from simmim.evaluation.readout import embed_layers
from simmim.pretrain import SimMIM

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.fixture
def model() -> SimMIM:
    return SimMIM("vit_tiny_patch16_224", img_size=32, mask_patch_size=8, encoder_kwargs=TINY)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_every_layer_is_what_the_encoder_gives_by_itself(model: SimMIM, pooling: Any) -> None:
    images, labels = torch.randint(256, (5, 3, 32, 32)).byte(), torch.tensor([3, 1, 4, 1, 5])
    model.set_statistics([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    model.encoder.eval()  # one part in another mode than the rest
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    found, given = embed_layers(model, loader, pooling=pooling)
    assert found.keys() == {1, 2, 3}
    assert torch.equal(given, labels)
    assert model.training
    assert not model.encoder.training
    for layer, embeddings in found.items():
        with torch.no_grad():
            tokens = model.encoder.tokens(model.normalize(images), layer).flatten(2)
        expected = tokens.mean(2) if pooling == "mean" else tokens.amax(2)
        torch.testing.assert_close(embeddings, expected)
    some, _ = embed_layers(model, loader, [2], pooling=pooling)
    assert some.keys() == {2}
    torch.testing.assert_close(some[2], found[2])


def test_batches_of_ours_and_those_without_labels(model: SimMIM) -> None:
    images = torch.randint(256, (3, 3, 32, 32)).byte()
    ours, labels = embed_layers(model, [{"image": images, "label": torch.tensor([2, 0, 1])}])
    assert labels.tolist() == [2, 0, 1]
    alone, none = embed_layers(model, [{"image": images}])
    assert none.tolist() == [-1, -1, -1]
    torch.testing.assert_close(ours[1], alone[1])


def test_a_layer_that_there_is_not(model: SimMIM) -> None:
    with pytest.raises(ValueError, match=r"layer 4 of vit_tiny_patch16_224 does not exist: use 1"):
        embed_layers(model, [], 4)
