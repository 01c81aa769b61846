from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeft.bench.footprint import BITS, read_footprint
from edgeft.errors import ArtifactError
from edgeft.formats.gguf import write_gguf as write_whole_gguf
from edgeft.formats.hf import read_config
from edgeft.formats.onnx import copy_companions
from edgeft.formats.onnx_half import halve_graph
from edgeft.shrink.shape import Shape
from tests.formats.tiny_model import tiny_onnx

WIDTH, INNER, VOCAB, LAYERS = 64, 96, 50, 2


def write_gguf(folder: Path, tied: bool, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0) -> None:
    """A decoder without values: matrices of one type, norms in float32."""
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    shapes = {"token_embd": (VOCAB, WIDTH)} | ({} if tied else {"output": (VOCAB, WIDTH)})
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_q": (WIDTH, WIDTH), f"blk.{layer}.ffn_up": (INNER, WIDTH)}
    for name, shape in shapes.items():
        data = gguf.quantize(np.zeros(shape, np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_onnx(folder: Path) -> None:
    """One 4-bit product, one in float, an embedding that is only looked up."""
    blocks = WIDTH // 32
    tensors = [
        helper.make_tensor("packed", TensorProto.UINT8, [INNER, blocks, 16], bytes(INNER * blocks * 16), raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT, [INNER, blocks], bytes(INNER * blocks * 4), raw=True),
        helper.make_tensor("head", TensorProto.FLOAT, [INNER, VOCAB], bytes(INNER * VOCAB * 4), raw=True),
        helper.make_tensor("table", TensorProto.FLOAT, [VOCAB, WIDTH], bytes(VOCAB * WIDTH * 4), raw=True),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMulNBits", ["x", "packed", "scales"], ["y"], bits=4, K=WIDTH, N=INNER, block_size=32),
        helper.make_node("MatMul", ["y", "head"], ["logits"], name="/lm_head/MatMul"),
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), str(folder / "model.onnx"))
    decoder = {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_size": 8, "hidden_size": WIDTH}
    facts = {"vocab_size": VOCAB, "decoder": decoder, "eos_token_id": 2}
    config = {"model": facts, "search": {"past_present_share_buffer": True}}
    (folder / "genai_config.json").write_text(json.dumps(config))


def test_a_tied_embedding_is_read_once_per_token_as_the_head(tmp_path: Path) -> None:
    write_gguf(tmp_path, tied=True)
    found = read_footprint(tmp_path)
    body = LAYERS * (WIDTH * WIDTH + INNER * WIDTH)
    assert (found.layers, found.head) == ({"q8_0": body}, {"q8_0": VOCAB * WIDTH})
    assert found.decode_bytes == (body + VOCAB * WIDTH) * BITS["q8_0"] / 8
    assert found.tied_head_bytes == VOCAB * WIDTH * BITS["q8_0"] / 8
    assert (found.vocab, found.width) == (VOCAB, WIDTH)
    assert found.cache_bytes_per_token == LAYERS * 2 * (16 + 16) * 2  # 2 of 4 heads, keys and values of 16 in f16


def test_an_untied_embedding_takes_memory_but_is_not_read_for_a_token(tmp_path: Path) -> None:
    write_gguf(tmp_path, tied=False)
    found = read_footprint(tmp_path)
    table = VOCAB * WIDTH * BITS["q8_0"] / 8
    assert found.resident_bytes == found.decode_bytes + table + WIDTH * 4
    assert found.head == {"q8_0": VOCAB * WIDTH}
    assert found.tied_head_bytes == 0


@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q5_0", "Q6_K", "Q4_K"])
def test_the_sizes_of_block_types_are_those_of_the_gguf_package(name: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert BITS[name.lower()] == 8 * size / block


def test_an_onnx_graph_gives_weights_by_their_width_and_the_head_apart(tmp_path: Path) -> None:
    write_onnx(tmp_path)
    found = read_footprint(tmp_path)
    assert (found.layers, found.head) == ({"int4": WIDTH * INNER}, {"f32": INNER * VOCAB})
    assert found.decode_bytes == INNER * 2 * 16 + INNER * 2 * 4 + INNER * VOCAB * 4
    assert found.resident_bytes == found.decode_bytes + VOCAB * WIDTH * 4
    assert found.cache_bytes_per_token == 3 * 2 * 8 * 2 * 4


def test_every_package_of_a_model_multiplies_with_all_its_matrices(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, package = tiny_onnx(tmp_path_factory)
    shape = Shape.of(read_config(model))
    halved, llama = tmp_path / "fp16", tmp_path / "gguf"
    for folder in (halved, llama):
        folder.mkdir()
    copy_companions(package, halved)
    halve_graph(package / "model.onnx", halved / "model.onnx")
    write_whole_gguf(model, llama / "model.gguf", "f32")
    for folder in (package, halved, llama):
        found = read_footprint(folder)
        assert sum(found.weights.values()) == shape.parameters, folder.name
        assert found.head == {"f32": shape.vocabulary * shape.hidden}
        assert found.decode_bytes == 4 * shape.parameters


def test_a_folder_that_is_no_package_and_a_damaged_file_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="neither"):
        read_footprint(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(8))
    with pytest.raises(ArtifactError, match="readable GGUF"):
        read_footprint(tmp_path)
    (tmp_path / "model.gguf").unlink()
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff")
    with pytest.raises(ArtifactError, match="readable ONNX"):
        read_footprint(tmp_path)
