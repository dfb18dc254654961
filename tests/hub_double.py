"""A model hub on this machine, which may interrupt a download, or takes uploads."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

COMMIT = "a" * 40
NAME = "someone/model"


@contextmanager
def hub(files: dict[str, bytes], breaks_in: str | None = None, after_bytes: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Serves a repository. After an interrupted download, it closes every connection without an answer.

    Args:
        files: Contents by name.
        breaks_in: The file with the interrupted download.
        after_bytes: Number of bytes that are sent before.

    Yields:
        Its address, and the requests that it has received.
    """
    requests: list[str] = []
    is_gone = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(has_body=False)

        def do_GET(self) -> None:
            self._answer(has_body=True)

        def _answer(self, has_body: bool) -> None:
            requests.append(f"{self.command} {self.path}")
            if is_gone.is_set():
                self.close_connection = True
                return
            name = self.path.rpartition("/")[2]
            if "/tree/" in self.path:
                tree = [{"type": "file", "path": file, "size": len(files[file]), "oid": file} for file in files]
                content = json.dumps(tree).encode()
            elif self.path.startswith("/api/models/"):
                siblings = [{"rfilename": file} for file in files]
                content = json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
            elif name in files:
                content = files[name]
            else:
                self.send_error(404)
                return
            self.send_response(200)
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
            if has_body and name == breaks_in:
                is_gone.set()
                content = content[:after_bytes]
                self.close_connection = True
            if has_body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Received:
    """What a hub has got.

    Attributes:
        repositories: Body of each request that makes a repository.
        files: Contents by path, of all commits.
        tokens: The authorizations of all requests.
        messages: Messages of the commits.
    """

    repositories: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)


@contextmanager
def receiving_hub(refuses_at: str | None = None, status: int = 403) -> Iterator[tuple[str, Received]]:
    """A hub that takes commits. It refuses a card whose first lines are not YAML with a mapping, as the real one does.

    Args:
        refuses_at: Part of the path of the requests that it refuses.
        status: Status of such an answer.

    Yields:
        Its address, and what it has got.
    """
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            received.tokens.add(self.headers["Authorization"] or "")
            address = f"http://127.0.0.1:{server.server_port}"
            if refuses_at is not None and refuses_at in self.path:
                return self._send({"error": "You don't have the rights\nto do this"}, status)
            if self.path == "/api/repos/create":
                received.repositories.append(json.loads(body))
                owner = received.repositories[-1].get("organization") or "me"
                name = f"{owner}/{received.repositories[-1]['name']}"
                return self._send({"url": f"{address}/{name}", "name": name})
            if self.path == "/api/validate-yaml":
                head = json.loads(body)["content"].split("---\n")[1]
                is_valid = isinstance(yaml.safe_load(head), dict)
                return self._send({"errors": [] if is_valid else [{"message": "no mapping"}], "warnings": []})
            if "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(body)["files"]]
                return self._send(
                    {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
                )
            assert "/commit/main" in self.path, self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    received.messages.append(line["value"]["summary"])
                else:
                    received.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._send({"commitUrl": f"{address}/{NAME}/commit/{COMMIT}", "commitOid": COMMIT})

        def _send(self, answer: dict[str, Any], code: int = 200) -> None:
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        server.server_close()
