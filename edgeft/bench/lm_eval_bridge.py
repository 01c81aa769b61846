"""Any package as a model of lm-evaluation-harness, through its public interface; with the extra `lm-eval`.

    lm_eval --model edgeft --model_args package=runs/export-KEY --tasks arc_easy

A harness that looks for plugins finds the model by itself. `python -m edgeft.bench.lm_eval_bridge` with the same
arguments registers it first, for those that do not. Model arguments: package, runtime, threads, max_length.

Letters: P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from edgeft.bench.batched import BatchedSession
from edgeft.bench.choices import log_likelihood
from edgeft.bench.host import physical_cores
from edgeft.bench.session import Logits, open_session
from edgeft.errors import DataError

MAX_LENGTH = 2048
MAX_NEW_TOKENS = 256  # where a task says nothing
FIRST_TOKENS = 32  # of an answer, before it is looked at whether a stop text has been reached


@register_model("edgeft")
class EdgeftLM(LM):
    """A package in its own runtime. `max_length` is the longest row in tokens; longer contexts lose their beginning.

    The harness also passes batch sizes and a device; a session has its own.
    """

    def __init__(
        self,
        package: str,
        runtime: str | None = None,
        threads: int | None = None,
        max_length: int = MAX_LENGTH,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.package, self.max_length = Path(package), int(max_length)
        session = open_session(self.package, int(threads or physical_cores()), self.max_length, runtime=runtime)
        assert isinstance(session, BatchedSession)
        self.session = session

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For (context, continuation): the sum of the continuation's log-probabilities, and whether it is greedy's."""
        pairs = [self._pair(*request.args) for request in requests]
        found = self._scored(pairs)
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, one)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For (text,): the sum over all of its tokens, each after as many before it as fit."""
        windows: list[list[tuple[list[int], list[int]]]] = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(self._plain(text), self.session.text.start_id, self.max_length, 1)
            windows.append([make_disjoint_window(window) for window in rolling])
        scored = iter(self._scored([pair for one in windows for pair in one]))
        found = [float(sum(next(scored)[0] for _ in one)) for one in windows]
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For (context, settings): the greedy answer up to one of settings["until"]. Raises DataError for sampling."""
        answers = [""] * len(requests)
        limits: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
                raise DataError(
                    "the task asks for sampled answers; packages are measured greedily", "set do_sample: false"
                )
            limits.setdefault(int(settings.get("max_gen_toks") or MAX_NEW_TOKENS), []).append(number)
        for limit, numbers in limits.items():
            given = [(requests[n].args[0], requests[n].args[1].get("until") or []) for n in numbers]
            for number, text in zip(numbers, self._answers(given, limit), strict=True):
                answers[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return answers

    def _answers(self, given: Sequence[tuple[str, str | list[str]]], limit: int) -> list[str]:
        """Twice as many tokens each time, for those that have not ended: most stop texts come early."""
        room = self.max_length - min(limit, self.max_length // 2)
        prompts = [self._with_start(context)[-room:] for context, _ in given]
        texts, going, size = [""] * len(given), list(range(len(given))), min(FIRST_TOKENS, limit)
        while going:
            said = self.session.generate([prompts[n] for n in going], size)
            left = []
            for number, ids in zip(going, said, strict=True):
                until = given[number][1]
                text = self.session.decode(ids)
                ends = [at for stop in ([until] if isinstance(until, str) else until) if (at := text.find(stop)) >= 0]
                texts[number] = text[: min(ends)] if ends else text
                if not ends and len(ids) == size < limit:
                    left.append(number)
            going, size = left, min(2 * size, limit)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the package's own template writes it."""
        return self.session.text.render(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """The package's folder: what the harness files its cached requests under."""
        return str(self.package.resolve())

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, cut apart where the continuation begins; a space between them belongs to it, as to its word."""
        cut = len(context.rstrip())
        context, continuation = context[:cut], context[cut:] + continuation
        if not context:
            return [self.session.text.start_id], self._plain(continuation)
        before, whole = self._with_start(context), self._with_start(context + continuation)
        return before, whole[len(before) :]

    def _plain(self, text: str) -> list[int]:
        """Ids of a text without the tokens that stand before every text."""
        ids, start = self.session.text_ids(text), self.session.text_ids("")
        return ids[len(start) :] if ids[: len(start)] == start else ids

    def _with_start(self, text: str) -> list[int]:
        """Ids of a text as the tokenizer begins it, but for a second BOS where a template wrote one already."""
        ids, start = self.session.text_ids(text), self.session.text.start_id
        return ids[1:] if ids[:2] == [start, start] else ids or [start]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        rows = []
        for before, after in pairs:
            ids = [*before, *after][-self.max_length - 1 :]  # of which the last is not fed
            rows.append((ids[:-1], range(len(ids) - 1 - len(after), len(ids) - 1)))
        return [
            (log_likelihood(logits_PV, after), _is_greedy(logits_PV, after))
            for (_, after), logits_PV in zip(pairs, self.session.score(rows), strict=True)
        ]


def _is_greedy(logits_PV: Logits, next_ids: Sequence[int]) -> bool:
    return bool((logits_PV.argmax(axis=1) == np.array(next_ids)).all())


def main() -> None:
    """The harness's own command line, with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
