"""Which images a folder holds: every file's relative path and class, in three arrays.

A Python list of a million paths is copied into every worker, page by page, as its reference counts
are touched. One buffer of bytes with offsets is shared: forked workers see the parent's pages, and
spawned ones map the file that index_cache.py keeps, or get the tensors through shared memory.
"""

import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from simmim.base.progress import Bar
from simmim.data.summary import LeftOut

# torchvision's nine endings, and what else people keep scans and pictures in.
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".gif", ".avif", ".jp2", ".dcm", ".npy", *(".jfif", ".jpe", ".jif", ".mpo", ".apng", ".dib")),
    *(".pbm", ".pnm", ".j2k", ".jpc", ".jpf", ".jpx"),
)
UNREAD = (  # images all the same, but not of formats that decode.py reads
    *(".heic", ".heif", ".hif", ".jxl", ".svg", ".svgz", ".psd", ".psb", ".eps", ".ico", ".icns"),
    *(".exr", ".hdr", ".tga", ".pcx", ".dds", ".sgi", ".xcf", ".pfm", ".avifs"),
    *(".cr2", ".cr3", ".nef", ".nrw", ".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    *(".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".svs", ".ndpi", ".czi", ".lif", ".nd2"),
)
MAX_BYTES = 2**30  # of a file
CHUNK = 2**16  # names that are made into text at a time
SPLIT_WORDS = {  # what the folder of a split is called; of two, the first is read
    "train": ("train", "training", "trn", "trainval"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tests", "tst", "holdout"),
}
SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}
FILLERS = "(?:data|folder|images?|imgs?|part|set|split)*"  # as in train_set and images_val
SPLIT_NAME = re.compile(rf"({FILLERS})({'|'.join(SPLIT_OF)})({FILLERS}(?:(?:19|20)\d\d)?)")


@dataclass(frozen=True)
class FileIndex:
    """The image files below a folder, in torchvision's order: by class, folder and name.

    Attributes:
        root: The folder, as it was given.
        names: All relative paths one behind the other, uint8; separated by "/" on every system.
        starts: Where each begins in `names`, and where the last one ends, int64, (n + 1,).
        labels: The class of each file, int64, (n,); None where there are no classes.
        classes: Names of the classes: folders right below the root that hold images, what is no
            text in them as escapes. Empty where there are none, or where images also lie loose in
            the root.
        suffixes: Endings that occur, in lower case.
        digest: Hash of the names, where it is known already; "" otherwise.
        left_out: Images that are not read, by their endings.
        hint: What is wrong with the folders that might be classes; "" where nothing is.
    """

    root: str
    names: Tensor
    starts: Tensor
    labels: Tensor | None
    classes: list[str]
    suffixes: frozenset[str]
    digest: str = field(default="", kw_only=True)
    left_out: Sequence[LeftOut] = field(default=(), kw_only=True)
    hint: str = field(default="", kw_only=True)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def name(self, place: int) -> str:
        """Relative path of a file, with "/" between folders on every system."""
        start, end = self.starts[place : place + 2].tolist()
        return os.fsdecode(self.names[start:end].numpy().tobytes())

    def all_names(self) -> Iterator[str]:
        """Relative paths of all files in order, at a fraction of a microsecond each."""
        for first in range(0, len(self), CHUNK):
            starts = self.starts[first : first + CHUNK + 1]
            offset, end = int(starts[0]), int(starts[-1])
            data = self.names[offset:end].numpy().tobytes()
            ends = (starts - offset).tolist()
            if data.isascii():  # then a byte is a character
                text = data.decode("ascii")
                yield from (text[a:b] for a, b in pairwise(ends))
            else:
                yield from (os.fsdecode(data[a:b]) for a, b in pairwise(ends))

    def path(self, place: int) -> str:
        """Path of a file, as it can be opened."""
        return os.path.join(self.root, *self.name(place).split("/"))

    def container(self, place: int) -> str:
        """Path of what holds a file on the disk: of itself."""
        return self.path(place)

    def size(self, place: int) -> int:
        """Size of a file in bytes; 0 where it is gone."""
        path = self.path(place)
        return os.path.getsize(path) if os.path.exists(path) else 0

    def read(self, place: int) -> bytes | memoryview:
        """Read the bytes of a file.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it is larger than an image may be.
        """
        return read_file(self.path(place))


def read_file(path: str) -> bytes:
    """Read a file that is no larger than an image may be.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is larger.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise ValueError(f"the file has more than {MAX_BYTES:,} bytes")
        return file.read()


def check_folder(root: str, option: str = "data.root") -> None:
    """Refuse what is no folder.

    Args:
        root: What was given.
        option: Where.

    Raises:
        ValueError: If there is nothing there, or a file.
    """
    if os.path.isfile(root):
        raise ValueError(f"{option} {root!r} is a file: give the folder that holds the images")
    if not os.path.isdir(root):
        raise ValueError(f"{option} {root!r} does not exist: give a folder of images")


def split_of(folder: str) -> str | None:
    """The split that a folder is by its name: "train", "val" or "test"; None if it is another.

    Upper and lower case, separators, words such as "set" or "images", and a year at the end do not
    matter: TRAIN, training_set, images-val, test2017.
    """
    match = _match_split(folder)
    return SPLIT_OF[match[2]] if match else None


def find_parts(root: str) -> dict[str, str]:
    """Find the folders of the splits by their names, see `split_of`.

    Returns:
        The folders there are, by "train", "val" and "test"; empty unless there is one to train on,
        for then the folder is to be split by us.
    """
    folders = sorted(e.name for e in os.scandir(root) if _is_folder(e) and e.name[0] != ".")
    matches = {name: match for name in folders if (match := _match_split(name))}
    parts: dict[str, list[str]] = {split: [] for split in SPLIT_WORDS}
    for name in sorted(matches, key=lambda name: (list(SPLIT_OF).index(matches[name][2]), name)):
        parts[SPLIT_OF[matches[name][2]]].append(name)
    if not parts["train"]:
        return {}
    # Of several, those that are called alike: val2017 goes with train2017, not val2014.
    like = min(matches[name].group(1, 3) for name in parts["train"])
    for of_split in parts.values():
        of_split.sort(key=lambda name: matches[name].group(1, 3) != like)
    beside = [f for f in folders if f not in matches and _has_images(os.path.join(root, f))]
    train = parts["train"][0]
    alone = len(matches) == 1 and matches[train][0] in SPLIT_WORDS["train"][1:]
    if alone and beside and _has_images(os.path.join(root, train)):
        return {}  # a class like those beside it
    for first, *others in filter(None, parts.values()):
        for other in others:
            rank_zero_warn(
                f"{os.path.join(root, other)} is not read: {os.path.join(root, first)} is the same "
                "part, and comes before it"
            )
    if beside:
        unread = ", ".join(f"{name}/" for name in beside)
        rank_zero_warn(f"{unread} in {root} is not read: {train}/ beside it is what is trained on")
    return {split: os.path.join(root, names[0]) for split, names in parts.items() if names}


def _match_split(folder: str) -> re.Match[str] | None:
    return SPLIT_NAME.fullmatch(re.sub(r"[\W_]+", "", folder.lower()))


def _has_images(folder: str) -> bool:
    """Whether an image lies right in a folder."""
    try:
        with os.scandir(folder) as entries:
            return any(e.name.lower().endswith(SUFFIXES) and e.name[0] != "." for e in entries)
    except OSError:  # no right to: told when it is read
        return False


def scan(root: str) -> FileIndex:
    """Index the images below a folder, at any depth.

    Files count by their ending, in upper or lower case. Hidden files and folders are left out, and
    with them macOS's `._photo.jpg`, which are no pictures. Links are followed, but not in circles.

    Raises:
        ValueError: If there is no image.
    """
    return join_folders(root, visit_folders(root))


@dataclass(order=True)
class Folder:
    """A folder that was visited.

    Attributes:
        relative: Its path below the root, with "/" on every system.
        names: Relative paths of the images that lie in it, one behind the other.
        lengths: The length of each in bytes.
        suffixes: Their endings.
        stamp: What `folder_stamp` said just before it was read.
        refused: Why it could not be read; "" where it could.
        unread: Relative paths of images that are not read, by their endings.
    """

    relative: str
    names: bytes = b""
    lengths: list[int] = field(default_factory=list)
    suffixes: set[str] = field(default_factory=set)
    stamp: tuple[int, int] = (0, 0)
    refused: str = ""
    unread: dict[str, list[str]] = field(default_factory=dict, compare=False)


def folder_stamp(path: str) -> tuple[int, int]:
    """When a folder's entries, and when anything about it, last changed, in ns; zeros: no folder.

    The second differs from the first where a copy set the first back to that of its source.
    """
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return (status.st_mtime_ns, status.st_ctime_ns) if stat.S_ISDIR(status.st_mode) else (0, 0)


def visit_folders(root: str) -> list[Folder]:
    """Visit a folder and all below it: those without images, and links to nothing, as well."""
    with Bar(desc="Indexing", unit=" images", unit_scale=True, leave=False, delay=2) as bar:
        folders = []
        for folder in _walk(root):
            bar.update(len(folder.lengths))
            folders.append(folder)
    warn_of_refused([folder.refused for folder in folders if folder.refused])
    return folders


def warn_of_refused(reasons: Sequence[str]) -> None:
    """Say which folders could not be read, such as lost+found at the top of a disk."""
    for reason in reasons:
        rank_zero_warn(f"left out a folder: {reason}")


def join_folders(root: str, visited: Sequence[Folder]) -> FileIndex:
    """Put what was found in folders into one index.

    Raises:
        ValueError: If there is no image.
    """
    folders = [folder for folder in visited if folder.lengths]
    folders.sort(key=lambda folder: (folder.relative.split("/")[0], folder))
    names, lengths, labels = bytearray(), array("q", [0]), array("q")
    classes = [] if any(not f.relative for f in folders) else _classes(folders)
    number = {name: i for i, name in enumerate(classes)}
    # Names of files may be any bytes; those of classes go into tables, pictures and checkpoints.
    classes = [_as_text(name) for name in classes]
    for folder in folders:
        names += folder.names
        lengths.extend(folder.lengths)
        if classes:
            label = number[folder.relative.split("/")[0]]
            labels.extend(array("q", [label]) * len(folder.lengths))
    left_out = _left_out(visited, {folder.relative.split("/")[0] for folder in folders})
    if len(lengths) == 1:
        if any(name.endswith(".arrow") for name in os.listdir(root)):
            raise ValueError(
                f"{root!r} holds shards, but no packed.json, which says what is in them: copy that "
                "as well, or pack the images anew"
            )
        unread = "".join(f"{one}; " for one in left_out)
        raise ValueError(
            f"{root!r} holds no images: {unread}give a folder with files that end in "
            f"{', '.join(SUFFIXES)}"
        )
    return FileIndex(
        root,
        torch.frombuffer(names, dtype=torch.uint8),
        torch.frombuffer(lengths, dtype=torch.int64).cumsum(0),
        torch.frombuffer(labels, dtype=torch.int64) if classes else None,
        classes,
        frozenset(suffix for folder in folders for suffix in folder.suffixes),
        left_out=left_out,
        hint=_hint(root, folders),
    )


def _as_text(name: str) -> str:
    """A name of a file, which may be any bytes, as it can be printed."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _left_out(visited: Sequence[Folder], read: set[str]) -> list[LeftOut]:
    """Count the images that are not read, and the folders right below the root without others."""
    files: dict[str, list[str]] = {}
    classes: dict[str, str] = {}
    for folder in sorted(visited):
        for suffix, names in folder.unread.items():
            files.setdefault(suffix, []).extend(names)
            top = folder.relative.split("/")[0]
            if top and top not in read:
                classes.setdefault(top, suffix)
    of_suffix = [
        LeftOut("files", f"{suffix} is not read here", len(names), _as_text(names[0]))
        for suffix, names in files.items()
    ]
    reasons = Counter(classes.values())
    return of_suffix + [
        LeftOut(
            "class folders",
            f"{suffix} is not read here",
            n,
            next(f"{_as_text(top)}/" for top, of_top in classes.items() if of_top == suffix),
        )
        for suffix, n in reasons.items()
        if read
    ]


def _hint(root: str, folders: Sequence[Folder]) -> str:
    """What keeps folders from being classes, if little does."""
    count = sum(len(folder.lengths) for folder in folders)
    loose = sum(len(folder.lengths) for folder in folders if not folder.relative)
    tops = [_as_text(top) for top in _classes([f for f in folders if f.relative])]
    if loose and len(tops) > 1 and loose < count / 2:
        stray = next(f for f in folders if not f.relative)
        name = stray.names[: stray.lengths[0]].decode("utf-8", "backslashreplace")
        return (
            f"{loose:,} of {count:,} images ({name}{' and others' * (loose > 1)}) "
            f"{'lie' if loose > 1 else 'lies'} beside the class folders, so they are not taken for "
            f"classes: move {'them' if loose > 1 else 'it'}"
        )
    below = sorted({_as_text("/".join(f.relative.split("/")[1:2])) for f in folders})
    if len(tops) == 1 and not loose and len(below) > 1 and "" not in below:
        some = ", ".join(below[:3]) + (", ..." if len(below) > 3 else "")
        return (
            f"the only folder below {root} is {tops[0]}/, which holds the folders {some}: "
            f"give {os.path.join(root, tops[0])}"
        )
    return ""


def _walk(root: str) -> Iterator[Folder]:
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        relative, above = waiting.pop()
        path = os.path.join(root, relative)
        stamp = folder_stamp(path)  # first: what changes meanwhile is noticed the next time
        try:
            status, entries = os.stat(path), sorted(os.scandir(path), key=lambda e: e.name)
        except OSError as error:  # no right to, gone meanwhile, too deep, or a disk that fails
            yield Folder(relative, stamp=stamp, refused=str(error))
            continue
        if (here := (status.st_dev, status.st_ino)) in above:
            continue  # a link to a folder that this one lies in
        prefix = f"{relative}/" if relative else ""
        visible = [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]
        files = {e.name for e in visible}
        if relative and files >= {"config.yaml", "metrics.csv", "checkpoints"}:
            visible = []  # a run in the folder that it trains on: its pictures are no data
        if "doctor.json" in files:
            visible = [e for e in visible if e.name != "contact_sheet.png"]
        waiting += [(prefix + e.name, (*above, here)) for e in visible if _is_folder(e)]
        yield from (Folder(prefix + e.name) for e in visible if _leads_nowhere(e))
        images = [e.name for e in visible if e.name.lower().endswith(SUFFIXES) and _is_file(e)]
        encoded = [os.fsencode(prefix + name) for name in images]
        suffixes = {os.path.splitext(name)[1].lower() for name in images}
        unread: dict[str, list[str]] = {}
        for entry in visible:
            if (name := entry.name.lower()).endswith(UNREAD) and _is_file(entry):
                suffix = next(suffix for suffix in UNREAD if name.endswith(suffix))
                unread.setdefault(suffix, []).append(prefix + entry.name)
        lengths = [len(e) for e in encoded]
        yield Folder(relative, b"".join(encoded), lengths, suffixes, stamp, unread=unread)


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Whether this is a link to nothing, which may be a folder once its disk is there."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether this is a file, or a link to nothing, which is to be reported as unreadable.

    Pipes and devices are neither: to open them could wait for ever.
    """
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link to itself
        return True


def _classes(folders: list[Folder]) -> list[str]:
    return sorted({folder.relative.split("/")[0] for folder in folders})
