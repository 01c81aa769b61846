from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeft.errors import ArtifactError
from edgeft.formats.cost import bytes_per_token, cost_of
from edgeft.formats.gguf import write_gguf
from edgeft.formats.hf import read_config
from tests.formats.tiny_model import tiny_onnx, write_tiny_llama


def weights_of(model: Path) -> tuple[int, int]:
    """(all matrices, the embedding) of the tiny model, in elements, from its config."""
    c = read_config(model)
    hidden, ffn, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    head = c.get("head_dim") or hidden // c["num_attention_heads"]
    attention = 2 * hidden * head * (c["num_attention_heads"] + c["num_key_value_heads"])
    embedding = c["vocab_size"] * hidden
    return layers * (attention + 3 * hidden * ffn) + embedding, embedding


def test_a_gguf_file_with_a_tied_head_reads_its_embedding_whole(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    write_gguf(model, tmp_path / "model.gguf", "f32")
    matrices, embedding = weights_of(model)
    cost = cost_of(tmp_path)
    assert (cost.macs, cost.head_macs) == (matrices, embedding)
    norms = (2 * read_config(model)["num_hidden_layers"] + 1) * read_config(model)["hidden_size"]
    assert cost.read_bytes == bytes_per_token(tmp_path) == 4 * (matrices + norms)


def test_an_onnx_graph_of_the_same_model_costs_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    model, package = tiny_onnx(tmp_path_factory)
    matrices, embedding = weights_of(model)
    cost = cost_of(package)
    assert (cost.macs, cost.head_macs) == (matrices, embedding)
    assert 0 <= cost.read_bytes / (4 * matrices) - 1 < 0.03  # norms, and a row of the rotary tables


def test_of_a_table_that_is_only_looked_up_one_row_is_read(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.zeros((100, 8), np.float32), "table")
    head = numpy_helper.from_array(np.zeros((8, 100), np.float32), "head")
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("ids", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 100])], [table, head],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), str(tmp_path / "model.onnx"))
    cost = cost_of(tmp_path)
    assert (cost.read_bytes, cost.macs, cost.head_macs) == (4 * 8 + 4 * 800, 800, 800)


def test_a_folder_without_a_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"neither model\.gguf nor model\.onnx"):
        bytes_per_token(tmp_path)
