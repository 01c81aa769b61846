"""Other forms of an ONNX package predict what the package predicts; what breaks one is caught."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgeft.bench.ort import OrtSession
from edgeft.bench.variants import check_variant
from edgeft.errors import DataError, ParityError
from edgeft.formats.onnx import WEIGHTS
from edgeft.formats.onnx_variants import OPERATORS, ORT, STATIC, align_weights, write_ort, write_static
from tests.formats.tiny_model import TEXTS, make_probe, tiny_onnx

CONTEXT = 64


@pytest.fixture
def made(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a copy of its package."""
    model, package = tiny_onnx(tmp_path_factory)
    return model, Path(shutil.copytree(package, tmp_path / "package"))


def test_fixed_shapes_predict_the_same_one_token_at_a_time(made: tuple[Path, Path]) -> None:
    model, package = made
    write_static(package, CONTEXT)
    probe = make_probe(model, TEXTS)
    check_variant(package, STATIC, probe, 1)
    shapes = [v.type.tensor_type.shape.dim for v in onnx.load(package / STATIC, load_external_data=False).graph.input]
    assert all(d.dim_value > 0 for dims in shapes for d in dims)
    session, whole = (OrtSession(package / name, 1, CONTEXT) for name in (STATIC, "model.onnx"))
    rows = [ids[:20] for ids in probe.rows]
    assert session.generate(rows, 6) == whole.generate(rows, 6)
    with pytest.raises(DataError, match=f"opened for {CONTEXT}"):
        session.prefill([5] * (CONTEXT + 1))


def test_the_ort_form_predicts_the_same_and_lists_its_operators(made: tuple[Path, Path]) -> None:
    model, package = made
    write_ort(package)
    check_variant(package, ORT, make_probe(model, TEXTS), 1)
    assert "GroupQueryAttention" in (package / OPERATORS).read_text()
    assert not list(package.glob("*.onnx_data*"))[1:], "nothing else is left behind"


def test_a_form_of_another_model_is_caught(made: tuple[Path, Path]) -> None:
    model, package = made
    broken = onnx.load(package / "model.onnx")
    norm = next(i for i in broken.graph.initializer if "final_norm" in i.name)
    norm.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(norm), norm.name))
    onnx.save(broken, package / STATIC)
    with pytest.raises(ParityError, match=r"model\.static\.onnx predicts otherwise"):
        check_variant(package, STATIC, make_probe(model, TEXTS), 1)


def test_large_weights_begin_where_they_can_be_mapped(made: tuple[Path, Path]) -> None:
    _, package = made
    before = {i.name: numpy_helper.to_array(i) for i in onnx.load(package / "model.onnx").graph.initializer}
    align_weights(package, 4096)
    graph = onnx.load(package / "model.onnx", load_external_data=False).graph
    places = [{e.key: e.value for e in i.external_data} for i in graph.initializer if i.external_data]
    large = [place for place in places if int(place["length"]) >= 4096]
    assert large and all(int(place["offset"]) % 4096 == 0 for place in large)
    assert (package / WEIGHTS).stat().st_size >= sum(int(place["length"]) for place in places)
    for initializer in onnx.load(package / "model.onnx").graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(initializer), before[initializer.name])
