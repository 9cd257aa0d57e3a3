"""An object store on this machine: a folder, given as slowly as one that is far away."""

import re
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

SPEED = 90e6  # bytes a second for a request: what AWS's guidelines count with for S3
BLOCK = 2**20


class ObjectStore(ThreadingHTTPServer):
    """Serves HTTP, and so what clients of S3 ask for when they read.

    Args:
        folder: A bucket is a folder in it.
        latency: Seconds to the first byte of each request.

    Attributes:
        url: Its address.
        requests: That were answered.
        bytes: That were sent in them.
    """

    def __init__(self, folder: Path, latency: float) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Answer, directory=str(folder)))
        self.latency, self.requests, self.bytes, self._lock = latency, 0, 0, Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def count(self, size: int) -> None:
        """Count an answer of so many bytes."""
        with self._lock:
            self.requests, self.bytes = self.requests + 1, self.bytes + size

    def handle_error(self, *request: Any) -> None:
        """Say nothing: a client may leave early."""


class _Answer(SimpleHTTPRequestHandler):
    server: ObjectStore
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits until its head is acknowledged

    def do_GET(self) -> None:
        """Send a file, or a range of it; for HEAD, only what it is."""
        path = Path(self.translate_path(self.path))
        time.sleep(self.server.latency)
        if not path.is_file():
            self.server.count(0)
            self.send_error(404)
            return
        size = path.stat().st_size
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(span[1]) if span else 0
        end = min(int(span[2]) + 1, size) if span and span[2] else size
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}-{size:x}"')
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        if self.command == "HEAD":
            start = end
        self.server.count(end - start)
        with path.open("rb") as file:
            file.seek(start)
            for place in range(start, end, BLOCK):
                self.wfile.write(file.read(min(BLOCK, end - place)))
                time.sleep(min(BLOCK, end - place) / SPEED)

    do_HEAD = do_GET

    def log_message(self, *words: Any) -> None:
        pass
