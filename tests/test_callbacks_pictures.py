"""Panels by their pixels, files by their names."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from callback_parts import DigitsData, MiniSimMIM, trainer
from simmim.callbacks import PredictionWriter, Reconstructions
from simmim.callbacks.pictures import cell_origin, draw_panel, safe_name, to_rgb

# The names that a folder from the wild really had, and pairs that fall together when cleaned.
AWKWARD = [
    "cats/1.jpg", "cats/1.png", "dogs/1.jpg", "-dash.jpg", "Same.jpg", "same.jpg", "[bracket]*.jpg",
    "_bracket__.jpg", "a" * 251 + ".jpg", "a" * 250 + "b.jpg", "comma,semi;.jpg", "emoji_🐈.jpg",
    "e\u0301.jpg", "\u00e9.jpg", "latin1_\udce9.jpg", "latin1_\udcea.jpg", "new\nline.jpg",
    "new\tline.jpg", "percent%20.jpg", "quote'\".jpg", "two.dots.tar.jpg", "with space.jpg",
    "zażółć_gęślą_画像.jpg", "../outside.jpg", "/abs/olute.jpg", "abs/olute.jpg", "x/.hidden.jpg",
]  # fmt: skip


def test_panel_has_every_pixel_in_its_place() -> None:
    torch.manual_seed(0)
    pictures = {name: torch.rand(3, 3, 16, 32) for name in ("original", "masked", "error")}
    panel = np.asarray(draw_panel(pictures, side=128))
    for column, tensor in enumerate(pictures.values()):
        for row, image in enumerate(tensor):
            left, top = cell_origin(row, column, (64, 128))
            cell = panel[top : top + 64, left : left + 128]
            expected = (image * 255).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(cell, expected.repeat(4, 0).repeat(4, 1))  # nearest, 4 x
            assert (panel[top - 1, left : left + 128] != expected[0, 0]).any()
    left, top = cell_origin(3, 3, (64, 128))
    assert panel.shape == (top, left, 3)
    assert (panel[-1] == 255).all()  # a gap all around
    assert (panel[:20] < 255).any()  # and captions above


def test_panel_shows_gray_many_channels_and_large_images() -> None:
    gray = torch.rand(1, 1, 128, 128)
    assert np.array_equal(to_rgb(gray)[..., 0], to_rgb(gray)[..., 2])
    many = torch.rand(1, 6, 4, 4)
    assert np.array_equal(to_rgb(many), to_rgb(many[:, :3]))
    assert np.array_equal(to_rgb(many[:, :2]), to_rgb(many[:, :1]))
    strange = torch.tensor([float("nan"), -1.0, 2.0, 0.5]).view(1, 1, 2, 2)
    assert to_rgb(strange)[0, ..., 0].tolist() == [[0, 0], [255, 128]]
    large = draw_panel({"original": torch.ones(1, 1, 2000, 1000)}, side=128)
    assert max(large.size) < 450
    assert draw_panel({"original": torch.ones(1, 1, 100, 7).bfloat16()}).height > 100


def test_names_are_safe_and_unlike_for_unlike_images() -> None:
    names = [safe_name(path) for path in AWKWARD]
    assert len(set(names)) == len(AWKWARD) - 1  # "/abs/olute.jpg" is a path below any root
    assert names[:3] == ["cats/1.jpg.png", "cats/1.png.png", "dogs/1.jpg.png"]
    for name in names:
        parts = name.split("/")
        assert all(len(os.fsencode(part)) <= 200 and part not in ("", ".", "..") for part in parts)
        assert not any(ord(c) < 32 or c in "\\:*?\"<>|'" for c in name)
        name.encode("utf-8")
    assert [safe_name(path) for path in AWKWARD] == names  # nothing but the path matters


@pytest.mark.parametrize("every", [1, 2, 0])
def test_panels_of_the_same_images_every_few_epochs(tmp_path: Path, every: int) -> None:
    data = DigitsData()
    options = {"max_epochs": 3, "limit_val_batches": 1, "limit_train_batches": 4}
    trainer(tmp_path, Reconstructions(every, num_images=4), **options).fit(MiniSimMIM(), data)
    found = sorted(path.name for path in tmp_path.glob("reconstructions/*"))
    expected = {0: [], 1: [0, 1, 2, 3], 2: [0, 2, 3]}[every]  # the last epoch always has one
    assert found == [f"epoch_{epoch:04d}.png" for epoch in expected]
    if every != 1:
        return
    panels = [np.asarray(Image.open(tmp_path / "reconstructions" / name)) for name in found]
    left, top = cell_origin(4, 2, (128, 128))
    assert np.array_equal(panels[0][:top, :left], panels[-1][:top, :left])  # original and masked
    left, top = cell_origin(0, 2, (128, 128))
    assert not np.array_equal(panels[0][top:, left:], panels[-1][top:, left:])  # it learns
    first, last = data.val.images[0, 0].numpy(), data.val.images[-1, 0].numpy()
    for row, image in ((0, first), (3, last)):  # spread over the data set
        left, top = cell_origin(row, 0, (128, 128))
        assert np.array_equal(panels[0][top : top + 128 : 16, left : left + 128 : 16, 0], image)


def test_a_full_disk_costs_the_picture_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "reconstructions").write_text("a file where the folder should be")
    fit = trainer(tmp_path, Reconstructions(1), max_epochs=1)
    with pytest.warns(UserWarning, match="no picture"):
        fit.fit(MiniSimMIM(), datamodule=DigitsData())
    assert fit.global_step == 8


def test_predictions_are_one_picture_an_image(tmp_path: Path) -> None:
    class Named(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(AWKWARD)

        def __getitem__(self, i: int) -> dict[str, Any]:
            image = torch.full((1, 8, 8), i, dtype=torch.uint8)
            return {"image": image, "index": torch.tensor(i), "path": AWKWARD[i]}

    predict = trainer(tmp_path, PredictionWriter())
    assert predict.predict(MiniSimMIM(), DataLoader(Named(), batch_size=4)) is None
    written = list((tmp_path / "predictions").rglob("*.png"))
    assert len(written) == len(AWKWARD)
    assert len({str(path).casefold() for path in written}) == len(AWKWARD)
    picture = np.asarray(Image.open(tmp_path / "predictions" / "dogs" / "1.jpg.png"))
    left, top = cell_origin(0, 0, (128, 128))
    assert (picture[top : top + 128, left : left + 128] == 2).all()


@pytest.mark.slow
def test_predictions_below_the_root_and_without_paths(tmp_path: Path) -> None:
    class WithRoot(DigitsData):
        root = "/data/photos"

        def predict_dataloader(self) -> DataLoader[Any]:
            def collate(samples: list[Any]) -> Any:
                batch = torch.utils.data.default_collate(samples)
                places = batch["index"].clamp_min(1)  # the first cannot be read: the next stands in
                return {**batch, "path": [f"/data/photos/x/{i}.jpg" for i in places]}

            return DataLoader(self.val, batch_size=5, collate_fn=collate)

    data = WithRoot(val=12)
    trainer(tmp_path, PredictionWriter()).predict(MiniSimMIM(), datamodule=data)
    written = {path.name for path in (tmp_path / "predictions" / "x").iterdir()}
    assert written == {f"{i}.jpg.png" for i in range(1, 12)}
    plain = trainer(tmp_path / "b", PredictionWriter())
    plain.predict(MiniSimMIM(), DataLoader(data.val, batch_size=5))
    assert len(list((tmp_path / "b" / "predictions").iterdir())) == 12
