"""The pipeline: everything is made once, resumed after a kill, and never left half-made under its final name."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeft.artifact import CHECKPOINT_DIR, Artifact, open_artifact, verify
from edgeft.errors import DataError, RecipeError
from edgeft.pipeline import STAGES, Pipeline, plan
from edgeft.plan import ExportNode, Node
from edgeft.recipe import load_recipe
from tests import fakes

ROOT = Path(__file__).resolve().parent.parent
ALL = ["words", "shout", "chain", "report"]


def make(folder: Path, *overrides: str, to: str | None = None) -> dict[str, Artifact]:
    return pipeline_in(folder, *overrides).run(to)


def pipeline_in(folder: Path, *overrides: str) -> Pipeline:
    recipe = folder / "fake.yaml"
    if not recipe.exists():
        fakes.write_recipe(folder)
    return Pipeline(load_recipe(recipe, overrides), folder / "runs")


def edgeft(folder: Path, *overrides: str, **env: str) -> subprocess.Popen[str]:
    """`edgeft run` over the fake stages in a process of its own."""
    if not (folder / "fake.yaml").exists():
        fakes.write_recipe(folder)
    sets = [part for override in overrides for part in ("--set", override)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fakes", "run", str(folder / "fake.yaml"), "--runs", str(folder / "runs"), *sets],
        cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(folder: Path, stage: str) -> list[Path]:
    return [p.parent for p in (folder / "runs").glob(f"{stage}-*/manifest.json") if ".partial" not in str(p)]


def test_a_run_leaves_whole_artifacts_that_verify(tmp_path: Path, fake_stages: list[str]) -> None:
    made = make(tmp_path)
    assert fake_stages == ALL and list(made) == ALL
    assert all(verify(artifact) == [] for artifact in made.values())
    assert made["chain"].manifest.inputs == {"loud": made["shout"].digest}
    assert made["chain"].metrics == {"steps": 5}
    assert not (made["chain"].path / CHECKPOINT_DIR).exists()
    assert not list((tmp_path / "runs").glob("*.partial"))


def test_a_second_run_does_nothing(tmp_path: Path, fake_stages: list[str]) -> None:
    first = make(tmp_path)
    fake_stages.clear()
    second = make(tmp_path)
    assert fake_stages == []
    assert {n: a.digest for n, a in first.items()} == {n: a.digest for n, a in second.items()}


def test_a_changed_setting_reruns_only_what_depends_on_it(tmp_path: Path, fake_stages: list[str]) -> None:
    make(tmp_path)
    fake_stages.clear()
    make(tmp_path, "targets.top_k=6")
    assert fake_stages == ["chain", "report"]
    fake_stages.clear()
    make(tmp_path)  # the old settings are still there
    assert fake_stages == []


def test_a_changed_source_file_reruns_what_reads_it(tmp_path: Path, fake_stages: list[str]) -> None:
    make(tmp_path)
    fake_stages.clear()
    (tmp_path / "words.txt").write_text("other words")
    make(tmp_path)
    assert fake_stages == ALL


def test_the_same_content_under_another_name_is_the_same_run(tmp_path: Path, fake_stages: list[str]) -> None:
    make(tmp_path)
    fake_stages.clear()
    (tmp_path / "copy.txt").write_text("some words")
    make(tmp_path, f"data.train={tmp_path / 'copy.txt'}")
    assert fake_stages == []


def test_an_input_that_comes_out_equal_saves_what_follows(tmp_path: Path, fake_stages: list[str]) -> None:
    make(tmp_path)
    fake_stages.clear()
    (tmp_path / "words.txt").write_text("SOME WORDS")  # other source, but shouted it is the same
    make(tmp_path)
    assert fake_stages == ["words", "shout"]


def test_a_new_stage_version_makes_a_new_artifact(
    tmp_path: Path, fake_stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make(tmp_path)
    fake_stages.clear()
    fakes.install(monkeypatch.setattr, versions={"chain": 2})
    new = make(tmp_path)
    assert "words" not in fake_stages and "chain" in fake_stages
    assert new["chain"].path != old["chain"].path


def test_to_stops_after_a_stage(tmp_path: Path, fake_stages: list[str]) -> None:
    assert list(make(tmp_path, to="shout")) == ["words", "shout"]
    assert fake_stages == ["words", "shout"]


def test_to_an_unknown_stage_lists_the_known_ones(tmp_path: Path, fake_stages: list[str]) -> None:
    with pytest.raises(RecipeError, match="words, shout, chain, report"):
        make(tmp_path, to="merge")


def test_a_missing_source_file_is_named_before_any_work(tmp_path: Path, fake_stages: list[str]) -> None:
    with pytest.raises(DataError, match="gone.txt: no such file"):
        make(tmp_path, f"data.train={tmp_path / 'gone.txt'}")
    assert fake_stages == []


def test_a_crash_leaves_no_artifact_and_keeps_the_checkpoints(
    tmp_path: Path, fake_stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL_AT", "3")
    with pytest.raises(RuntimeError, match="on purpose"):
        make(tmp_path)
    assert finished(tmp_path, "shout") and not finished(tmp_path, "chain")
    assert len(list((tmp_path / "runs").glob("chain-*.partial/checkpoints/state.json"))) == 1


def test_a_retry_resumes_and_finds_no_leftovers(
    tmp_path: Path, fake_stages: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_FAIL_AT", "3")
    with pytest.raises(RuntimeError):
        make(tmp_path)
    monkeypatch.delenv("FAKE_FAIL_AT")
    pipeline = pipeline_in(tmp_path)
    pipeline.stream = sys.stderr
    resumed = pipeline.run()["chain"]
    assert "chain: resumes at step 3" in capsys.readouterr().err
    assert list(resumed.manifest.files) == ["value.txt"]  # scratch.txt of the crashed try is gone


def test_checkpoints_of_other_settings_are_not_used(
    tmp_path: Path, fake_stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL_AT", "3")
    with pytest.raises(RuntimeError):
        make(tmp_path)
    monkeypatch.delenv("FAKE_FAIL_AT")
    (tmp_path / "clean").mkdir()
    assert (
        make(tmp_path, "task.label=huh")["chain"].digest == make(tmp_path / "clean", "task.label=huh")["chain"].digest
    )


def test_a_killed_run_resumes_to_the_digest_of_an_unbroken_one(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir(), whole.mkdir()
    first = edgeft(killed, FAKE_KILL_AT="3")
    first.communicate(timeout=60)
    assert first.returncode == -9
    assert not finished(killed, "chain")
    again = edgeft(killed)
    assert "resumes at step 3" in again.communicate(timeout=60)[1] and again.returncode == 0
    unbroken = edgeft(whole)
    assert "resumes at" not in unbroken.communicate(timeout=60)[1]
    digests = [open_artifact(finished(folder, "chain")[0]).digest for folder in (killed, whole)]
    assert digests[0] == digests[1]


def test_two_processes_at_once_make_everything_once(tmp_path: Path) -> None:
    calls = tmp_path / "calls.txt"
    both = [edgeft(tmp_path, FAKE_STEP_S="0.3", FAKE_CALLS=str(calls)) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert calls.read_text().split() == ALL
    assert any("waiting: another edgeft process" in text for text in said)


def test_the_lock_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    edgeft(tmp_path, FAKE_KILL_AT="1").communicate(timeout=60)
    start = time.monotonic()
    again = edgeft(tmp_path)
    again.communicate(timeout=60)
    assert again.returncode == 0 and time.monotonic() - start < 30


def test_a_folder_without_manifest_under_a_final_name_is_made_again(tmp_path: Path, fake_stages: list[str]) -> None:
    (made := make(tmp_path)["chain"].path / "manifest.json").unlink()
    fake_stages.clear()
    assert make(tmp_path)["chain"].path == made.parent
    assert fake_stages == ["chain"]


def test_every_input_of_the_real_plan_comes_before_it(tmp_path: Path) -> None:
    nodes = plan(load_recipe(fakes.write_recipe(tmp_path)))
    names = list(nodes)
    for node in nodes.values():
        assert all(names.index(source) < names.index(node.name) for source in node.inputs.values())
        assert node.stage in STAGES
    assert names[-1] == "report" and set(names) - set(nodes["report"].inputs.values()) >= {"base", "targets"}


def test_a_recipe_without_student_has_no_distillation(tmp_path: Path) -> None:
    nodes = plan(load_recipe(fakes.write_recipe(tmp_path), ("student=null",)))
    assert not {"student", "targets", "distill", "probe-student"} & set(nodes)
    assert not any(name.startswith("student") for name in nodes)


READY = "student={model: /somewhere/small}"


def nodes_of(folder: Path, *overrides: str) -> dict[str, Node]:
    return plan(load_recipe(fakes.write_recipe(folder), overrides))


def test_a_ready_made_student_is_loaded_as_a_base_and_fitted_to_it_before_anything_is_trained(tmp_path: Path) -> None:
    nodes = nodes_of(tmp_path, READY)
    assert nodes["student"].stage == "base" and nodes["student"].inputs == {"teacher": "base"}
    assert nodes["student"].sources == {"model": Path("/somewhere/small")}
    assert list(nodes).index("student") < list(nodes).index("train")
    assert nodes["distill"].inputs == {"model": "student", "targets": "targets", "dataset": "data"}


def test_answers_need_no_tokenizer_in_common_and_no_targets(tmp_path: Path) -> None:
    nodes = nodes_of(tmp_path, READY, "targets.kind=answers")
    assert nodes["student"].inputs == {} and "targets" not in nodes
    assert nodes["answers"].inputs == {"model": "merge", "dataset": "data"}
    assert nodes["distill"].inputs == {"model": "student", "dataset": "answers"}


def test_a_transfer_set_is_answered_for_the_student_and_trains_no_teacher_again(tmp_path: Path) -> None:
    nodes, before = nodes_of(tmp_path, "data.transfer=/somewhere/more.jsonl"), nodes_of(tmp_path)
    assert nodes["transfer"].inputs == {"dataset": "data"}
    assert nodes["answers"].inputs == {"model": "merge", "dataset": "data", "transfer": "transfer"}
    assert {name: nodes[name].inputs["dataset"] for name in ("student", "targets", "distill", "train")} == {
        "student": "answers", "targets": "answers", "distill": "answers", "train": "data",
    }  # fmt: skip
    assert all(nodes[name] == before[name] for name in ("base", "data", "train", "merge"))
    assert nodes["report"].inputs["transfer"] == "transfer"


def test_only_a_student_that_answers_has_the_teacher_beside_it(tmp_path: Path) -> None:
    assert "teacher" not in nodes_of(tmp_path)["distill"].inputs
    assert nodes_of(tmp_path, "distill.on_policy=0.25")["distill"].inputs["teacher"] == "merge"


def test_types_below_8_bits_know_what_matters(tmp_path: Path) -> None:
    recipe = fakes.write_recipe(tmp_path)
    nodes = plan(load_recipe(recipe, ("export.gguf=[f32,bf16,q8_0,q4_k_m,iq4_xs]", "export.onnx=[]")))
    assert nodes["importance-teacher"].inputs == {"model": "merge", "dataset": "data"}
    given = {name for name, node in nodes.items() if "importance" in node.inputs}
    assert given == {f"{model}-gguf-{quant}" for model in ("teacher", "student") for quant in ("q4_k_m", "iq4_xs")}
    assert "full" not in nodes["teacher-gguf-bf16"].inputs
    without = plan(load_recipe(recipe, ("export.importance=none", "export.onnx=[]")))
    assert not any(node.stage == "importance" or "importance" in node.inputs for node in without.values())


def test_the_order_of_type_rules_is_part_of_a_package(tmp_path: Path) -> None:
    recipe = fakes.write_recipe(tmp_path)
    rules = ("{head: q8_0, '*': q6_k}", "{'*': q6_k, head: q8_0}")
    configs = [plan(load_recipe(recipe, (f"export.tensor_types={r}",)))["teacher-gguf-q4_k_m"].config for r in rules]
    assert configs[0].model_dump_json() != configs[1].model_dump_json()


def test_the_adapter_is_exported_unmerged_if_asked(tmp_path: Path) -> None:
    recipe = fakes.write_recipe(tmp_path)
    assert "adapter-gguf-lora" not in plan(load_recipe(recipe))
    assert plan(load_recipe(recipe, ("export.lora=true",)))["adapter-gguf-lora"].inputs["adapter"] == "train"


def test_a_quantised_package_brings_its_full_precision_one(tmp_path: Path) -> None:
    nodes = plan(load_recipe(fakes.write_recipe(tmp_path), ("export.gguf=[q8_0]", "export.onnx=[]")))
    assert nodes["student-gguf-q8_0"].inputs["full"] == "student-gguf-f16"
    assert "bench-student-gguf-f16" not in nodes  # made, but not asked for
    assert not any("onnx" in name for name in nodes)


@pytest.mark.parametrize(
    ("settings", "floor"),
    [
        ((), "gguf-q8_0"),
        (("export.onnx=[]", "export.gguf=[f16]"), "gguf-q8_0"),
        (("export.gguf=[]",), "onnx-int8"),
        (("export.gguf=[]", "export.onnx=[fp32]", "export.exporter=optimum"), "onnx-fp32"),
    ],
)
def test_the_untouched_base_is_measured_in_a_format_that_the_recipe_exports(
    settings: tuple[str, ...], floor: str, tmp_path: Path
) -> None:
    nodes = nodes_of(tmp_path, *settings)
    assert nodes[f"bench-base_fewshot-{floor}"].inputs == {"package": f"base-{floor}", "dataset": "data"}
    assert f"bench-base_fewshot-{floor}" in nodes["report"].inputs
    formats = {node.config.format for node in nodes.values() if isinstance(node.config, ExportNode)}
    recipe = load_recipe(tmp_path / "fake.yaml", settings)
    assert formats == {name for name in ("gguf", "onnx") if getattr(recipe.export, name)}


def test_a_student_cut_in_steps_is_healed_after_each_and_ends_under_the_same_names(tmp_path: Path) -> None:
    settings = ("student.steps=3", "student.vocabulary=999", "distill.epochs=3", "distill.evaluations=4")
    once, nodes = (plan(load_recipe(fakes.write_recipe(tmp_path), given)) for given in (settings[1:], settings))
    chain = [name for name, node in nodes.items() if node.stage in ("student", "distill")]
    assert chain == ["student-1", "distill-1", "student-2", "distill-2", "student", "distill"]
    for before, name in zip(chain, chain[1:], strict=False):
        assert nodes[name].inputs["model"] == before
    assert nodes["student-1"].inputs["model"] == "merge" and "cut" not in nodes["student-1"].inputs
    assert (nodes["student-2"].inputs["cut"], nodes["student"].inputs["cut"]) == ("student-1", "student-2")
    assert {nodes[name].inputs["targets"] for name in chain[1::2]} == {"targets"}
    cuts = [nodes[name].config.model_dump() for name in chain[::2]]
    assert [(cut["steps_left"], cut["student"]["vocabulary"]) for cut in cuts] == [(3, 999), (2, None), (1, None)]
    healings = [nodes[name].config.model_dump() for name in chain[1::2]]
    assert [(h["epochs"], h["evaluations"], h["seed"]) for h in healings] == [(1, 2, 2), (1, 2, 1), (1, 2, 0)]
    assert [n for n in once if n not in nodes] == []
    assert {n for n in nodes if n not in once} == set(chain[:-2])
    assert set(chain[1::2]) <= nodes["report"].inputs.keys()
    assert once["distill"].config.model_dump()["epochs"] == 3


def test_merging_knows_the_narrowest_package_and_the_other_adapters(tmp_path: Path) -> None:
    recipe = fakes.write_recipe(tmp_path)

    def merging(*settings: str) -> Node:
        return plan(load_recipe(recipe, settings))["merge"]

    assert merging("export.gguf=[f16]", "export.onnx=[fp32,int4]").config.model_dump()["bits"] == 4
    assert merging("export.gguf=[f16,q8_0]", "export.onnx=[fp32]").config.model_dump()["bits"] == 8
    assert merging("export.gguf=[f16]", "export.onnx=[]").config.model_dump()["bits"] is None
    (tmp_path / "other").mkdir()
    node = merging(f"merge.adapters=[{{adapter: {tmp_path / 'other'}, weight: 0.5}}]")
    assert node.sources == {"adapter 1": tmp_path / "other"}  # what it holds is part of the key
    with pytest.raises(RecipeError, match=r"merge\.adapters: only an adapter of init lora"):
        load_recipe(recipe, (f"merge.adapters=[{{adapter: {tmp_path}}}]", "train.method=full"))


def test_forms_of_onnx_packages_go_to_onnx_packages_and_names_to_gguf(tmp_path: Path) -> None:
    recipe = fakes.write_recipe(tmp_path)
    settings = ("export.onnx=[fp32,int8]", "export.gguf=[f16,q8_0]", "export.onnx_static=64", "export.onnx_ort=true")
    nodes = {name: node.config.model_dump() for name, node in plan(load_recipe(recipe, settings)).items()}
    assert (nodes["teacher-onnx-int8"]["static"], nodes["teacher-onnx-int8"]["ort"]) == (64, True)
    assert (nodes["teacher-gguf-q8_0"]["static"], nodes["teacher-gguf-q8_0"]["ort"]) == (None, False)
    assert nodes["student-gguf-f16"]["name"].endswith("-student") and nodes["student-gguf-q8_0"]["name"] is None
    with pytest.raises(RecipeError, match="optimum writes fp32 and fp16 alone; leave out int8"):
        load_recipe(recipe, ("export.exporter=optimum", "export.onnx=[fp32,int8]"))
