"""Read back what an offline W&B run has recorded.

wandb 0.31 reads its own files in Go alone. The messages are wandb's own classes; around them is
LevelDB's log format: blocks of 32 KiB, each piece with a check sum, a length and a type.
https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

MAGIC, BLOCK, HEADER = 7, 32 * 1024, 7  # bytes
FULL, LAST = 1, 4  # types of pieces that end a record


def records(folder: Path) -> Iterator[Record]:
    """The messages of a run's folder (`offline-run-...`), in order."""
    (path,) = folder.glob("*.wandb")
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, message = MAGIC, b""
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # too little room for a piece: the block is padded
            place += left
            continue
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        kind = content[place + 6]
        message += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


def history(folder: Path) -> dict[str, list[Any]]:
    """Each curve and panel: its values in order."""
    found: dict[str, list[Any]] = {}
    for record in records(folder):
        for item in record.history.item:
            key = item.key or ".".join(item.nested_key)
            found.setdefault(key, []).append(json.loads(item.value_json))
    return found


def config(folder: Path) -> dict[str, Any]:
    """The options as the board shows them."""
    found: dict[str, Any] = {}
    for record in records(folder):
        for item in (*record.config.update, *record.run.config.update):
            found[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return found
