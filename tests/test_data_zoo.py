"""A folder of every kind of awkward file: each is read as a person would, or named."""

import os
import struct
import time
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from simmim.data import ImageFolderData
from simmim.data.decode import UnreadableImage, read_image
from simmim.data.scans import Intensity, decode_deep_png
from support import exhaustive
from support.commands import QUIET, SMALL_SIMMIM
from support.files import encoded, npy
from support.folders import make_images
from support.processes import said, start_command

MEMORY = 4 * 2**30  # of a run and all its workers
SIDE = 48


def picture(width: int = 64, height: int = SIDE) -> Image.Image:
    """Left dark, right bright, a red disc: whoever turns or cuts it is found out."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, 255 - x * 255 // width], axis=-1)
    pixels[(x - width // 4) ** 2 + (y - height // 4) ** 2 < 60] = (250, 10, 10)
    return Image.fromarray(pixels.astype(np.uint8))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG by hand, also one that no library writes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, part in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(part)) + name + part
        data += struct.pack(">I", zlib.crc32(name + part))
    return data


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits, each row with the filter that subtracts the pixel to the left."""
    height, width, chans = values.shape
    raw = values.astype(">u2").view(np.uint8).reshape(height, -1)
    rows = raw.copy()
    rows[:, 2 * chans :] -= raw[:, : -2 * chans]
    lines = b"".join(b"\1" + row.tobytes() for row in rows)
    return png(width, height, 16, {2: 4, 3: 2, 4: 6}[chans], lines)


def deep(high: int = 4000) -> np.ndarray:
    return (np.asarray(picture()).astype(np.uint32) * high // 255).astype(np.uint16)


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """Let a JPEG's header claim another size."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


@cache
def odd() -> dict[str, bytes]:
    """Files that are unusual, and right."""
    scene = picture()
    others = [Image.new("RGB", scene.size, colour) for colour in ("lime", "blue")]
    frames: dict[str, Any] = {"save_all": True, "append_images": others}
    jpeg = encoded(scene, "JPEG", quality=95)
    nonsense = b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff"
    return {
        "cmyk.jpg": encoded(scene.convert("CMYK"), "JPEG", quality=95),
        "bad_exif.jpg": encoded(scene, "JPEG", exif=nonsense),
        "tail.jpg": jpeg + bytes(range(256)) * 9,
        "twice.jpg": jpeg + jpeg,
        "rgb16.png": png16(deep()),
        "animated.gif": encoded(scene, "GIF", **frames),
        "animated.png": encoded(scene, "PNG", **frames),
        "animated.webp": encoded(scene, "WEBP", **frames),
        "pages.tif": encoded(scene, "TIFF", **frames),
        "lzw.tif": encoded(scene, "TIFF", compression="tiff_lzw"),
        "one.png": encoded(Image.new("RGB", (1, 1), "teal"), "PNG"),
        "one.jpg": encoded(Image.new("RGB", (1, 1), "teal"), "JPEG"),
        "wide.png": encoded(picture(3000, 1), "PNG"),
        "tall.jpg": encoded(picture(1, 3000), "JPEG"),
        "large.jpg": encoded(picture(400, 300).resize((4000, 3000)), "JPEG", quality=30),
        "png.jpg": encoded(scene, "PNG"),
        "jpeg.png": jpeg,
        "UPPER.JPG": jpeg,
        "array.npy": npy(deep()),
        "  spaces, commas;.jpg": jpeg,
        "画像🐈.jpg": jpeg,
        "[glob]%20'.jpg": jpeg,
    }


@cache
def bad() -> dict[str, tuple[bytes, str]]:
    """Files that are damaged, or no images, and what is said of each."""
    noise = Image.effect_noise((160, 120), 60).convert("RGB")
    jpeg, whole = encoded(noise, "JPEG"), encoded(noise, "PNG")
    inks = encoded(noise.convert("CMYK"), "JPEG")
    rubbish = np.random.default_rng(2).bytes(300)
    half, quarter = len(jpeg) // 2, len(inks) // 4
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    webp, tiff = encoded(noise, "WEBP"), encoded(noise, "TIFF", compression="tiff_lzw")
    return {
        "empty.jpg": (b"", "the file is empty"),
        "zeros.jpg": (bytes(5000), "nothing but zeros"),
        "text.jpg": (b"<html>not found</html>", "it is no image"),
        "random.png": (rubbish, "it is no image"),
        "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        "half.jpg": (jpeg[:half], "Premature end of JPEG"),
        "no_end.jpg": (jpeg[:-2], "Premature end of JPEG"),
        "head.jpg": (jpeg[:40], "truncated|Truncated"),
        "middle.jpg": (jpeg[:half] + rubbish + jpeg[half + 300 :], "JPEG|marker|Huffman"),
        "inks.jpg": (inks[:quarter] + rubbish + inks[quarter + 300 :], "JPEG|marker|Huffman"),
        "half.png": (whole[: len(whole) // 2], "truncated"),
        "sum.png": (bytes(flipped), "broken|data stream"),
        "half.webp": (webp[: len(webp) // 2], "decode"),
        "half.tif": (tiff[: len(tiff) // 2], ""),
        "half.gif": (encoded(noise, "GIF")[:3000], "truncated"),
        "short.npy": (npy(deep())[:-9], "too short"),
        "code.npy": (npy(np.array([{"run": "me"}])), "is no image"),
        "line.npy": (npy(np.zeros(5)), "is no image"),
        "bomb.png": (png(60_000, 60_000, 8, 2, b"\0" * 64), "claims far more than 89,478,485"),
        "bomb.jpg": (with_size(jpeg, 65_500, 65_500), "claims 65500 x 65500 pixels"),
        "big.jpg": (
            with_size(jpeg, 9_400, 9_400),
            "claims 9400 x 9400 pixels, for which it is too short",
        ),
        "bomb.npy": (
            npy(np.zeros((9, 9))).replace(b"(9, 9), }    ", b"(99999, 9999), }"),
            "claims|short|ead",
        ),
        "no_height.jpg": (with_size(jpeg, 160, 0), "it is no image"),
        "no_width.png": (png(0, 9, 8, 2, b""), "it is no image"),
    }


@pytest.mark.parametrize("name", odd())
def test_odd_files_look_like_their_picture(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(odd()[name])
    image = read_image(str(tmp_path / name), 3, Intensity((0, 100)))
    unit = image.float() / 255 if image.dtype == torch.uint8 else image
    if name in ("rgb16.png", "array.npy"):
        assert image.dtype == torch.float32
    if min(unit.shape[1:]) == 1 or "large" in name:
        assert unit.shape[1:] in {(1, 1), (1, 3000), (3000, 1), (3000, 4000)}
        assert 0.15 < unit.mean() < 0.7
        return
    wanted = torch.from_numpy(np.asarray(picture()).copy()).permute(2, 0, 1).float() / 255
    assert unit.shape == wanted.shape
    assert (unit - wanted).abs().mean() < 0.02


@pytest.mark.parametrize("name", bad())
def test_bad_files_are_named(tmp_path: Path, name: str) -> None:
    data, reason = bad()[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnreadableImage, match=rf"{name}' cannot be read: .*({reason})"):
        read_image(str(tmp_path / name), 3, Intensity())


@pytest.mark.parametrize("chans", [2, 3, 4])
def test_colour_of_16_bits_keeps_them(chans: int) -> None:
    values = np.random.default_rng(0).integers(0, 4000, (20, 30, chans), dtype=np.uint16)
    assert np.array_equal(decode_deep_png(png16(values)), values)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A folder of all of them beside good ones, and the names of those that cannot be read."""
    folder = tmp_path_factory.mktemp("zoo") / "zoo"
    make_images(folder / "photos", 40, size=SIDE)
    for place, files in (("odd", odd()), ("bad", {n: data for n, (data, _) in bad().items()})):
        (folder / place).mkdir()
        for name, data in files.items():
            (folder / place / name).write_bytes(data)
    enormous = picture().resize((12_000, 9_000), Image.Resampling.NEAREST)  # a telephone's
    (folder / "odd" / "enormous.jpg").write_bytes(encoded(enormous, "JPEG"))
    names = {f"bad/{name}" for name in bad()}
    if os.name == "posix":
        (folder / "bad" / "nowhere.jpg").symlink_to("missing.jpg")
        (folder / "bad" / "circle.jpg").symlink_to("circle.jpg")
        os.mkfifo(folder / "bad" / "pipe.jpg")  # left out: to open it would wait for ever
        (folder / "odd" / "new\nline.jpg").write_bytes(odd()["tail.jpg"])
        names |= {"bad/nowhere.jpg", "bad/circle.jpg"}
    (folder / "bad" / "folder.jpg").mkdir()
    (folder / "empty").mkdir()
    (folder / "odd" / "._mac.jpg").write_bytes(b"\0\5\x16\7")
    (folder / "odd" / "Thumbs.db").write_bytes(b"\xd0\xcf")
    return folder, names


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, exhaustive(0)])
def test_every_entry_is_read_or_marked(zoo: tuple[Path, set[str]], workers: int) -> None:
    root, names = zoo
    module = ImageFolderData(
        str(root), img_size=32, batch_size=8, num_workers=workers, val_fraction=0.0
    )
    module.setup("predict")
    data = module.sets["predict"]
    seen = [path for batch in module.predict_dataloader() for path in batch["path"]]
    assert {data.name(i) for i in data.unreadable.nonzero()[:, 0].tolist()} == names
    assert len(set(seen)) == len(data) - len(names)


def memory(process: psutil.Process) -> Iterator[int]:
    """What is resident of a process and its children; pages that several share count once."""
    try:
        for one in [process, *process.children(recursive=True)]:
            info: Any = one.memory_full_info()
            yield getattr(info, "pss", info.uss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile
        return


def fit(root: Path, *options: str) -> list[str]:
    """The command line of an epoch."""
    quiet = [option for option in QUIET if "num_workers" not in option]
    words = ["pretrain", "fit", f"--data.root={root}", *SMALL_SIMMIM, "--probe.every_n_epochs=0"]
    words += [*quiet, *options]
    return [*words, "--trainer.max_epochs=1", "--data.batch_size=8", "--data.val_fraction=0.2"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", [2, 0])
def test_a_run_on_the_mix_goes_on(zoo: tuple[Path, set[str]], workdir: Path, workers: int) -> None:
    root, names = zoo
    process = start_command(*fit(root, f"--data.num_workers={workers}"))
    peak, deadline = 0, time.monotonic() + 300
    while process.is_alive():
        assert time.monotonic() < deadline, "it hangs"
        peak = max(peak, sum(memory(psutil.Process(process.pid))))
        time.sleep(0.05)
    assert process.exitcode == 0, said()
    assert 2**26 < peak < MEMORY
    assert "could not be read and were replaced by others: see" in said()
    (listed,) = workdir.glob("runs/*/*/bad_files.txt")
    lines = [line.split("\t") for line in listed.read_text("utf-8").splitlines()]
    below = [os.path.relpath(path, root).replace(os.sep, "/") for path, _ in lines]
    assert set(below) <= names
    assert len(below) == len(set(below)) >= 0.8 * len(names)  # an epoch leaves a few images out
    assert all(reason and "second time" not in reason for _, reason in lines)
