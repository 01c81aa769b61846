"""A page's files on localhost, isolated from other origins, so that WebAssembly may use threads.

Isolation: https://html.spec.whatwg.org/multipage/browsers.html#coep. Localhost counts as a secure context.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
# The page may fetch from its own origin alone; its runtimes start workers from text and compile WebAssembly.
POLICY = (
    "default-src 'self'; script-src 'self' blob: 'unsafe-eval' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
    "connect-src 'self' blob: data:; style-src 'self' 'unsafe-inline'"
)
TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript", ".mjs": "text/javascript",
    ".wasm": "application/wasm", ".json": "application/json",
}  # fmt: skip
NAMES = ("localhost", "127.0.0.1")  # a page of another name that resolves to here gets nothing
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


def find(path: str, files: Mapping[str, Path], folders: Mapping[str, Path]) -> Path | None:
    """The file that a URL's path names: one of `files`, or a file below one of `folders`; None for all else.

    The keys of `folders` end with '/'. Nothing above a folder is found, by '..' or by a link.
    """
    if path in files:
        return files[path] if files[path].is_file() else None
    for prefix, folder in folders.items():
        rest = PurePosixPath(path.removeprefix(prefix))
        if not path.startswith(prefix) or rest.is_absolute() or ".." in rest.parts or "\0" in path:
            continue
        root = folder.resolve()
        found = (root / rest).resolve()
        if found.is_relative_to(root) and found.is_file():
            return found
    return None


@contextmanager
def served(files: Mapping[str, Path], folders: Mapping[str, Path], port: int = 0) -> Iterator[int]:
    """A server of these files on 127.0.0.1, for as long as the context lasts; gives its port (a free one for 0).

    `files` may grow while it runs. Raises OSError if the port is taken.
    """

    class Handler(_Handler):
        known_files, known_folders = files, folders

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD, whole files and ranges of bytes."""

    protocol_version = "HTTP/1.1"
    known_files: Mapping[str, Path] = {}
    known_folders: Mapping[str, Path] = {}

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: requests are not worth a line."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        name = (self.headers.get("Host") or "").partition(":")[0]
        path = unquote(urlsplit(self.path).path)
        found = find(path, self.known_files, self.known_folders) if name in NAMES else None
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        with found.open("rb") as f:
            self._send(f, found, with_body)

    def _send(self, f: BinaryIO, path: Path, with_body: bool) -> None:
        size = path.stat().st_size
        start, end, status = 0, size - 1, HTTPStatus.OK
        if wanted := RANGE.fullmatch(self.headers.get("Range") or ""):
            start, end = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
            status = HTTPStatus.PARTIAL_CONTENT
            if start > end:
                self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                return
        self.send_response(status)
        self._say_headers(TYPES.get(path.suffix, "application/octet-stream"), end - start + 1)
        self.send_header("Accept-Ranges", "bytes")
        if status == HTTPStatus.PARTIAL_CONTENT:
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.end_headers()
        if with_body:
            f.seek(start)
            self._copy(f, end - start + 1)

    def _copy(self, f: BinaryIO, length: int) -> None:
        try:
            if f.tell() == 0 and length == Path(f.name).stat().st_size:
                shutil.copyfileobj(f, self.wfile, 1 << 20)
                return
            while length > 0 and (part := f.read(min(1 << 20, length))):
                self.wfile.write(part)
                length -= len(part)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the page went away

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_response(status)
        self._say_headers("text/plain", 0)
        self.end_headers()

    def _say_headers(self, kind: str, length: int) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
