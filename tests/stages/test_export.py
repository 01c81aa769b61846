from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_package
import pytest
from safetensors.numpy import load_file, save_file

from edgeft.artifact import Artifact, Manifest, open_artifact, scan_files, write_manifest
from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.bench.ort import OrtSession
from edgeft.bench.session import Logits
from edgeft.errors import ParityError
from edgeft.export_settings import ExportSettings
from edgeft.formats import gguf, onnx
from edgeft.formats.onnx_variants import LARGE, OPERATORS, ORT, STATIC
from edgeft.formats.probe import Probe
from edgeft.plan import ExportNode
from edgeft.progress import Reporter
from edgeft.stages import export
from edgeft.text.chat import ChatTokenizer
from edgeft.text.general import general_ids
from tests.formats.tiny_model import TEXTS, make_probe, tiny_onnx, torch_logits, write_tiny_llama

METRICS = {
    "format", "quant", "runtime", "bytes", "parameters", "bits_per_weight", "tensor_types", "int4_choice",
    "contract", "step_kl_mean", "threshold", "variants",
    "kl_mean", "kl_p99", "kl_max", "top1", "perplexity", "perplexity_reference", "n_positions",
    "general", "worst_row", "steps", "steps_together", "greedy", "threshold_p99", "threshold_steps",
}  # fmt: skip
GREEDY_TOKENS = 4
STATIC_TOKENS, ALIGNMENT = 64, 4096
TINY_KL = {"f16": 0.001, "q8_0": 0.05, "fp32": 1e-4, "fp16": 1e-3, "int8": 0.05, "int4": 2.0}


def finish(folder: Path, kind: str) -> Artifact:
    """Make a folder an artifact."""
    write_manifest(folder, Manifest(kind, kind, "0" * 16, {}, {}, scan_files(folder)))
    return open_artifact(folder)


def probe_artifact(folder: Path, probe: Probe) -> Artifact:
    folder.mkdir()
    probe.save(folder)
    return finish(folder, "probe")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("inputs")
    model = write_tiny_llama(folder / "model")
    probe = with_general_and_answers(model, make_probe(model, TEXTS * 2))
    return {"model": finish(model, "model"), "probe": probe_artifact(folder / "probe", probe)}


def with_general_and_answers(model: Path, probe: Probe) -> Probe:
    """The probe with two rows of plain text, and the model's own answers to the first two prompts."""
    chat = ChatTokenizer.from_folder(model)
    rows = general_ids(chat, 120, 60)
    positions = [list(range(len(row) - 1)) for row in rows]
    logits = np.concatenate([probe.logits_PV, *(torch_logits(model, row)[:-1] for row in rows)])
    answers = [greedy(model, probe.prompt(row), chat) for row in range(2)]
    return Probe([*probe.rows, *rows], [*probe.positions, *positions], logits, [], len(rows), answers, GREEDY_TOKENS)


def greedy(model: Path, prompt: list[int], chat: ChatTokenizer) -> list[int]:
    answer: list[int] = []
    while len(answer) < GREEDY_TOKENS:
        token = int(torch_logits(model, prompt + answer)[-1].argmax())
        if token in chat.stop_ids:
            break
        answer.append(token)
    return answer


@pytest.fixture
def ready_build(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tiny model's ONNX build, made once for all tests, in place of a new one."""
    package = tiny_onnx(tmp_path_factory)[1]

    def build(model: Path, out: Path) -> None:
        names = tuple(path.name for path in package.iterdir())
        onnx.copy_files(package, out, names)

    monkeypatch.setattr(onnx, "build_onnx", build)


def run(
    inputs: dict[str, Artifact],
    fmt: str,
    quant: str,
    out: Path,
    max_kl: float | None = None,
    blocks: tuple[int, ...] = (32,),
    **forms: Any,
) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    limit = TINY_KL[quant] if max_kl is None else max_kl
    cfg = ExportNode(format=fmt, quant=quant, max_kl=limit, int4_blocks=blocks, **forms)
    return export.run(cfg, inputs, out, Reporter("export", out))


@pytest.mark.parametrize(
    ("fmt", "full", "quants"),
    [("gguf", "f16", ["q8_0"]), ("onnx", "fp32", ["fp16", "int8", "int4"])],
    ids=["gguf", "onnx"],
)
def test_every_package_is_written_and_measured(
    fmt: str, full: str, quants: list[str], inputs: dict[str, Artifact], ready_build: None, tmp_path: Path
) -> None:
    metrics = {full: run(inputs, fmt, full, tmp_path / full)}
    whole = {**inputs, "full": finish(tmp_path / full, "package")}
    for quant in quants:
        metrics[quant] = run(whole, fmt, quant, tmp_path / quant)
    for quant, found in metrics.items():
        assert found.keys() == METRICS
        assert (found["format"], found["quant"], found["threshold"]) == (fmt, quant, TINY_KL[quant])
        positions = found["n_positions"] + found["general"]["n_positions"]
        assert positions == len(Probe.load(inputs["probe"].path).logits_PV)
        assert found["steps"]["rows"] == 2 and found["steps_together"]["rows"] == 8
        assert found["steps_together"]["kl_mean"] < 1e-2
        files = scan_files(tmp_path / quant)
        assert found["bytes"] == sum(f.size for name, f in files.items() if not name.startswith("log/"))
        weights = sum(f.size for name, f in files.items() if name.startswith("model."))
        assert found["bits_per_weight"] == pytest.approx(weights * 8 / found["parameters"])
        assert found["step_kl_mean"] < 1e-2
    assert metrics[full]["greedy"] == {"rows": 2, "equal": 2, "part_at_median": None}
    sizes = [m["bytes"] for m in metrics.values()]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert metrics[full]["kl_mean"] < min(metrics[q]["kl_mean"] for q in quants)


def test_int4_keeps_what_uses_its_bits_best_and_weighs_errors_by_importance(
    inputs: dict[str, Artifact], ready_build: None, tmp_path: Path
) -> None:
    run(inputs, "onnx", "fp32", tmp_path / "fp32")
    given = {**inputs, "full": finish(tmp_path / "fp32", "package")}
    plain = run(given, "onnx", "int4", tmp_path / "plain", blocks=(16, 32))["int4_choice"]
    assert [(c["block"], c["zero_points"]) for c in plain] == [(16, False), (16, True), (32, False), (32, True)]
    best = min(plain, key=lambda c: c["kl"] * 4 ** c["bits"])
    assert [c["chosen"] for c in plain] == [c is best for c in plain] and all(c["kl"] > 0 for c in plain)
    scales = [i for i in graph_of(tmp_path / "plain").initializer if "mlp.up_proj" in i.name and "scale" in i.name]
    assert scales[0].dims[1] == 64 // best["block"]

    weights = load_file(inputs["model"].path / "model.safetensors")
    importance = {n: np.geomspace(1, 1e4, w.shape[1]).astype(np.float32) for n, w in weights.items() if "proj" in n}
    (tmp_path / "importance").mkdir()
    save_file(importance, tmp_path / "importance/importance.safetensors")
    given["importance"] = finish(tmp_path / "importance", "importance")
    weighted = run(given, "onnx", "int4", tmp_path / "weighted", max_kl=9, blocks=(16, 32))["int4_choice"]
    assert [c["kl"] for c in weighted] != [c["kl"] for c in plain]


def test_forms_for_other_targets_are_in_the_package_and_predict_what_it_predicts(
    inputs: dict[str, Artifact], ready_build: None, tmp_path: Path
) -> None:
    run(inputs, "onnx", "fp32", tmp_path / "fp32", static=STATIC_TOKENS, ort=True, alignment=ALIGNMENT)
    found = run(
        {**inputs, "full": finish(tmp_path / "fp32", "package")}, "onnx", "int8", tmp_path / "int8",
        static=STATIC_TOKENS, ort=True, alignment=ALIGNMENT,
    )  # fmt: skip
    for package, rounding in ((tmp_path / "fp32", 1e-4), (tmp_path / "int8", 0.2)):  # steps round activations otherwise
        files = finish(package, "package").manifest.files
        assert {STATIC, ORT, OPERATORS, onnx.GRAPH, onnx.WEIGHTS} <= files.keys()
        ids = Probe.load(inputs["probe"].path).rows[0][:20]
        whole, *forms = (OrtSession(package / name, 1, STATIC_TOKENS) for name in (onnx.GRAPH, STATIC, ORT))
        for form in forms:
            np.testing.assert_allclose(form.prefill(ids), whole.prefill(ids), atol=rounding)
        dims = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph_of(package, STATIC).input}
        assert dims["input_ids"] == [1, 1] and dims["past_key_values.0.key"] == [1, 2, STATIC_TOKENS, 16]
        for name in (onnx.GRAPH, STATIC):
            places = [{e.key: e.value for e in i.external_data} for i in graph_of(package, name).initializer]
            large = [int(place["offset"]) for place in places if int(place.get("length", 0)) >= LARGE]
            assert len(large) > 20 and not any(offset % ALIGNMENT for offset in large)
    assert found["variants"] == {name: (tmp_path / "int8" / name).stat().st_size for name in (STATIC, ORT)}
    assert found["bytes"] < sum((tmp_path / "int8" / name).stat().st_size for name in (onnx.WEIGHTS, STATIC, ORT))


def graph_of(package: Path, name: str = onnx.GRAPH) -> Any:
    return onnx_package.load(package / name, load_external_data=False).graph


def test_golden_conversations_stand_beside_every_package(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    run(inputs, "gguf", "f16", tmp_path)
    golden = json.loads((tmp_path / "golden.json").read_text("utf-8"))
    assert golden["runtime"] == "llama.cpp" and any(c.get("answer_ids") for c in golden["conversations"])


def test_a_package_of_another_model_is_refused_with_all_figures(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    other = finish(write_tiny_llama(tmp_path / "other", seed=1), "model")
    with pytest.raises(
        ParityError, match=r"mean KL \d.*at most 0\.001 .*top-1 agreement .*%; worst row validation:\d with \d"
    ):
        run({**inputs, "model": other}, "gguf", "f16", tmp_path / "out")


def test_the_worst_row_is_named(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    probe = Probe.load(inputs["probe"].path)
    start, logits = sum(len(at) for at in probe.positions[:5]), np.array(probe.logits_PV)
    logits[start : start + len(probe.positions[5])] *= -1
    altered = probe_artifact(tmp_path / "probe", replace(probe, logits_PV=logits))
    with pytest.raises(ParityError, match="worst row validation:6 "):
        run({**inputs, "probe": altered}, "gguf", "f16", tmp_path / "out")


def test_a_package_of_another_model_is_named_with_its_first_other_tensor(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    other = finish(write_tiny_llama(tmp_path / "other", seed=1), "model")
    gguf.write_gguf(other.path, tmp_path / "model.gguf", "f16")
    cfg = ExportNode(format="gguf", quant="f16", max_kl=0.001)
    with pytest.raises(ParityError, match=r"38 tensors: 38 differ, the first is model\.embed_tokens\.weight"):
        export.check(cfg, inputs["model"].path, Probe.load(inputs["probe"].path), tmp_path, Reporter("export"))


def test_general_text_is_held_to_the_same_limit(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    probe = Probe.load(inputs["probe"].path)
    logits = np.array(probe.logits_PV)
    logits[-len(probe.positions[-1]) :] *= -1
    altered = probe_artifact(tmp_path / "probe", replace(probe, logits_PV=logits))
    with pytest.raises(ParityError, match=r"on general text .*worst row general:10 "):
        run({**inputs, "probe": altered}, "gguf", "f16", tmp_path / "out")


def test_a_tail_fails_though_the_mean_is_small(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(inputs, "gguf", "f16", out)
    assert found["threshold_p99"] == pytest.approx(10 * found["threshold"])
    cfg = ExportNode(format="gguf", quant="f16", max_kl=found["kl_mean"] * 1.1, max_tail=1.0)
    with pytest.raises(ParityError, match="99th percentile"):
        export.check(cfg, inputs["model"].path, Probe.load(inputs["probe"].path), out, Reporter("export"))


def test_the_limit_decides(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    kl = run(inputs, "gguf", "f16", tmp_path / "a")["kl_mean"]
    run(inputs, "gguf", "f16", tmp_path / "b", max_kl=kl * 1.01)
    with pytest.raises(ParityError):
        run(inputs, "gguf", "f16", tmp_path / "c", max_kl=kl * 0.99)


def test_a_model_that_predicts_nan_fails(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] *= np.float32(3e37)
    save_file(weights, model / "model.safetensors")
    with pytest.raises(Exception, match="not finite|values beyond f16"):
        run({**inputs, "model": finish(model, "model")}, "gguf", "f16", tmp_path / "out")


def test_nan_logits_are_no_agreement(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LlamaCppSession.score

    def score(self: LlamaCppSession, rows: Any) -> Any:
        for logits in real(self, rows):
            logits[-1, 0] = np.nan
            yield logits

    monkeypatch.setattr(LlamaCppSession, "score", score)
    with pytest.raises(ParityError, match="not finite"):
        run(inputs, "gguf", "f16", tmp_path / "out")


def test_a_cache_that_loses_tokens_is_found(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LlamaCppSession.step

    def forgetful(self: LlamaCppSession, token: int) -> Logits:
        self.reset()
        return real(self, token)

    monkeypatch.setattr(LlamaCppSession, "step", forgetful)
    with pytest.raises(ParityError, match="token by token"):
        run(inputs, "gguf", "f16", tmp_path / "out")


def test_another_chat_template_breaks_the_prompt_contract(
    inputs: dict[str, Artifact], tmp_path: Path, ready_build: None
) -> None:
    model = write_tiny_llama(tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("assistant", "bot"))
    with pytest.raises(ParityError, match="the prompt of 'a word' in onnxruntime differs"):
        run({**inputs, "model": finish(model, "model")}, "onnx", "fp32", tmp_path / "out")


def test_the_same_inputs_give_the_same_digest(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    for name in "ab":
        run(inputs, "gguf", "f16", tmp_path / name)
    assert finish(tmp_path / "a", "package").digest == finish(tmp_path / "b", "package").digest


@pytest.mark.slow
def test_all_types_of_the_real_model_stay_within_the_default_limits(smollm2: Path, tmp_path: Path) -> None:
    limits = ExportSettings().max_kl
    (tmp_path / "model").mkdir()
    for path in smollm2.iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    questions = ["What is the capital of France?", "Write one sentence about the sea, please."]
    inputs = {
        "model": finish(tmp_path / "model", "model"),
        "probe": probe_artifact(tmp_path / "probe", make_probe(smollm2, questions)),
    }
    bits: dict[str, float] = {}
    for fmt, quants in (("gguf", ("f16", "q8_0", "q4_k_m")), ("onnx", ("fp32", "int8", "int4"))):
        given = dict(inputs)
        for quant in quants:
            metrics = run(given, fmt, quant, tmp_path / quant, max_kl=limits[quant])  # type: ignore[index]
            bits[quant] = metrics["bits_per_weight"]
            given.setdefault("full", finish(tmp_path / quant, "package"))
    assert bits["int8"] < 9.5 and bits["int4"] < 6.5 and bits["q8_0"] < 9 and 32 <= bits["fp32"] < 32.3
