"""Folders of data: images of classes, images with masks, images with boxes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def save(path: Path, pixels: Any) -> None:
    """Write pixels as the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def make_images(
    folder: Path, n: int, size: int | tuple[int, int] = 32, suffix: str = ".png"
) -> Path:
    """Write small smooth pictures, of a width and height."""
    width, height = (size, size) if isinstance(size, int) else size
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        y, x = np.mgrid[:height, :width] / max(width, height)
        waves = [np.sin(6 * (x * np.cos(a) + y * np.sin(a)) + a) for a in (i, i + 1, i + 2)]
        save(folder / f"{i:03d}{suffix}", 127 + 120 * np.stack(waves, axis=-1))
    return folder


def make_classes(root: Path, n: int = 10, names: str = "ab", **options: Any) -> Path:
    """Write a folder of pictures for each class, named by words or letters."""
    for name in names.split() if " " in names else names:
        make_images(root / name, n, **options)
    return root


def make_masks(root: Path, **splits: int) -> Path:
    """Write a red box on gray in each image, of the classes 3 and 4, and a border that is void."""
    for split, n in splits.items():
        for i in range(n):
            mask = np.full((40, 56), 3, np.uint8)
            mask[:4] = 9
            mask[8 + i : 28 + i, 4 * i + 4 : 4 * i + 24] = 4
            image = np.where(mask[..., None] == 4, (220, 20, 20), (90, 90, 90))
            save(root / split / "images" / f"{i}.png", image)
            save(root / split / "masks" / f"{i}.png", mask)
    said = {"classes": ["ground", "box"], "ignore_index": 9, "values": [3, 4]}
    said["palette_rgb"] = [[10, 20, 30], [250, 0, 0]]
    (root / "classes.json").write_text(json.dumps(said))
    return root


def write_coco(
    path: Path,
    images: list[tuple[Any, str]],
    objects: list[tuple[Any, int, list[float]]],
    size: tuple[int, int] = (40, 40),
    **more: Any,
) -> Path:
    """Write annotations: images as (id, name), objects as (image id, category id, box)."""
    width, height = size
    content = {
        "images": [
            {"id": i, "file_name": name, "width": width, "height": height} for i, name in images
        ],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": 7.0, "iscrowd": 0}
            for n, (i, c, box) in enumerate(objects)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def make_boxes(
    root: Path, size: tuple[int, int] = (64, 48), outlines: bool = False, **splits: int
) -> Path:
    """Write images with a bright square (class 3, cat) and a dark one (7, dog), as COCO says."""
    for split, n in splits.items():
        generator, names, boxes = np.random.default_rng(3), [], []
        for i in range(n):
            pixels = generator.integers(100, 150, (size[1], size[0], 3)).astype(np.uint8)
            for label, shade in ((3, 250), (7, 5)):
                x = int(generator.integers(0, size[0] // 2 - 20)) + (label == 7) * size[0] // 2
                y, side = int(generator.integers(0, size[1] - 20)), int(generator.integers(12, 20))
                pixels[y : y + side, x : x + side] = shade
                boxes.append((i, label, [x, y, side, side]))
            save(root / split / f"{i:03d}.png", pixels)
            names.append((i, f"{i:03d}.png"))
        file = write_coco(root / split / "annotations.json", names, boxes, size)  # type: ignore[arg-type]
        if outlines:
            content = json.loads(file.read_text())
            for entry in content["annotations"]:
                x, y, w, h = entry["bbox"]
                entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            file.write_text(json.dumps(content))
    return root
