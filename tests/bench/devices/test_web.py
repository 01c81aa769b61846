"""What stands around a page in a browser: its server, its runtimes' archives, its options, what is known of logits."""

from __future__ import annotations

import http.client
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeft.bench.devices.browser import BrowserDevice, Options, parse_options
from edgeft.bench.devices.device import DeviceError
from edgeft.bench.devices.measure import moment_of
from edgeft.bench.devices.partial import completed
from edgeft.bench.devices.web_runtimes import RECORD, Runtime, integrity_of, unpack
from edgeft.bench.devices.web_server import served
from edgeft.formats.parity import compare


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A server of one folder and one file; beside the folder lies what nobody may read."""
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "index.html").write_text("<p>hello</p>")
    (folder / "run.wasm").write_bytes(b"\0asm")
    (folder / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model.gguf").write_bytes(bytes(range(10)))
    with served({"/package/model.gguf": tmp_path / "model.gguf"}, {"/page/": folder}) as port:
        yield port


def get(port: int, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """The path goes to the server as it is: no client tidies it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path, headers={"Host": "localhost", **headers})
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_pages_are_isolated_so_that_webassembly_may_use_threads(port: int) -> None:
    status, headers, body = get(port, "/page/index.html?x=1")
    assert (status, body, headers["Content-Type"]) == (200, b"<p>hello</p>", "text/html; charset=utf-8")
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert get(port, "/page/run.wasm")[1]["Content-Type"] == "application/wasm"


def test_a_range_of_bytes_is_answered(port: int) -> None:
    status, headers, body = get(port, "/package/model.gguf", Range="bytes=2-4")
    assert (status, body, headers["Content-Range"]) == (206, b"\2\3\4", "bytes 2-4/10")
    assert get(port, "/package/model.gguf", Range="bytes=20-")[0] == 416


@pytest.mark.parametrize(
    "path",
    ["/", "/page/", "/page/../secret", "/page/%2e%2e/secret", "/page/..%2fsecret", "/page/link", "/page//etc/passwd",
     "/page/%00", "/package/secret", "/package/../secret", "//etc/passwd", "/page/none"],
)  # fmt: skip
def test_nothing_else_is_found(port: int, path: str) -> None:
    status, _, body = get(port, path)
    assert (status, body) == (404, b"")


def test_a_page_of_another_name_gets_nothing(port: int) -> None:
    assert get(port, "/page/index.html", Host="evil.example:80")[0] == 404


def archive(path: Path, names: dict[str, bytes]) -> Runtime:
    """An archive with these files, and a runtime that is pinned to it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in names.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("package/esm/passwd.js")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return Runtime("@x/y", "1.0.0", integrity_of(path), ("esm/", "package.json"))


def test_only_what_is_kept_is_unpacked_and_links_are_not(tmp_path: Path) -> None:
    names = {
        "package/esm/a.js": b"a",
        "package/esm/w/b.wasm": b"b",
        "package/package.json": b"{}",
        "package/x.js": b"x",
    }
    runtime = archive(tmp_path / "y.tgz", names)
    unpack(tmp_path / "y.tgz", runtime, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"esm/a.js", "esm/w/b.wasm", "package.json", RECORD}


def test_another_archive_than_the_pinned_one_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    runtime = archive(tmp_path / "y.tgz", {"package/esm/a.js": b"a"})
    archive(tmp_path / "y.tgz", {"package/esm/a.js": b"b"})
    with pytest.raises(DeviceError, match="not the archive that edgeft was tested with"):
        unpack(tmp_path / "y.tgz", runtime, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["package/../../evil.js", "/evil.js"])
def test_a_path_that_leads_out_of_an_archive_is_refused(tmp_path: Path, name: str) -> None:
    runtime = archive(tmp_path / "y.tgz", {name: b"evil"})
    with pytest.raises(DeviceError, match="leads out of it"):
        unpack(tmp_path / "y.tgz", runtime, tmp_path / "out")


def test_options_are_read_and_mistakes_named() -> None:
    assert parse_options("") == Options()
    assert parse_options("threads=2,cpu=4x") == Options(threads=2, slower=4.0)
    assert parse_options("cdp=http://localhost:9222,port=8123") == Options(cdp="http://localhost:9222", port=8123)
    for wrong in (
        "threads=0",
        "threads=two",
        "cpu=0.5",
        "speed=1",
        "cdp=localhost",
        "cdp=ws://localhost:9222/devtools/browser/1",
        "port=99999",
        "cpu=4x,cdp=http://a",
    ):
        with pytest.raises(DeviceError):
            parse_options(wrong)


def test_what_wllama_leaves_out_is_filled_in_so_that_the_divergence_is_that_of_what_it_told() -> None:
    chance = np.random.default_rng(0)
    reference = chance.normal(0, 4, (5, 300)).astype(np.float32)
    other = reference + chance.normal(0, 0.2, (5, 300)).astype(np.float32)
    log_q = other - np.log(np.exp(other).sum(1, keepdims=True))
    known = np.argsort(-log_q, axis=1)[:, :16]
    partial = np.full_like(log_q, np.nan)
    np.put_along_axis(partial, known, np.take_along_axis(log_q, known, 1), 1)
    filled = completed(reference, partial)
    assert np.allclose(np.exp(filled).sum(1), 1, atol=1e-5)
    next_ids = reference.argmax(1)
    whole, told = (compare(reference, logits, next_ids) for logits in (log_q, filled))
    assert 0.5 * whole.kl_mean < told.kl_mean <= whole.kl_mean
    assert told.top1 == whole.top1


def test_of_a_browser_elsewhere_this_machines_clock_and_memory_are_not_told() -> None:
    device = BrowserDevice("browser:cdp=http://a", Options(cdp="http://a"))
    assert device._moment() == {}
    assert device._peak()[0] is None and "cannot be read from here" in device._peak()[1]
    assert set(vars(moment_of({})).values()) == {None}
