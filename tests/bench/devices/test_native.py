"""Which runner fits which processor, and that a changed one is not used."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from edgeft.artifact import file_sha256
from edgeft.bench.devices import build, native
from edgeft.bench.devices.device import DeviceError
from edgeft.bench.devices.native import LEVELS, NATIVE, Level
from edgeft.errors import EdgeftError
from edgeft.progress import Reporter
from tests.bench.devices.conftest import ROOT

PI_4 = ["fp", "asimd", "evtstrm", "crc32", "cpuid"]
PIXEL_8 = [*PI_4, "atomics", "fphp", "asimdhp", "asimdrdm", "lrcpc", "asimddp", "i8mm", "bf16"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path))
    return tmp_path


def put(target: str, level: Level) -> Path:
    """A program in the cache as a build leaves it."""
    folder = native.folder_of(target, level)
    folder.mkdir()
    program = folder / native.PROGRAM
    program.write_bytes(level.name.encode())
    record = {"target": target, "level": level.name, "sha256": file_sha256(program), "bytes": 5}
    (folder / native.RECORD).write_text(json.dumps(record))
    return program


def test_a_processor_gets_the_highest_level_that_it_allows() -> None:
    built = {level.name: put("aarch64", level) for level in LEVELS["aarch64"]}
    assert native.find_runner("aarch64", features=PIXEL_8) == built["armv9"]
    assert native.find_runner("aarch64", features=[f for f in PIXEL_8 if f != "i8mm"]) == built["armv8.2"]
    assert native.find_runner("aarch64", "Linux", PI_4) == built["armv8.0"] == native.find_runner("aarch64")


def test_a_lower_level_serves_where_the_highest_that_fits_is_not_built() -> None:
    built = {level.name: put("aarch64", level) for level in LEVELS["aarch64"][1:]}
    assert native.find_runner("aarch64", features=PIXEL_8) == built["armv8.2"]
    better = native.better_runner("aarch64", PIXEL_8)
    assert better == "edgeft device build-runner --target aarch64 --cpu armv9"
    assert native.better_runner("aarch64", PI_4) is None, "it has the highest that it can use"
    put("aarch64", LEVELS["aarch64"][0])
    assert native.better_runner("aarch64", PIXEL_8) is None


def test_a_level_that_is_not_built_is_named_with_the_command_that_builds_it() -> None:
    put("x86_64", LEVELS["x86_64"][0])  # of no use to others
    with pytest.raises(DeviceError, match=r"armv9.*\n.*build-runner --target aarch64 --cpu armv9"):
        native.find_runner("aarch64", features=PIXEL_8)
    with pytest.raises(DeviceError, match="armv7l"):
        native.find_runner("armv7l")
    with pytest.raises(DeviceError, match="darwin"):
        native.find_runner("aarch64", "darwin")


def test_the_native_build_serves_only_processors_like_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native, "own_features", lambda: ["avx2", "bmi2", "f16c", "fma", "avx512f"])
    own, any_ = put(NATIVE, Level(NATIVE)), put("x86_64", LEVELS["x86_64"][0])
    assert native.find_runner("x86_64", features=[*native.own_features(), "more"]) == own
    assert native.better_runner("x86_64", native.own_features()) is None
    assert native.find_runner("x86_64", features=["avx2", "bmi2", "f16c", "fma"]) == any_
    assert native.find_runners("x86_64", features=native.own_features()) == [own, any_], "if the first does not start"
    assert native.find_runner("x86_64", "android", native.own_features()) == any_, "its C library is another"
    with pytest.raises(DeviceError, match="no runner is made for a x86_64 processor without avx2"):
        native.find_runner("x86_64", features=["sse4_2"])


def test_a_program_that_was_changed_is_not_used() -> None:
    put("aarch64", LEVELS["aarch64"][-1]).write_bytes(b"changed")
    with pytest.raises(DeviceError, match="--again"):
        native.find_runner("aarch64")


def test_another_source_or_flag_is_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    level = LEVELS["aarch64"][0]
    before = native.folder_of("aarch64", level)
    assert native.folder_of("aarch64", level) == before
    assert native.folder_of("aarch64", Level(level.name, "generic")) != before
    monkeypatch.setattr(native, "llama_cpp_version", lambda: "0.0.1")
    assert native.folder_of("aarch64", level) != before
    monkeypatch.undo()
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path))
    copied = tmp_path / "source"
    copied.mkdir()
    for path in native.SOURCE.iterdir():
        (copied / path.name).write_bytes(path.read_bytes() + b"\n")
    monkeypatch.setattr(native, "SOURCE", copied)
    assert native.folder_of("aarch64", level) != before


def test_features_are_those_that_all_cores_have() -> None:
    assert native.features_in("processor : 0\nFeatures : fp asimd asimddp\n\nFeatures : fp asimd\n") == ["asimd", "fp"]
    assert native.features_in("nothing of the kind") == []


def test_a_build_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, level = Reporter("build"), LEVELS["aarch64"][0]
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(EdgeftError, match=r"edgeft\[devices\]"):
        build.build_runner("aarch64", level, report)
    with pytest.raises(EdgeftError, match="is not llama.cpp's source: it lacks CMakeLists.txt"):
        build.build_runner(NATIVE, Level(NATIVE), report, source=tmp_path)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(EdgeftError, match="cmake"):
        build.build_runner(NATIVE, Level(NATIVE), report, source=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def downloads(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Lets pip "download" a small archive; returns its content."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("llama_cpp_python/vendor/llama.cpp/CMakeLists.txt"))

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        Path(command[command.index("--dest") + 1], "llama_cpp_python.tar.gz").write_bytes(content.getvalue())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(build, "_run", run)
    return content.getvalue()


def test_another_source_than_the_pinned_one_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = downloads(monkeypatch)
    with pytest.raises(EdgeftError, match="not the source that edgeft was tested with"):
        build.fetch_source(Reporter("build"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(build.SHA256, build.llama_cpp_version(), hashlib.sha256(content).hexdigest())
    assert [path.name for path in build.fetch_source(Reporter("build")).iterdir()] == ["CMakeLists.txt"]


def test_the_source_of_the_constraints_version_is_pinned_and_no_other_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    [pinned] = [line.partition("==")[2] for line in constraints if line.startswith("llama_cpp_python==")]
    assert pinned in build.SHA256
    downloads(monkeypatch)
    monkeypatch.setattr(build, "llama_cpp_version", lambda: "0.0.1")
    with pytest.raises(EdgeftError, match=r"no sha256 of the source of llama-cpp-python==0\.0\.1"):
        build.fetch_source(Reporter("build"))


def test_a_source_of_ones_own_is_built_though_a_runner_is_there_and_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [tmp_path / "pinned", tmp_path / "own"]

    def compiled(source: Path, work: Path, *given: object) -> Path:
        (work / "runner").write_bytes(source.name.encode())
        return work / "runner"

    monkeypatch.setattr(build, "_compilers", lambda *given: [])
    monkeypatch.setattr(build, "_check_source", lambda source: None)
    monkeypatch.setattr(build, "_compile", lambda source, work, target, tools, report, log: (
        log.touch(), compiled(source, work))[1])  # fmt: skip
    monkeypatch.setattr(build, "fetch_source", lambda report: sources[0])
    for own, said in ((None, f"llama-cpp-python {build.llama_cpp_version()}"), (sources[1], str(sources[1]))):
        folder = build.build_runner(NATIVE, Level(NATIVE), Reporter("build"), source=own)
        assert (folder / native.PROGRAM).read_bytes() == (own or sources[0]).name.encode()
        assert json.loads((folder / native.RECORD).read_text())["source"] == said
