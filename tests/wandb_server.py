"""As much of a W&B server as its client needs, on this machine: runs, their history, artifacts.

The client is wandb's own, online or `wandb sync`; what it asks (GraphQL by name) is answered from
what it has said before, and kept to be looked at.
"""

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

PROJECT = {"id": "p", "internalId": "1", "name": "simmim", "entity": {"id": "e", "name": "me"}}
KEY = "x" * 40
DATE = "2026-01-01T00:00:00Z"

Answer = dict[str, Any]


@dataclass
class Artifact:
    """A version of an artifact, and which run has made it."""

    id: str
    name: str
    type: str
    aliases: set[str]
    run: str


@dataclass
class Server:
    """What the client has said.

    Attributes:
        url: Where it is reached: WANDB_BASE_URL.
        history: Rows by run.
        artifacts: In the order in which they came.
        used: Pairs of a run and the artifact that it begins with.
        files: Names of what was uploaded.
    """

    url: str = ""
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    used: list[tuple[str, Artifact]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def answer(self, name: str, said: dict[str, Any]) -> Answer:
        """Answer a query or a mutation."""
        simple: dict[str, Answer] = {
            "Viewer": {
                "viewer": {"id": "u", "entity": "me", "flags": "{}", "teams": {"edges": []}}
            },
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "OrganizationCoreWeaveOrganizationID": {"entity": {"organization": None}},
            "ArtifactType": {"project": {"artifact": None}},
            "CommitArtifact": {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}},
        }
        if name in simple:
            return simple[name]
        return getattr(self, f"_{name}")(said)  # type: ignore[no-any-return]

    def append(self, run: str, said: dict[str, Any]) -> None:
        """Take rows of a run's history, from where the client says."""
        if part := said.get("files", {}).get("wandb-history.jsonl"):
            rows = self.history.setdefault(run, [])
            rows[part["offset"] :] = [json.loads(line) for line in part["content"]]

    def _RunResumeStatus(self, said: dict[str, Any]) -> Answer:
        rows = self.history.get(said["name"])
        if rows is None:
            return {"model": {**PROJECT, "bucket": None}}
        lines = {"logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0}
        tails = {"historyTail": json.dumps([json.dumps(rows[-1])]), "eventsTail": "[]"}
        kept = {"summaryMetrics": "{}", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'}
        names = {"id": "b", "name": said["name"], "displayName": said["name"]}
        return {"model": {**PROJECT, "bucket": {**names, **lines, **tails, **kept}}}

    def _UpsertBucket(self, said: dict[str, Any]) -> Answer:
        known = said["name"] in self.history
        bucket = {"id": "b", "name": said["name"], "displayName": said["name"], "config": "{}"}
        bucket |= {"sweepName": None, "historyLineCount": 0, "project": PROJECT}
        return {"upsertBucket": {"bucket": bucket, "inserted": not known}}

    def _CreateRunFiles(self, said: dict[str, Any]) -> Answer:
        files = [{"name": n, "uploadUrl": f"{self.url}/upload/{n}"} for n in said["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}

    def _CreateArtifact(self, said: dict[str, Any]) -> Answer:
        given = said["input"]
        name, kind = given["artifactCollectionName"], given["artifactTypeName"]
        aliases = {one["alias"] for one in given["aliases"]}
        made = Artifact(f"a{len(self.artifacts)}", name, kind, aliases, given["runName"])
        self.artifacts.append(made)
        sequence = {"latestArtifact": None}
        about = {"id": made.id, "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": about}}

    def _CreateArtifactManifest(self, said: dict[str, Any]) -> Answer:
        manifest = {"id": "m", "file": self._file("wandb_manifest.json")}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _CreateArtifactFiles(self, said: dict[str, Any]) -> Answer:
        given = said["input"]["artifactFiles"]
        edges = [
            {"node": {**self._file(one["name"]), "artifact": {"id": one["artifactID"]}}}
            for one in given
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _ArtifactMembershipByName(self, said: dict[str, Any]) -> Answer:
        name, _, alias = said["name"].partition(":")
        found = [a for a in self.artifacts if a.name == name and alias in a.aliases]
        if not found:
            return {"project": {"artifactCollectionMembership": None}}
        collection = {"__typename": "ArtifactSequence", "name": name, "project": PROJECT}
        dates = {"createdAt": DATE, "updatedAt": None}
        artifact = {
            **{"__typename": "Artifact", "id": found[-1].id, "artifactSequence": collection},
            **{"artifactType": {"name": found[-1].type}, "versionIndex": 0, "state": "COMMITTED"},
            **{"description": None, "metadata": "{}", "tags": [], "aliases": [], "size": 1},
            **{"ttlDurationSeconds": -1, "ttlIsInherited": True, "historyStep": None, **dates},
            **{"digest": "d", "commitHash": "c", "fileCount": 1},
        }
        about = {"__typename": "ArtifactCollectionMembership", "id": "m", "versionIndex": 0}
        about |= {"createdAt": DATE, "aliases": [], "artifactCollection": collection}
        return {"project": {"artifactCollectionMembership": {**about, "artifact": artifact}}}

    def _UseArtifact(self, said: dict[str, Any]) -> Answer:
        (artifact,) = (a for a in self.artifacts if a.id == said["artifactID"])
        self.used.append((said["runName"], artifact))
        return {"useArtifact": {"artifact": {"id": artifact.id}}}

    def _file(self, name: str) -> dict[str, Any]:
        place = {"uploadUrl": f"{self.url}/upload/{name}", "uploadHeaders": []}
        return {"id": "f", "name": name, "displayName": name, "storagePath": "s", **place}


@contextmanager
def wandb_server() -> Iterator[Server]:
    """Serve on a free port of this machine, until the end of the block."""
    server, lock = Server(), Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # the client keeps its connections

        def do_GET(self) -> None:
            self._reply({})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                server.files.append(self.path.removeprefix("/upload/"))
            self._reply({})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            said = json.loads(content)
            with lock:
                self._reply(self._answer(said))

        def _answer(self, said: dict[str, Any]) -> Answer:
            if self.path.endswith("/file_stream"):
                server.append(self.path.split("/")[-2], said)
                return {}
            name = re.search(r"(?:query|mutation)\s+(\w+)", said["query"])
            assert name is not None
            return {"data": server.answer(name[1], said.get("variables") or {})}

        def _reply(self, answer: Answer) -> None:
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:  # the client has gone
                self.close_connection = True

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    server.url = f"http://127.0.0.1:{web.server_port}"
    thread = Thread(target=web.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()
        thread.join()
