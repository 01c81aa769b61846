"""What every session must do, whatever its runtime; called by the tests of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgeft.bench.session import Session
from edgeft.errors import DataError
from edgeft.text.chat import ChatTokenizer
from tests.formats.tiny_model import torch_logits

CONTEXT = 160
TOLERANCE = 2e-3  # of logits around 10: kernels for one row and for many add up in another order


def prompts(session: Session, number: int) -> list[list[int]]:
    """Prompts of different lengths with a common beginning."""
    system = {"role": "system", "content": "You answer for a shop."}
    texts = [f"Order {i} is late" + ", very late" * (i % 4) for i in range(number)]
    return [session.prompt_ids([system, {"role": "user", "content": text}]) for text in texts]


def greedy(session: Session, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding written out."""
    logits, answer = session.prefill(prompt), []
    while len(answer) < max_new_tokens and (token := int(logits.argmax())) not in session.stop_ids:
        answer.append(token)
        logits = session.step(token)
    return answer


def predicts_like_torch(session: Session, model: Path) -> None:
    ids = prompts(session, 1)[0]
    expected = torch_logits(model, ids)
    np.testing.assert_allclose(session.prefill(ids[:5]), expected[4], atol=TOLERANCE)
    for at in range(5, len(ids)):
        np.testing.assert_allclose(session.step(ids[at]), expected[at], atol=TOLERANCE)
    [scored] = session.score([(ids, [0, 7, len(ids) - 1])])
    np.testing.assert_allclose(scored, expected[[0, 7, -1]], atol=TOLERANCE)


def forgets_on_reset(session: Session) -> None:
    a, b = prompts(session, 2)
    fresh = session.prefill(b)
    session.prefill(a)
    session.reset()
    np.testing.assert_allclose(session.prefill(b), fresh, atol=TOLERANCE)


def scores_rows_of_a_batch_as_if_alone(session: Session) -> None:
    rows = [(ids, list(range(len(ids) - 6, len(ids)))) for ids in prompts(session, 40)]
    together = list(session.score(rows))
    assert len(together) == len(rows)
    for row, scored in zip(rows, together, strict=True):
        [alone] = session.score([row])
        np.testing.assert_allclose(scored, alone, atol=TOLERANCE)


def replays_what_it_scores(session: Session, number: int) -> None:
    """Token by token, rows of different length together; the wanted positions may have gaps."""
    rows = [
        (ids, list(range(4 + n % 5, len(ids) - n % 3, 1 + n % 2))) for n, ids in enumerate(prompts(session, number))
    ]
    expected = list(session.score(rows))
    for found, scored in zip(session.replay(rows), expected, strict=True):
        np.testing.assert_allclose(found, scored, atol=TOLERANCE)
    assert list(session.replay([])) == []


def goes_on_with_an_answer_that_scoring_has_begun(session: Session) -> None:
    """What the benchmark relies on when it takes agreed tokens from the reference's scores."""
    for ids in prompts(session, 3):
        answer = greedy(session, ids, 8)
        [scored] = session.score([([*ids, *answer], range(len(ids) - 1, len(ids) + len(answer) - 1))])
        assert scored.argmax(axis=1).tolist() == answer
        assert session.generate([[*ids, *answer[:3]]], 5) == [answer[3:]]


def keeps_of_a_draft_what_it_would_have_said(session: Session) -> None:
    """Right, half right, wrong, too long and empty drafts: the same answers, and the logits that scoring gives."""
    given = prompts(session, 20)
    likely = [token for ids in given[:3] for token in greedy(session, ids, 12)]
    session.stop_ids = session.stop_ids | {likely[5], likely[-1]}
    stop = min(session.stop_ids)
    expected = [greedy(session, ids, 12) for ids in given]
    drafts: list[list[int]] = []
    for i, answer in enumerate(expected):
        kinds = [[*answer, stop], [*answer[:4], 7, 7, stop], [9, stop], [*answer, 5, 6], []]
        drafts.append(kinds[i % len(kinds)])
    heard: dict[int, np.ndarray] = {}
    assert session.generate(given, 12, drafts, heard.__setitem__) == expected
    assert session.generate(given, 3, drafts) == [answer[:3] for answer in expected]
    rows = [
        ([*ids, *draft], range(len(ids) - 1, len(ids) + len(draft) - 1))
        for ids, draft in zip(given, drafts, strict=True)
    ]
    for i, scored in enumerate(session.score(rows)):
        np.testing.assert_allclose(heard[i], scored, atol=TOLERANCE)


def scores_rows_without_positions_as_empty(session: Session) -> None:
    ids = prompts(session, 1)[0]
    shapes = [scored.shape for scored in session.score([(ids, []), (ids, [3]), (ids, [])])]
    assert shapes == [(0, session.vocab_size), (1, session.vocab_size), (0, session.vocab_size)]
    assert list(session.score([])) == []


def generates_what_greedy_decoding_gives(session: Session, number: int) -> None:
    """Stop tokens are chosen so that answers end at different times and slots are used again."""
    given = prompts(session, number)
    likely = [token for ids in given[:3] for token in greedy(session, ids, 12)]
    session.stop_ids = session.stop_ids | {likely[5], likely[-1]}
    expected = [greedy(session, ids, 12) for ids in given]
    assert len({len(answer) for answer in expected}) > 2, "the test needs answers of different length"
    assert session.generate(given, 12) == expected
    assert session.generate(given[:1], 12) == expected[:1]


def generates_nothing_when_nothing_is_asked(session: Session) -> None:
    assert session.generate([], 5) == []
    assert session.generate(prompts(session, 2), 0) == [[], []]


def ends_an_answer_where_the_context_is_full(session: Session) -> None:
    session.stop_ids = frozenset()
    short, long = prompts(session, 1)[0], (prompts(session, 1)[0] * 9)[: CONTEXT - 4]
    answers = session.generate([short, long], CONTEXT)
    assert [len(a) for a in answers] == [CONTEXT - len(short) + 1, 5]  # the last token need not be fed
    with pytest.raises(DataError, match=f"{CONTEXT + 1} tokens"):
        session.prefill([5] * (CONTEXT + 1))


def keeps_the_prompt_contract(session: Session, model: Path) -> None:
    chat = ChatTokenizer.from_folder(model)
    text = " Grüße 12\n\n{} <|im_start|>👩‍💻 "
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "?"},
    ]
    assert session.prompt_ids(messages) == chat.prompt_ids(messages)
    assert session.answer_ids(text) == chat.answer_ids(text)
    assert session.decode(chat.answer_ids(text)) == chat.decode(chat.answer_ids(text)) == text
    assert chat.answer_ids("")[-1] in session.stop_ids
    assert session.vocab_size == 320
