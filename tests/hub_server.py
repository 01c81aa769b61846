"""A model hub for one repository on this machine, for huggingface_hub's own client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def hub(folder: Path, name: str, commit: str) -> Iterator[tuple[str, list[str]]]:
    """Serve the files in `folder` as repository `name` at `commit`; yields the address and the paths asked for."""
    asked: list[str] = []
    files = sorted(path.name for path in folder.iterdir())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            asked.append(self.path)
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            status, content, headers = 404, b"", {"X-Error-Code": "RevisionNotFound"}
            if path == f"/api/models/{name}/revision/{commit}":
                siblings = [{"rfilename": file} for file in files]
                status, headers, content = (
                    200,
                    {},
                    json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode(),
                )
            elif path == f"/api/models/{name}/tree/{commit}":
                tree = [{"type": "file", "path": f, "oid": "0", "size": (folder / f).stat().st_size} for f in files]
                status, headers, content = 200, {}, json.dumps(tree).encode()
            elif path.startswith(f"/{name}/resolve/{commit}/") and path.rpartition("/")[2] in files:
                status, content = 200, (folder / path.rpartition("/")[2]).read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
