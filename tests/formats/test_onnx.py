from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from transformers import GenerationConfig

from edgeft.bench.session import open_session
from edgeft.errors import ModelError
from edgeft.formats.onnx import GENERATION, MODEL_FILES, SETTINGS, build_onnx, copy_companions, copy_model_files
from edgeft.formats.onnx_blocks import Blocks, Scheme, candidates, pack, quantize_matrix, uses_bits_best
from edgeft.formats.onnx_half import halve_graph
from edgeft.formats.onnx_quant import quantize_graph
from edgeft.formats.parity import Parity, compare
from edgeft.text.chat import ChatTokenizer
from tests.formats.tiny_model import TEXTS, make_probe, tiny_onnx, write_tiny_llama

BLOCK = 32
PER_WEIGHT = {8: 1 + 4 / BLOCK, 4: 0.5 + (4 + 0.5) / BLOCK}  # bytes, with scales and, for 4 bits, zero points
SCHEMES = {8: Scheme(8), 4: Scheme(4, BLOCK, zero_points=True)}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of model and fp32 package."""
    return tiny_onnx(tmp_path_factory, tie=request.param)


def quantized(package: Path, out: Path, bits: int) -> Path:
    out.mkdir(exist_ok=True)
    quantize_graph(package / "model.onnx", out / "model.onnx", SCHEMES[bits])
    copy_companions(package, out)
    return out


def parity(package: Path, model: Path) -> Parity:
    probe = make_probe(model, TEXTS)
    session = open_session(package, threads=1, context=256)
    scored = list(session.score(list(zip(probe.rows, probe.positions, strict=True))))
    return compare(probe.logits_PV, np.concatenate(scored), probe.next_ids())


def sizes(package: Path) -> dict[str, int]:
    """Bytes of the tensors in the graph."""
    graph = onnx.load(package / "model.onnx").graph
    return {i.name: numpy_helper.to_array(i).nbytes for i in graph.initializer}


def test_fp32_predicts_what_torch_predicts(made: tuple[Path, Path]) -> None:
    found = parity(made[1], made[0])
    assert found.kl_max < 1e-6 and found.top1 == 1.0


def test_the_package_holds_the_files_of_the_model_unchanged(made: tuple[Path, Path]) -> None:
    model, package = made
    for name in set(MODEL_FILES) - {"tokenizer_config.json"}:
        assert (package / name).read_bytes() == (model / name).read_bytes(), name
    given, found = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in made)
    assert found == {**given, "chat_template": (model / "chat_template.jinja").read_text()}
    settings = json.loads((package / "genai_config.json").read_text())
    assert settings["model"]["eos_token_id"] == [2]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"eos_token_id": 0, "top_k": 7}, {"eos_token_id": [0, 2], "top_k": 7}),
        ({"eos_token_id": [5, 0]}, {"eos_token_id": [0, 2, 5]}),
        ({"eos_token_id": None}, {"eos_token_id": [2]}),
        (None, {"eos_token_id": [2]}),
        ({"eos_token_id": [2]}, {"eos_token_id": [2]}),
    ],
)
def test_a_package_names_every_token_that_ends_an_answer_where_transformers_js_reads_them(
    given: dict[str, Any] | None, written: dict[str, Any], tmp_path: Path
) -> None:
    model, out = write_tiny_llama(tmp_path / "model"), tmp_path / "package"
    out.mkdir()
    (model / GENERATION).unlink()
    if given is not None:
        (model / GENERATION).write_text(json.dumps(given))
    copy_model_files(model, out)
    assert json.loads((out / GENERATION).read_text()) == written
    stops = written["eos_token_id"]
    assert set(stops) == ChatTokenizer.from_folder(model).stop_ids == ChatTokenizer.from_folder(out).stop_ids
    assert GenerationConfig.from_pretrained(out).eos_token_id == stops


def test_all_files_of_a_build_name_the_same_stop_tokens(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    (model / GENERATION).write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 0}))
    build_onnx(model, tmp_path / "package")
    small = quantized(tmp_path / "package", tmp_path / "small", 8)
    for package in (tmp_path / "package", small):
        settings, generation = (json.loads((package / name).read_text()) for name in (SETTINGS, GENERATION))
        assert settings["model"]["eos_token_id"] == generation["eos_token_id"] == [0, 2]


def test_a_tied_embedding_is_stored_once(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    table = 320 * 64
    for tie, copies in ((True, 1), (False, 2)):
        package = tiny_onnx(tmp_path_factory, tie)[1]
        assert list(sizes(package).values()).count(table * 4) == copies
        small = quantized(package, tmp_path / str(tie), 8)
        assert list(sizes(small).values()).count(table) == copies


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.02), (4, 1.0)])
def test_a_quantised_graph_is_small_and_close(made: tuple[Path, Path], bits: int, limit: float, tmp_path: Path) -> None:
    model, package = made
    small = quantized(package, tmp_path / "small", bits)
    assert 0 < parity(small, model).kl_mean < limit
    layers = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    tables = 320 * 64 * (1 if "True" in package.name else 2)
    rest = {n: s for n, s in sizes(small).items() if not n.endswith(("_q8", "_q4", "_scale", "_zero"))}
    assert max(rest.values()) < 512 * 16 * 4, "a matrix was left as it was"
    found = sum(sizes(small).values()) - sum(rest.values())
    assert found == pytest.approx(layers * PER_WEIGHT[bits] + tables * PER_WEIGHT[8], rel=0.01)


def test_two_runs_give_the_same_bytes(made: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = (quantized(made[1], tmp_path / name, 4) for name in "ab")
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name


def test_quantising_over_an_old_file_leaves_nothing_of_it(made: tuple[Path, Path], tmp_path: Path) -> None:
    first = (quantized(made[1], tmp_path / "out", 4) / "model.onnx_data").stat().st_size
    assert (quantized(made[1], tmp_path / "out", 4) / "model.onnx_data").stat().st_size == first


def test_codes_are_packed_lower_half_first() -> None:
    assert pack(np.array([[1, 2, 3], [15, 0, 9]], np.uint8), 4).tolist() == [[0x21, 0x03], [0x0F, 0x09]]
    assert pack(np.array([200, 7], np.uint8), 8).tolist() == [200, 7]


def test_the_bytes_of_a_known_block() -> None:
    w = np.arange(-8, 8, 0.5, dtype=np.float32)[None]  # a range of 15.5
    eight = quantize_matrix(w, SCHEMES[8])
    assert eight.zero_NB is None
    assert eight.scale_NB == pytest.approx(8 / 127)
    assert eight.q_NBC[0, 0, [0, 16, 31]].tolist() == [1, 128, 128 + round(7.5 * 127 / 8)]
    four = quantize_matrix(np.repeat(np.arange(-8, 8, dtype=np.float32), 2)[None], SCHEMES[4])  # 16 steps fit exactly
    assert four.zero_NB is not None
    assert (four.scale_NB.item(), four.zero_NB.item()) == (1.0, 8)
    assert pack(four.q_NBC, 4).tobytes().hex() == "00112233445566778899aabbccddeeff"


def run_operator(blocks: Blocks, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """MatMulNBits over the stored tensors, as onnxruntime computes it."""
    (num_rows, num_blocks), scheme = blocks.scale_NB.shape, blocks.scheme
    tensors = {"q": pack(blocks.q_NBC, scheme.bits), "scale": blocks.scale_NB}
    if blocks.zero_NB is not None:
        tensors["zero"] = pack(blocks.zero_NB, scheme.bits)
    attributes = {"K": num_blocks * scheme.block, "N": num_rows, "bits": scheme.bits, "block_size": scheme.block}
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", accuracy_level=4, **attributes
    )
    x_info = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
    y_info = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(a, n) for n, a in tensors.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "one", [x_info], [y_info], initializers)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    result: NDArray[np.float32] = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    return result


def dequantized_by_hand(blocks: Blocks) -> NDArray[np.float32]:
    rows = []
    for row in range(len(blocks.q_NBC)):
        values: list[float] = []
        for b, codes in enumerate(blocks.q_NBC[row]):
            zero = blocks.scheme.middle if blocks.zero_NB is None else int(blocks.zero_NB[row, b])
            values += [(int(q) - zero) * float(blocks.scale_NB[row, b]) for q in codes]
        rows.append(values)
    return np.array(rows, np.float32)


@pytest.mark.parametrize("scheme", [Scheme(8), *candidates([16, 32, 64])], ids=str)
@pytest.mark.parametrize("num_blocks", [2, 3])
def test_the_runtime_computes_with_the_weights_dequantised_by_hand(scheme: Scheme, num_blocks: int) -> None:
    width = num_blocks * scheme.block
    w = np.random.default_rng(0).normal(0.3, 1, (24, width)).astype(np.float32)
    blocks = quantize_matrix(w, scheme)
    by_hand = dequantized_by_hand(blocks)
    np.testing.assert_allclose(blocks.weights(), by_hand, rtol=1e-6)
    one_hot = np.eye(width, dtype=np.float32)  # exact also where activations are rounded to int8
    np.testing.assert_allclose(run_operator(blocks, one_hot), by_hand.T, atol=2e-6)


def test_every_operator_of_a_quantised_graph_is_one_that_browsers_have(made: tuple[Path, Path], tmp_path: Path) -> None:
    graph = onnx.load(quantized(made[1], tmp_path / "small", 4) / "model.onnx", load_external_data=False).graph
    own = {n.op_type for n in graph.node if n.domain == "com.microsoft"}
    assert own == {"MatMulNBits", "GroupQueryAttention", "SkipSimplifiedLayerNormalization"}


def test_four_bits_are_searched_not_just_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(1).normal(0, 1, (64, 256)).astype(np.float32)
    for scheme, tried in ((Scheme(4, 32, True), "SHRINK"), (Scheme(4, 32), "SYMMETRIC")):
        searched = np.square(quantize_matrix(w, scheme).weights() - w).mean()
        with monkeypatch.context() as patch:
            patch.setattr(f"edgeft.formats.onnx_blocks.{tried}", (1.0,))
            rounded = np.square(quantize_matrix(w, scheme).weights() - w).mean()
        assert searched < 0.95 * rounded


@pytest.mark.parametrize("scheme", candidates([32]), ids=str)
def test_inputs_that_matter_are_kept_more_exactly(scheme: Scheme) -> None:
    random = np.random.default_rng(2)
    w = random.normal(0, 1, (64, 256)).astype(np.float32)
    importance = np.exp(random.normal(0, 2, 256)).astype(np.float32)
    x = random.normal(0, 1, (512, 256)).astype(np.float32) * np.sqrt(importance)
    plain, weighted = (quantize_matrix(w, scheme, given).weights() for given in (None, importance))
    assert np.square(x @ (weighted - w).T).mean() < 0.8 * np.square(x @ (plain - w).T).mean()
    even = quantize_matrix(w, scheme, np.full(256, 7, np.float32)).weights()
    np.testing.assert_allclose(even, plain, atol=0.02)  # equal importance is no importance


def test_a_bit_must_pay_for_itself() -> None:
    small, large = Scheme(4, 64), Scheme(4, 16)  # 4.5 and 6 bits: 4 ** 1.5 = 8 times the error
    assert uses_bits_best([small, large], [0.7, 0.1]) == small
    assert uses_bits_best([small, large], [0.9, 0.1]) == large


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_of_zeros_and_of_one_sign_survive(bits: int) -> None:
    w = np.concatenate([np.zeros((1, 32)), np.full((1, 32), 2.5), np.full((1, 32), -2.5)], 1).astype(np.float32)
    np.testing.assert_allclose(quantize_matrix(w, SCHEMES[bits]).weights(), w, atol=1e-6)


def test_a_width_that_is_no_multiple_of_the_block_is_refused() -> None:
    with pytest.raises(ModelError, match="width 40"):
        quantize_matrix(np.zeros((2, 40), np.float32), SCHEMES[4])


def test_a_quantised_graph_is_not_quantised_again(made: tuple[Path, Path], tmp_path: Path) -> None:
    small = quantized(made[1], tmp_path / "small", 8)
    with pytest.raises(ModelError, match="no graph of onnxruntime-genai's builder in fp32"):
        quantize_graph(small / "model.onnx", tmp_path / "again.onnx", SCHEMES[4])


def test_half_precision_takes_half_the_bytes_and_predicts_the_same(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, package = made
    copy_companions(package, tmp_path)
    halve_graph(package / "model.onnx", tmp_path / "model.onnx")
    found = parity(tmp_path, model)
    assert found.kl_max < 1e-4
    assert sum(sizes(tmp_path).values()) < 0.6 * sum(sizes(package).values())


def test_a_weight_that_half_precision_cannot_hold_is_named(made: tuple[Path, Path], tmp_path: Path) -> None:
    graph = onnx.load(made[1] / "model.onnx")
    large = next(i for i in graph.graph.initializer if i.name.endswith("0.mlp.up_proj.MatMul.weight"))
    large.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(large) * np.float32(1e6), large.name))
    onnx.save(graph, tmp_path / "large.onnx")
    with pytest.raises(ModelError, match=r"up_proj.* beyond fp16's range"):
        halve_graph(tmp_path / "large.onnx", tmp_path / "half.onnx")


def test_keys_and_values_have_a_fixed_head_size(made: tuple[Path, Path], tmp_path: Path) -> None:
    for package in (made[1], quantized(made[1], tmp_path / "small", 4)):
        graph = onnx.load(package / "model.onnx", load_external_data=False).graph
        caches = [v for v in (*graph.input, *graph.output) if v.name.startswith(("past_key_values.", "present."))]
        assert len(caches) == 4 * 4 and {v.type.tensor_type.shape.dim[3].dim_value for v in caches} == {16}


class Recorded(dict[str, NDArray[np.float32]]):
    """A mapping that remembers what was asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        self.asked.add(name)
        return super().__getitem__(name)


def test_importance_is_found_under_the_models_own_names(made: tuple[Path, Path], tmp_path: Path) -> None:
    weights = load_file(made[0] / "model.safetensors")
    linear = {name: w.shape[1] for name, w in weights.items() if name.endswith("proj.weight")}
    importance = Recorded({name: np.ones(width, np.float32) for name, width in linear.items()})
    quantize_graph(made[1] / "model.onnx", tmp_path / "model.onnx", SCHEMES[4], importance)
    assert importance.asked == {n for n in linear if "k_proj" not in n and "v_proj" not in n}  # q, k, v are one matrix
    del importance["model.layers.2.mlp.down_proj.weight"]
    with pytest.raises(ModelError, match=r"nothing about model\.layers\.2\.mlp\.down_proj"):
        quantize_graph(made[1] / "model.onnx", tmp_path / "model.onnx", SCHEMES[4], importance)


def test_an_importance_of_another_model_is_refused() -> None:
    with pytest.raises(ModelError, match="importance of 3 inputs does not fit a matrix of width 64"):
        quantize_matrix(np.zeros((2, 64), np.float32), SCHEMES[4], np.ones(3, np.float32))


def test_a_failed_build_says_what_the_builder_said(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", architectures=["NoSuchForCausalLM"])
    with pytest.raises(ModelError, match=r"builder cannot export .*exit code 1\).*not currently supported"):
        build_onnx(model, tmp_path / "out")


def test_a_missing_companion_is_named(made: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(made[1], tmp_path / "package")
    (tmp_path / "package/chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat_template\.jinja"):
        copy_companions(tmp_path / "package", tmp_path)
