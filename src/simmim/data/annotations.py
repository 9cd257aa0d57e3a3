"""Objects in images, as people keep them: COCO's json, and the xml of Pascal VOC."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from faster_coco_eval.core import mask as coco_mask

from simmim.data.summary import LeftOut

Corners = tuple[float, float, float, float]  # left, top, right, bottom


# Why an object is not learned, in the order of their codes: "" and "clipped" are. What is ignored
# is in the picture, but counts neither for nor against a detector; the rest might not be there.
CLIPPED, CROWD, DIFFICULT = "clipped", "iscrowd", "difficult"
SHARES = "box within 0..1, so in shares of the image: multiply it by width and height"
NO_AREA, OUTSIDE = "box without any area", "box outside of its image"
NO_BOX, NO_CATEGORY = "no box", "no known category"
REASONS = ("", CLIPPED, CROWD, DIFFICULT, SHARES, NO_AREA, OUTSIDE, NO_BOX, NO_CATEGORY)
LEARNED, SHOWN = 1, 3  # the last codes of what is learned, and of what is in the picture

# Why an object has no mask.
NO_OUTLINE, FEW_POINTS = "no segmentation", "polygon of fewer than 3 points, or without any area"
ODD = "polygon with an odd number of coordinates"
NO_NUMBERS = "polygon of other things than numbers"
ELSEWHERE, WRONG_RUNS = "polygon outside of its box", "run lengths that do not fit the image"
OUTLINES = ("", NO_OUTLINE, FEW_POINTS, ODD, NO_NUMBERS, ELSEWHERE, WRONG_RUNS)


class Found(NamedTuple):
    """An object of an image, as a file describes it.

    Attributes:
        number: Its id in the file, or else its place there.
        box: Left, top, right and bottom edge, in pixels.
        label: Its class, counted from 0.
        reason: Why it is not learned, one of REASONS.
        area: In square pixels.
        outline: COCO's polygons or run lengths, or None.
        no_outline: Why there is none, one of OUTLINES.
    """

    number: int
    box: Corners = (0.0, 0.0, 0.0, 0.0)
    label: int = 0
    reason: str = ""
    area: float = 0.0
    outline: Any = None
    no_outline: str = NO_OUTLINE


@dataclass
class Table:
    """What annotations say of images.

    Attributes:
        source: The file or folder.
        classes: Names of the classes.
        numbers: Their ids in the file: COCO's need not be contiguous.
        names: Path of each image, as the file says it.
        ids: Of each image, in the file.
        sizes: (height, width) of each image, where the file says it.
        objects: Of each image, also those that are not learned.
        left_out: What belongs to no image of the table.
    """

    source: str
    classes: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)
    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    objects: list[list[Found]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def add_image(self, name: str, identity: Any, size: tuple[int, int] | None) -> int:
        """Add an image without objects, and return its row."""
        self.names.append(name)
        self.ids.append(identity)
        self.sizes.append(size)
        self.objects.append([])
        return len(self.names) - 1

    def add_object(self, row: int, found: Found) -> None:
        """Add an object, clipped to its image; say what is wrong with its box."""
        left, top, right, bottom = found.box
        if found.reason in (NO_BOX, NO_CATEGORY):
            pass
        elif right <= left or bottom <= top:
            found = found._replace(reason=NO_AREA)
        elif min(left, top) >= 0 and max(right, bottom) <= 1:
            found = found._replace(reason=SHARES)
        elif (size := self.sizes[row]) is not None:
            height, width = size
            box = max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)
            if box[2] <= box[0] or box[3] <= box[1]:
                found = found._replace(reason=OUTSIDE)
            elif max(abs(a - b) for a, b in zip(box, found.box, strict=True)) > 1:
                found = found._replace(reason=found.reason or CLIPPED)
            found = found._replace(box=box)
        self.objects[row].append(found)


def count_left_out(what: str, examples: Mapping[str, Sequence[object]]) -> list[LeftOut]:
    """Count what was left out, by reason."""
    return [LeftOut(what, why, len(each), str(each[0])) for why, each in examples.items()]


# COCO --------------------------------------------------------------------------------------------


def read_coco(path: str) -> Table:
    """Read annotations in COCO's format (https://cocodataset.org/#format-data).

    Raises:
        ValueError: If it is no such file; the message says what is wrong, and where.
    """
    content = _load(path)
    table = Table(path)
    rows = _add_images(table, _entries(content, "images", path))
    annotations = _entries(content, "annotations", path)
    labels = _add_classes(table, content, annotations)
    unlisted = []
    for i, entry in enumerate(annotations):
        number = _key(entry, "id")
        row, label = rows.get(_key(entry, "image_id")), labels.get(_key(entry, "category_id"))
        if row is None:
            unlisted.append(f"annotation {entry.get('id', i)}")
            continue
        found = Found(number if isinstance(number, int) and 0 <= number < 2**63 else i)
        if label is None or (box := _coco_box(entry)) is None:
            table.add_object(row, found._replace(reason=NO_CATEGORY if label is None else NO_BOX))
            continue
        outline, why = read_outline(entry.get("segmentation"), box, table.sizes[row])
        if isinstance(outline, dict) and table.sizes[row] is None:
            table.sizes[row] = (outline["size"][0], outline["size"][1])
        area = _number(entry.get("area")) or (box[2] - box[0]) * (box[3] - box[1])
        reason = CROWD if _is_yes(entry.get("iscrowd")) else ""
        table.add_object(row, Found(found.number, box, label, reason, area, outline, why))
    if unlisted:
        reason = f"of images that {path} does not list"
        table.left_out.append(LeftOut("objects", reason, len(unlisted), unlisted[0]))
    return table


def _load(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(
            f"annotations {path} cannot be read: {(error.strerror or str(error)).lower()}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 5,000 brackets
        raise ValueError(f"annotations {path} are no valid json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"annotations {path} hold a {type(content).__name__}: COCO's format is a table with "
            "the lists images, annotations and categories"
        )
    return content


def _entries(content: Mapping[str, Any], key: str, path: str) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"annotations {path} have no list {key!r}: COCO's format has the lists images, "
            "annotations and categories"
        )
    return entries


def _add_images(table: Table, entries: list[dict[str, Any]]) -> dict[Any, int]:
    """Add the images, each file once, and say which row each id means."""
    rows: dict[Any, int] = {}
    by_name: dict[str, int] = {}
    faults: dict[str, list[object]] = {}
    for i, entry in enumerate(entries):
        name, identity = entry.get("file_name"), _key(entry, "id")
        if not isinstance(name, str) or not name or identity is None:
            faults.setdefault("no id or no file_name", []).append(f"number {i}")
            continue
        if identity in rows and table.names[rows[identity]] != name:
            faults.setdefault("an id that another image has", []).append(name)
            continue
        if name not in by_name:
            height, width = _number(entry.get("height")), _number(entry.get("width"))
            size = (int(height), int(width)) if height and width else None
            by_name[name] = table.add_image(name, entry["id"], size)
        rows[identity] = by_name[name]
    table.left_out += count_left_out("images", faults)
    return rows


def _add_classes(
    table: Table, content: Mapping[str, Any], annotations: list[dict[str, Any]]
) -> dict[Any, int]:
    """Name the classes in the order of their ids, and say which one each id means."""
    if "categories" in content:
        entries = _entries(content, "categories", table.source)
        named = {_key(e, "id"): str(e.get("name", e.get("id"))) for e in entries}
    else:
        named = {_key(e, "category_id"): str(e.get("category_id")) for e in annotations}
    named.pop(None, None)
    labels = {}
    for identity in sorted(named, key=lambda key: (isinstance(key, str), key)):
        name = named[identity]
        if name not in table.classes:  # Roboflow lists some names twice
            table.classes.append(name)
            table.numbers.append(identity if isinstance(identity, int) else len(table.classes))
        labels[identity] = table.classes.index(name)
    return labels


def _key(entry: Mapping[str, Any], name: str) -> int | str | None:
    """An id; one that is written as text, or as 1.0, is the number that it spells."""
    value = entry.get(name)
    if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9]\d{0,18})(\.0+)?", value.strip()):
        return int(value.strip().partition(".")[0])
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) else None


def _is_yes(value: object) -> bool:
    """Whether a field says yes: true, yes, or a number other than 0, also as text."""
    if isinstance(value, str) and value.strip().lower() in ("true", "t", "yes", "y"):
        return True
    return bool(_number(value))


def _number(value: object) -> float | None:
    """A finite number; some tools write it as text."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _coco_box(entry: Mapping[str, Any]) -> Corners | None:
    """The box (left, top, width, height in the file), or else that of the polygons."""
    box = entry.get("bbox")
    numbers = [_number(value) for value in box] if isinstance(box, list) else []
    if len(numbers) == 4 and None not in numbers:
        left, top, width, height = (value or 0.0 for value in numbers)
        return left, top, left + width, top + height
    polygons, _ = _polygons(entry.get("segmentation"))
    if not polygons:
        return None
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def read_outline(segmentation: Any, box: Corners, size: tuple[int, int] | None) -> tuple[Any, str]:
    """Read COCO's polygons or run lengths.

    Args:
        segmentation: As the file has it; one polygon need not lie in a list of its own, and points
            may be pairs.
        box: Of the object.
        size: Height and width of the image, where they are known.

    Returns:
        The outline, and why there is none.
    """
    if isinstance(segmentation, dict):
        runs = _run_lengths(segmentation, size)
        return runs, "" if runs else WRONG_RUNS
    polygons, why = _polygons(segmentation)
    if not polygons:
        return None, why
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    inside = min(xs) < box[2] and max(xs) > box[0] and min(ys) < box[3] and max(ys) > box[1]
    return (polygons, "") if inside else (None, ELSEWHERE)


def _polygons(segmentation: Any) -> tuple[list[list[float]], str]:
    """Polygons that enclose something; if one is no polygon at all, none, and why."""
    if not isinstance(segmentation, list) or not segmentation:
        return [], NO_OUTLINE
    flat = not isinstance(segmentation[0], list)
    pairs = not flat and all(isinstance(p, list) and len(p) == 2 for p in segmentation)
    polygons, why = [], FEW_POINTS
    for polygon in [segmentation] if flat or pairs else segmentation:
        try:
            points = np.asarray(polygon, np.float64).ravel()
        except (TypeError, ValueError, OverflowError):
            return [], NO_NUMBERS
        if not (np.abs(points) < 1e6).all():  # nor is NaN
            return [], NO_NUMBERS
        if len(points) % 2:
            return [], ODD
        x, y = points[::2], points[1::2]
        if len(x) >= 3 and abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) > 0:
            polygons.append(points.tolist())
    return polygons, "" if polygons else why


def _run_lengths(segmentation: dict[str, Any], size: tuple[int, int] | None) -> Any:
    """Run lengths of a mask of this size that shows something; None where there is no such mask."""
    try:
        height, width = (int(side) for side in segmentation["size"])
        counts = segmentation["counts"]
        runs = {"size": [height, width], "counts": counts}
        if isinstance(counts, list):
            runs["counts"] = [int(count) for count in counts]
        if size not in (None, (height, width)) or not decode_runs(runs).any():
            return None
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, MemoryError):
        return None
    return runs


def decode_runs(runs: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """Draw run lengths, compressed or not: uint8, (H, W)."""
    if isinstance(runs["counts"], list):
        runs = coco_mask.frPyObjects(runs, *runs["size"])
    return np.asarray(coco_mask.decode(runs), np.uint8)


# Pascal VOC --------------------------------------------------------------------------------------


def read_voc(source: str, files: Mapping[str, str]) -> Table:
    """Read annotations in Pascal VOC's format; difficult objects are ignored.

    VOC counts pixels from 1, and the last one belongs to the box: 1 to 10 are the edges 0 and 10.

    Args:
        source: What to call them.
        files: Path of each image -> that of its xml file.

    Raises:
        ValueError: If a file is no such xml.
    """
    table = Table(source)
    roots = {name: _parse(path) for name, path in files.items()}
    objects = {name: list(root.iter("object")) for name, root in roots.items()}
    table.classes = sorted({_text(o, "name") for found in objects.values() for o in found} - {""})
    table.numbers = [i + 1 for i in range(len(table.classes))]
    labels = {name: i for i, name in enumerate(table.classes)}
    for i, (name, root) in enumerate(roots.items()):
        height, width = (_number(_text(root, f"size/{side}")) for side in ("height", "width"))
        row = table.add_image(name, i + 1, (int(height), int(width)) if height and width else None)
        for number, entry in enumerate(objects[name]):
            box, label = _voc_box(entry), labels.get(_text(entry, "name"))
            if box is None or label is None:
                reason = NO_CATEGORY if label is None else NO_BOX
                table.add_object(row, Found(number, reason=reason))
                continue
            reason = DIFFICULT if _is_yes(_text(entry, "difficult")) else ""
            area = (box[2] - box[0]) * (box[3] - box[1])
            table.add_object(row, Found(number, box, label, reason, area))
    return table


def _parse(path: str) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:  # of the encoding
        raise ValueError(f"annotations {path} are no valid xml: {error}") from error


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _voc_box(entry: ElementTree.Element) -> Corners | None:
    edges = [_number(_text(entry, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax")]
    if None in edges:
        return None
    left, top, right, bottom = (edge or 0.0 for edge in edges)
    if left >= right or top >= bottom:  # no box, which another pixel would not make one
        return left, top, right, bottom
    return max(left - 1, 0.0), max(top - 1, 0.0), right, bottom
