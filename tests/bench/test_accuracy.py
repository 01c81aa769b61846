from __future__ import annotations

import json
import math
from typing import Any

import pytest
from sacrebleu import sentence_chrf

from edgeft.bench.accuracy import context_needed, evaluate, prepare
from edgeft.bench.task import Task, reply_of
from edgeft.errors import DataError

TASK = Task("intent", "entities")


def answer(intent: str, reply: str = "On it.", **fields: Any) -> str:
    return json.dumps({"intent": intent, "entities": fields}) + ("\n" + reply if reply else "")


def row(user: str, reference: str, system: str = "Be brief.") -> dict[str, Any]:
    roles = (("system", system), ("user", user), ("assistant", reference))
    return {"messages": [{"role": r, "content": c} for r, c in roles], "meta": {"id": f"id-{user}"}}


ROWS = [
    row("one", answer("track", order_id="AF-1")),
    row("two", answer("track", order_id="AF-2")),
    row("three", answer("cancel")),
    row("four", answer("cancel", date="today")),
]


def measured(session: Any, rows: list[dict[str, Any]] = ROWS, **more: Any) -> Any:
    return evaluate(session, prepare(session, rows, TASK, **more), TASK, max_new_tokens=200)


def test_right_answers_score_one_everywhere(fake_session: Any) -> None:
    session = fake_session({r["messages"][1]["content"]: r["messages"][2]["content"] for r in ROWS})
    figures = measured(session).figures
    for name in ("json_valid", "intent_accuracy", "joint_exact_match", "intent_macro_f1"):
        assert figures[name][0] == 1.0, name
    assert figures["reply_chrf"][0] == pytest.approx(100.0)
    assert figures["n"] == figures["n_json"] == figures["n_reply"] == 4


def test_each_kind_of_mistake_costs_what_it_should(fake_session: Any) -> None:
    session = fake_session(
        {
            "one": answer("track", order_id="AF-9"),  # right label, wrong value
            "two": answer("cancel", order_id="AF-2"),  # wrong label
            "three": '{"intent": "cancel", "entities": []}\nOn it.',  # fields of the wrong type
            "four": "I would cancel it today.",  # no JSON
        }
    )
    found = measured(session)
    judged = [(r["json_valid"], r["intent_correct"], r["joint_correct"]) for r in found.rows]
    assert judged == [(True, True, False), (True, False, False), (False, True, False), (False, False, False)]
    assert found.figures["joint_exact_match"][0] == 0.0
    assert found.figures["intent_accuracy"][0] == 0.5


def test_values_are_compared_as_stripped_text_and_exactly(fake_session: Any) -> None:
    rows = [row("a", answer("x", amount="12")), row("b", answer("x", name="Ann")), row("c", answer("x", name="Ann"))]
    session = fake_session(
        {
            "a": answer("x", amount=12),
            "b": answer("x", name=" Ann "),
            "c": answer("x", name="ann"),
        }
    )
    assert [r["joint_correct"] for r in measured(session, rows).rows] == [True, True, False]


def test_a_field_too_many_is_a_miss(fake_session: Any) -> None:
    session = fake_session({"three": answer("cancel", date="now")})
    assert measured(session, [ROWS[2]]).rows[0]["joint_correct"] is False


def test_the_reply_is_scored_without_the_json_line(fake_session: Any) -> None:
    rows = [row("a", answer("x", reply="Your parcel is on its way."))]
    session = fake_session({"a": answer("wrong", reply="Your parcel is late.")})
    found = measured(session, rows)
    score = found.rows[0]["chrf"]
    assert score == pytest.approx(sentence_chrf("Your parcel is late.", ["Your parcel is on its way."]).score)
    assert found.rows[0]["rouge_l"] == pytest.approx(100 * 2 * 3 / (4 + 6))
    assert found.figures["reply_rouge_l"][0] == found.rows[0]["rouge_l"] and found.figures["n_reply"] == 1


def test_perplexity_is_one_over_the_probability_of_the_reference_tokens(fake_session: Any) -> None:
    found = measured(fake_session({}, next_probability=0.25))
    assert found.figures["perplexity"] == pytest.approx(4.0, rel=1e-5)
    assert found.rows[0]["nll"] == pytest.approx(math.log(4.0), rel=1e-5)
    reference = ROWS[0]["messages"][2]["content"]
    assert found.rows[0]["num_answer_tokens"] == len(reference) + 1  # the end of the turn is predicted too


def test_the_reference_answer_is_not_in_the_prompt(fake_session: Any) -> None:
    session = fake_session({})
    measured(session, [ROWS[0]])
    assert session.prompts == ["<system>Be brief.<user>one<assistant>"]


@pytest.mark.parametrize(
    "reference",
    [
        answer("track", "Your parcel is late."),  # the answer itself
        answer("track", "Your parcel will come."),  # parts from it in the reply
        answer("cancel", "Your parcel is late."),  # in the label
        answer("track", "Your parcel is late. Sorry!"),  # goes on after it
        answer("track", "Your parcel"),  # ends before it
        "Late.",  # has nothing in common with it
    ],
)
def test_the_answer_is_the_models_own_whatever_the_reference(fake_session: Any, reference: str) -> None:
    given = answer("track", "Your parcel is late.")
    found = measured(fake_session({"a": given}), [row("a", reference)])
    wanted = reply_of(reference)
    assert found.rows[0]["chrf"] == pytest.approx(sentence_chrf(reply_of(given), [wanted]).score) if wanted else True
    assert found.rows[0]["joint_correct"] == (None if reference == "Late." else '"track"' in reference)


def test_an_answer_is_cut_at_the_limit_wherever_it_comes_from(fake_session: Any) -> None:
    for said in (answer("track", "Yes, it is."), answer("track", "Yes, it was lost.")):
        session = fake_session({"a": said})
        cases = prepare(session, [row("a", answer("track", "Yes, it is."))], TASK)
        found = evaluate(session, cases, TASK, max_new_tokens=len(answer("track", "Yes,")))
        assert found.rows[0]["chrf"] == pytest.approx(sentence_chrf("Yes,", ["Yes, it is."]).score)


def test_references_without_json_leave_these_figures_out_with_a_reason(fake_session: Any) -> None:
    found = measured(fake_session({"hi": "hello there"}), [row("hi", "hello")])
    for name in ("json_valid", "intent_accuracy", "intent_macro_f1", "joint_exact_match"):
        assert found.figures[name] is None
        assert "'intent'" in found.absent[name]
    assert found.figures["reply_chrf"][0] > 0


def test_references_without_a_reply_leave_chrf_out_with_a_reason(fake_session: Any) -> None:
    found = measured(fake_session({}), [row("a", answer("x", reply=""))])
    for name in ("reply_chrf", "reply_rouge_l"):
        assert found.figures[name] is None
        assert "reply" in found.absent[name]


def test_a_prefix_takes_the_place_of_the_system_message(fake_session: Any) -> None:
    session = fake_session({})
    measured(session, [ROWS[0]], prefix=[{"role": "system", "content": "S"}, {"role": "user", "content": "ex"}])
    assert session.prompts == ["<system>S<user>ex<user>one<assistant>"]


def test_rows_carry_ids_and_labels_but_no_user_text(fake_session: Any) -> None:
    found = measured(fake_session({}))
    assert found.rows[1]["id"] == "id-two"
    assert found.rows[1]["slices"] == {"label": "track"}
    assert "AF-2" not in json.dumps(found.rows)


def test_a_row_without_an_answer_is_named(fake_session: Any) -> None:
    bad = {"messages": [{"role": "user", "content": "hello"}]}
    with pytest.raises(DataError, match="test row 2"):
        prepare(fake_session({}), [ROWS[0], bad], TASK)


def test_the_context_holds_the_longest_row(fake_session: Any) -> None:
    cases = prepare(fake_session({}), ROWS, TASK)
    longest = max(len(case.prompt_ids) for case in cases)
    assert context_needed(cases, 500) == longest + 501
    assert context_needed(cases, 1) >= max(len(c.prompt_ids) + len(c.reference_ids) for c in cases)


def test_progress_counts_every_row_once(fake_session: Any) -> None:
    seen: list[int] = []
    session = fake_session({})
    evaluate(session, prepare(session, ROWS, TASK), TASK, 10, lambda: seen.append(1))
    assert len(seen) == 4


def test_a_row_says_which_known_label_was_given_and_how_sure_the_model_was(fake_session: Any) -> None:
    said = {"one": answer("track", order_id="AF-1"), "two": answer("my secret"), "three": answer("cancel")}
    found = measured(fake_session(said, next_probability=0.75), ROWS[:3])
    assert [row["predicted"] for row in found.rows] == ["track", None, "cancel"]
    assert "secret" not in json.dumps([found.rows, found.details])
    # the references differ from the label's first letter on; there it was sure of the truth, as far as the fake is
    assert [row["fork_chance"] for row in found.rows] == pytest.approx([0.75, 0.75, 0.75], abs=1e-3)
    assert found.figures["ece"][0] == pytest.approx(0.25, abs=1e-3)
    assert found.details["confusion"] == {"cancel": {"cancel": 1}, "track": {"(unknown label)": 1, "track": 1}}


def test_escalation_is_measured_for_the_labels_that_the_recipe_names(fake_session: Any) -> None:
    task = Task("intent", "entities", ("cancel",))
    said = {"one": answer("cancel"), "two": answer("track"), "three": answer("cancel"), "four": answer("track")}
    session = fake_session(said)
    figures = evaluate(session, prepare(session, ROWS, task), task, 200).figures
    assert (figures["escalation_precision"][0], figures["escalation_recall"][0]) == (0.5, 0.5)
    assert "names no labels" in measured(fake_session(said)).absent["escalation_recall"]


def test_a_reply_without_json_is_the_whole_answer() -> None:
    assert reply_of('{"a": 1}\nHello\nyou') == "Hello\nyou"
    assert reply_of("Hello\nyou") == "Hello\nyou"
