"""Objects in images, as people keep them: COCO's json, and the xml of Pascal VOC."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

Corners = tuple[float, float, float, float]  # left, top, right, bottom


class Found(NamedTuple):
    """An object of an image, as a file describes it.

    Attributes:
        box: Left, top, right and bottom edge, in pixels.
        label: Its class, counted from 0.
        ignored: Whether it counts neither for nor against a detector: a crowd (COCO), or difficult
            (VOC).
        area: In square pixels.
        outline: COCO's polygons or run lengths, or None.
    """

    box: Corners
    label: int
    ignored: bool
    area: float
    outline: Any = None


class Faults:
    """What is wrong in annotations: counted by kind, with the first of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, kind: str, example: object, count: int = 1) -> None:
        """Count a fault, such as "boxes without any area were left out"."""
        self.counts[kind] += count
        self.first.setdefault(kind, str(example))

    def tell(self, source: str) -> list[str]:
        """Say it all in one line, if there is something to say."""
        said = [f"{n} {kind} (first: {self.first[kind]})" for kind, n in self.counts.items()]
        return [f"{source}: {'; '.join(said)}"] if said else []


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
        objects: Of each image.
        faults: What was wrong.
    """

    source: str
    classes: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)
    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    objects: list[list[Found]] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)

    @property
    def has_outlines(self) -> bool:
        """Whether every object that counts has an outline, and there is one."""
        counted = [found for objects in self.objects for found in objects if not found.ignored]
        return bool(counted) and all(found.outline is not None for found in counted)

    def add_image(self, name: str, identity: Any, size: tuple[int, int] | None) -> int:
        """Add an image without objects, and return its row."""
        self.names.append(name)
        self.ids.append(identity)
        self.sizes.append(size)
        self.objects.append([])
        return len(self.names) - 1

    def add_object(self, row: int, found: Found) -> None:
        """Add an object: clipped to its image, or left out if nothing of it is there."""
        name, size = self.names[row], self.sizes[row]
        left, top, right, bottom = found.box
        if right <= left or bottom <= top:
            self.faults.add("boxes without any area were left out", name)
            return
        if size is not None:
            height, width = size
            clipped = max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)
            if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
                self.faults.add("boxes outside of their image were left out", name)
                return
            if max(abs(a - b) for a, b in zip(clipped, found.box, strict=True)) > 1:
                self.faults.add("boxes reached out of their image and were clipped", name)
            found = found._replace(box=clipped)
        self.objects[row].append(found)


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
    for i, entry in enumerate(annotations):
        row, label = rows.get(_key(entry, "image_id")), labels.get(_key(entry, "category_id"))
        identity = entry.get("id", f"number {i}")
        if row is None:
            table.faults.add("objects of images that are not listed were left out", identity)
        elif label is None:
            table.faults.add("objects of no known category were left out", identity)
        elif (box := _coco_box(entry)) is None:
            table.faults.add("objects without a box were left out", identity)
        else:
            area = _number(entry.get("area")) or (box[2] - box[0]) * (box[3] - box[1])
            outline = _outline(entry.get("segmentation"))
            table.add_object(row, Found(box, label, bool(entry.get("iscrowd")), area, outline))
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
    for i, entry in enumerate(entries):
        name, identity = entry.get("file_name"), _key(entry, "id")
        if not isinstance(name, str) or not name or identity is None:
            table.faults.add("images without an id or a file_name were left out", f"number {i}")
            continue
        if identity in rows and table.names[rows[identity]] != name:
            table.faults.add("images with an id that another has were left out", name)
            continue
        if name not in by_name:
            height, width = _number(entry.get("height")), _number(entry.get("width"))
            size = (int(height), int(width)) if height and width else None
            by_name[name] = table.add_image(name, identity, size)
        rows[identity] = by_name[name]
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
    value = entry.get(name)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) else None


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
    outline = _outline(entry.get("segmentation"))
    if isinstance(outline, list):
        xs = [x for polygon in outline for x in polygon[::2]]
        ys = [y for polygon in outline for y in polygon[1::2]]
        return min(xs), min(ys), max(xs), max(ys)
    return None


def _outline(segmentation: Any) -> Any:
    """Polygons of three points and more, or run lengths; None where there is neither."""
    if isinstance(segmentation, dict) and {"counts", "size"} <= segmentation.keys():
        return segmentation
    if not isinstance(segmentation, list):
        return None
    polygons = []
    for polygon in segmentation:
        if isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0:
            with suppress(TypeError, ValueError, OverflowError):
                values = [float(value) for value in polygon]
                polygons += [values] if all(map(math.isfinite, values)) else []
    return polygons or None


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
        for entry in objects[name]:
            box, label = _voc_box(entry), labels.get(_text(entry, "name"))
            if box is None or label is None:
                table.faults.add("objects without a box or a name were left out", name)
                continue
            area = (box[2] - box[0]) * (box[3] - box[1])
            ignored = _text(entry, "difficult") not in ("", "0")
            table.add_object(row, Found(box, label, ignored, area))
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
