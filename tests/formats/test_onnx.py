from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeft.bench.session import open_session
from edgeft.errors import ModelError
from edgeft.formats.onnx import MODEL_FILES, build_onnx, copy_companions
from edgeft.formats.onnx_quant import BLOCK, Blocks, pack, quantize_graph, quantize_matrix
from edgeft.formats.parity import Parity, compare
from tests.formats.tiny_model import TEXTS, make_probe, tiny_onnx, write_tiny_llama

PER_WEIGHT = {8: 1 + 4 / BLOCK, 4: 0.5 + (4 + 0.5) / BLOCK}  # bytes, with scales and, for 4 bits, zero points


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of model and fp32 package."""
    return tiny_onnx(tmp_path_factory, tie=request.param)


def quantized(package: Path, out: Path, bits: int) -> Path:
    out.mkdir(exist_ok=True)
    quantize_graph(package / "model.onnx", out / "model.onnx", bits)
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
    for name in MODEL_FILES:
        assert (package / name).read_bytes() == (model / name).read_bytes(), name
    settings = json.loads((package / "genai_config.json").read_text())
    assert settings["model"]["eos_token_id"] == [2]


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
    first = (quantized(made[1], tmp_path / "out", 4) / "model.onnx.data").stat().st_size
    assert (quantized(made[1], tmp_path / "out", 4) / "model.onnx.data").stat().st_size == first


def test_codes_are_packed_lower_half_first() -> None:
    assert pack(np.array([[1, 2, 3], [15, 0, 9]], np.uint8), 4).tolist() == [[0x21, 0x03], [0x0F, 0x09]]
    assert pack(np.array([200, 7], np.uint8), 8).tolist() == [200, 7]


def test_the_bytes_of_a_known_block() -> None:
    w = np.arange(-8, 8, 0.5, dtype=np.float32)[None]  # a range of 15.5
    eight = quantize_matrix(w, 8)
    assert eight.zero_NB.tolist() == [[128]]
    assert eight.scale_NB == pytest.approx(8 / 127)
    assert eight.q_NBC[0, 0, [0, 16, 31]].tolist() == [1, 128, 128 + round(7.5 * 127 / 8)]
    four = quantize_matrix(np.repeat(np.arange(-8, 8, dtype=np.float32), 2)[None], 4)  # 16 steps fit exactly
    assert (four.scale_NB.item(), four.zero_NB.item()) == (1.0, 8)
    assert pack(four.q_NBC, 4).tobytes().hex() == "00112233445566778899aabbccddeeff"


def run_operator(kind: str, blocks: Blocks, x: NDArray[np.generic]) -> NDArray[np.float32]:
    """One operator over the stored tensors, as onnxruntime computes it."""
    num_rows, num_blocks = blocks.scale_NB.shape
    tensors = {"q": pack(blocks.q_NBC, blocks.bits), "scale": blocks.scale_NB}
    if blocks.bits == 4:
        tensors["zero"] = pack(blocks.zero_NB, 4)
    if kind == "GatherBlockQuantized":
        tensors["scale"] = blocks.scale_NB[..., None]
        attributes = {"gather_axis": 0, "quantize_axis": 2, "bits": 8, "block_size": BLOCK}
        inputs = ["q", "x", "scale"]
    else:
        attributes = {"K": num_blocks * BLOCK, "N": num_rows, "bits": blocks.bits, "block_size": BLOCK}
        attributes["accuracy_level"] = 4
        inputs = ["x", *tensors]
    node = helper.make_node(kind, inputs, ["y"], domain="com.microsoft", **attributes)
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
            values += [(int(q) - int(blocks.zero_NB[row, b])) * float(blocks.scale_NB[row, b]) for q in codes]
        rows.append(values)
    return np.array(rows, np.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_blocks", [2, 3])
def test_the_runtime_computes_with_the_weights_dequantised_by_hand(bits: int, num_blocks: int) -> None:
    w = np.random.default_rng(0).normal(0.3, 1, (24, num_blocks * BLOCK)).astype(np.float32)
    blocks = quantize_matrix(w, bits)
    by_hand = dequantized_by_hand(blocks)
    np.testing.assert_array_equal(blocks.weights(), by_hand)
    one_hot = np.eye(num_blocks * BLOCK, dtype=np.float32)  # exact also where activations are rounded to int8
    np.testing.assert_allclose(run_operator("MatMulNBits", blocks, one_hot), by_hand.T, atol=2e-6)


def test_the_runtime_reads_embeddings_from_the_same_tensors() -> None:
    blocks = quantize_matrix(np.random.default_rng(0).normal(0, 1, (10, 64)).astype(np.float32), 8)
    found = run_operator("GatherBlockQuantized", blocks, np.array([[3, 9]], np.int64))
    np.testing.assert_allclose(found.reshape(2, 64), dequantized_by_hand(blocks)[[3, 9]], atol=1e-6)


def test_four_bits_are_searched_not_just_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(1).normal(0, 1, (64, 256)).astype(np.float32)
    searched = np.square(quantize_matrix(w, 4).weights() - w).mean()
    monkeypatch.setattr("edgeft.formats.onnx_quant.SHRINK", (1.0,))
    rounded = np.square(quantize_matrix(w, 4).weights() - w).mean()
    assert searched < 0.95 * rounded


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_of_zeros_and_of_one_sign_survive(bits: int) -> None:
    w = np.concatenate([np.zeros((1, 32)), np.full((1, 32), 2.5), np.full((1, 32), -2.5)], 1).astype(np.float32)
    np.testing.assert_allclose(quantize_matrix(w, bits).weights(), w, atol=1e-6)


def test_a_width_that_is_no_multiple_of_the_block_is_refused() -> None:
    with pytest.raises(ModelError, match="width 40"):
        quantize_matrix(np.zeros((2, 40), np.float32), 4)


def test_a_quantised_graph_is_not_quantised_again(made: tuple[Path, Path], tmp_path: Path) -> None:
    small = quantized(made[1], tmp_path / "small", 8)
    with pytest.raises(ModelError, match="no graph of onnxruntime-genai's builder in fp32"):
        quantize_graph(small / "model.onnx", tmp_path / "again.onnx", 4)


def test_a_failed_build_says_what_the_builder_said(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", architectures=["NoSuchForCausalLM"])
    with pytest.raises(ModelError, match=r"builder cannot export .*exit code 1\).*not currently supported"):
        build_onnx(model, tmp_path / "out")


def test_a_missing_companion_is_named(made: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(made[1], tmp_path / "package")
    (tmp_path / "package/chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat_template\.jinja"):
        copy_companions(tmp_path / "package", tmp_path)
