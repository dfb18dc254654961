"""A model hub on this machine, which may interrupt a download."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
