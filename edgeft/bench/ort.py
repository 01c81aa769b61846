"""An ONNX package in plain onnxruntime: a graph with past and present keys and values that share one buffer.

Letters: B rows run together, S new tokens of a row, P positions, V vocabulary.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgeft.bench.session import Logits, Messages, OnDraft, fed_of, own_tokens
from edgeft.errors import DataError, ModelError
from edgeft.text.chat import ChatTokenizer
from edgeft.text.prefix import common_prefix

SLOTS = 16  # rows decoded together
CACHE_BYTES = 1 << 29  # most memory of the batch's keys and values; long rows get fewer slots
PAST, PRESENT = "past_key_values.", "present."
DTYPES: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class _Cache:
    """Keys and values of `slots` rows of up to `length` tokens; the graph extends them in place."""

    def __init__(self, session: ort.InferenceSession, head_size: int, slots: int, length: int) -> None:
        self._session, self.slots, self.length = session, slots, length
        self._arrays: dict[str, NDArray[Any]] = {
            i.name: np.zeros((slots, i.shape[1], length, head_size), DTYPES[i.type])
            for i in session.get_inputs()
            if i.name.startswith(PAST)
        }
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}

    def binding(self, first: int, stop: int) -> ort.IOBinding:
        """Inputs and outputs of the slots from `first` up to `stop`, bound to their memory."""
        if (first, stop) not in self._bindings:
            binding = self._session.io_binding()
            for name, array in self._arrays.items():
                value = ort.OrtValue.ortvalue_from_numpy(array[first:stop])
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(name.replace(PAST, PRESENT), value)
            self._bindings[first, stop] = binding
        return self._bindings[first, stop]

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Let the row in slot `target` begin with the first tokens of the row in slot `source`."""
        for array in self._arrays.values():
            array[target, :, :num_tokens] = array[source, :, :num_tokens]


class OrtSession:
    """`Session` over a graph as onnxruntime-genai's builder writes it. `context` is the longest row in tokens."""

    runtime = "onnxruntime"
    build = f"onnxruntime {ort.__version__}: {ort.get_build_info()}"

    def __init__(self, path: Path, threads: int, context: int) -> None:
        decoder = read_decoder(path.parent)[0]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what goes wrong comes as an exception
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no other base
            raise ModelError(f"onnxruntime cannot load {path}: {error}", "export the package again") from error
        inputs = {i.name: i.shape for i in self._session.get_inputs()}
        self._has_positions = "position_ids" in inputs
        # Graphs with fixed shapes take one token of one row, and a cache of one length (formats/onnx_variants.py).
        width = inputs["attention_mask"][1]
        self._fixed_context = width if isinstance(width, int) else None
        self._head_size = int(decoder["head_size"])
        self._context_tokens = context
        self._chat = ChatTokenizer.from_folder(path.parent)
        self.vocab_size = int(self._session.get_outputs()[0].shape[2])
        self.stop_ids = self._chat.stop_ids
        self._single = self._make_cache(1, context)
        self._num_past = 0

    def close(self) -> None:
        """Give the graph and the caches back; the session is of no use afterwards."""
        del self._single, self._session

    def reset(self) -> None:
        self._num_past = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        self.reset()
        return self._extend(ids)

    def step(self, token: int) -> Logits:
        return self._extend([token])

    def _extend(self, ids: Sequence[int]) -> Logits:
        logits: Logits = self._feed(self._single, 0, self._num_past, ids)[-1]
        self._num_past += len(ids)
        return logits

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Logits]:
        """As the protocol says. A row alone fills the matrix products: there is no padding, the prefix is shared."""
        prefix = common_prefix([ids[: min(at)] for ids, at in rows if at])
        cache = self._make_cache(1, self._context_tokens)
        if prefix:
            self._feed(cache, 0, 0, prefix)
        for ids, at in rows:
            if not at:
                yield np.empty((0, self.vocab_size), np.float32)
                continue
            logits_SV = self._feed(cache, 0, len(prefix), ids[len(prefix) : max(at) + 1])
            yield logits_SV[np.array(at) - len(prefix)]

    def replay(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Logits]:
        if not rows:
            return
        cache = self._batch_cache(len(rows), max(len(ids) for ids, _ in rows))
        for start in range(0, len(rows), cache.slots):
            yield from self._replay_together(cache, rows[start : start + cache.slots])

    def _replay_together(self, cache: _Cache, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Logits]:
        # The longest answers come first: those that still run are then always the first slots.
        order = sorted(range(len(rows)), key=lambda n: rows[n][1][0] - rows[n][1][-1])
        found: list[list[Logits]] = [[] for _ in rows]
        for slot, number in enumerate(order):
            ids, at = rows[number]
            found[number].append(self._feed(cache, slot, 0, ids[: at[0] + 1])[-1])
        for step in range(1, max(at[-1] - at[0] for _, at in rows) + 1):
            running = [n for n in order if rows[n][1][0] + step <= rows[n][1][-1]]
            now = [rows[n][1][0] + step for n in running]
            tokens = [rows[n][0][at] for n, at in zip(running, now, strict=True)]
            for number, logits_V in zip(running, self._step_all(cache, tokens, [at + 1 for at in now]), strict=True):
                found[number].append(logits_V)
        return [np.stack(logits)[np.array(at) - at[0]] for logits, (_, at) in zip(found, rows, strict=True)]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        drafts: Sequence[Sequence[int]] = (),
        on_draft: OnDraft | None = None,
    ) -> list[list[int]]:
        """As the protocol says; an answer also ends where the context is full."""
        answers: list[list[int]] = [[] for _ in prompts]
        if not prompts or (max_new_tokens < 1 and not drafts):
            return answers
        fed = [fed_of(draft, self.stop_ids) for draft in drafts or [()] * len(prompts)]
        longest = max(len(ids) + max(max_new_tokens, len(draft), 1) for ids, draft in zip(prompts, fed, strict=True))
        cache = self._batch_cache(len(prompts), min(longest, self._context_tokens))
        prefix = common_prefix([ids[:-1] for ids in prompts])
        prefix_slot = cache.slots - 1
        if prefix:
            self._feed(cache, prefix_slot, 0, prefix)
        waiting = deque(range(len(prompts)))
        running: list[int] = []  # the row in each slot from 0 on
        while waiting or running:
            while waiting and len(running) < prefix_slot:
                row, slot = waiting.popleft(), len(running)
                cache.copy(prefix_slot, slot, len(prefix))
                new = [*prompts[row][len(prefix) :], *fed[row]]
                logits_PV = self._feed(cache, slot, len(prefix), new)[-1 - len(fed[row]) :]
                if on_draft:
                    on_draft(row, logits_PV[: len(drafts[row])])
                said = own_tokens(fed[row], logits_PV)
                if self._take(answers[row], said, len(prompts[row]), max_new_tokens):
                    running.append(row)
            lengths = [len(prompts[row]) + len(answers[row]) for row in running]
            logits_BV = self._step_all(cache, [answers[row][-1] for row in running], lengths)
            for slot in reversed(range(len(running))):  # a finished row's slot is filled by the last one
                row = running[slot]
                said = own_tokens((), logits_BV[slot : slot + 1])
                if not self._take(answers[row], said, len(prompts[row]), max_new_tokens):
                    last = len(running) - 1
                    if slot != last:
                        cache.copy(last, slot, lengths[last])
                        running[slot], lengths[slot] = running[last], lengths[last]
                    running.pop()
        return answers

    def _take(self, answer: list[int], said: Sequence[int], num_prompt: int, max_new_tokens: int) -> bool:
        """Add what the model said to an answer; False if the answer has ended."""
        for token in said:
            if token in self.stop_ids or len(answer) == max_new_tokens:
                return False
            answer.append(token)
        return len(answer) < max_new_tokens and num_prompt + len(answer) <= self._context_tokens

    def prompt_ids(self, messages: Messages) -> list[int]:
        return self._chat.prompt_ids(messages)

    def text_ids(self, text: str) -> list[int]:
        return list(self._chat.tokenizer.encode(text, add_special_tokens=True).ids)

    def answer_ids(self, text: str) -> list[int]:
        return self._chat.answer_ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._chat.decode(ids)

    def _feed(self, cache: _Cache, slot: int, num_past: int, ids: Sequence[int]) -> Logits:
        """Feed tokens to one row; returns the logits [S, V] after each."""
        if num_past + len(ids) > cache.length:
            raise DataError(
                f"a row needs {num_past + len(ids)} tokens; the session was opened for {cache.length}",
                "shorten the row or open the package with a larger context",
            )
        if self._fixed_context and len(ids) > 1:
            return np.concatenate([self._feed(cache, slot, num_past + n, [token]) for n, token in enumerate(ids)])
        lengths = np.array([num_past + len(ids)])
        logits: Logits = self._run(cache.binding(slot, slot + 1), np.array([ids], np.int64), lengths)[0]
        return logits

    def _step_all(self, cache: _Cache, tokens: list[int], lengths: list[int]) -> Logits:
        """Feed one token to each of the first rows, which have `lengths` tokens with it; returns [B, V]."""
        if not tokens:
            return np.empty((0, self.vocab_size), np.float32)
        if self._fixed_context:
            rows = zip(range(len(tokens)), lengths, tokens, strict=True)
            return np.concatenate([self._feed(cache, slot, length - 1, [token]) for slot, length, token in rows])
        binding = cache.binding(0, len(tokens))
        logits: Logits = self._run(binding, np.array(tokens, np.int64)[:, None], np.array(lengths))[:, 0]
        return logits

    def _run(self, binding: ort.IOBinding, ids_BS: NDArray[np.int64], lengths_B: NDArray[np.int64]) -> Logits:
        # The graph reads only the number of ones in a row of the mask: rows of different length need no padding.
        ends = lengths_B[:, None]
        binding.bind_cpu_input("input_ids", ids_BS)
        width = self._fixed_context or lengths_B.max()
        binding.bind_cpu_input("attention_mask", (np.arange(width) < ends).astype(np.int64))
        if self._has_positions:
            binding.bind_cpu_input("position_ids", ends - ids_BS.shape[1] + np.arange(ids_BS.shape[1]))
        logits = np.empty((*ids_BS.shape, self.vocab_size), np.float32)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        self._session.run_with_iobinding(binding)
        return logits

    def _make_cache(self, slots: int, length: int) -> _Cache:
        return _Cache(self._session, self._head_size, slots, self._fixed_context or length)

    def _batch_cache(self, num_rows: int, length: int) -> _Cache:
        """Slots for as many rows as memory allows, and one more, the last, for the common prefix."""
        row_bytes = sum(
            i.shape[1] * self._head_size * length * np.dtype(DTYPES[i.type]).itemsize
            for i in self._session.get_inputs()
            if i.name.startswith(PAST)
        )
        return self._make_cache(1 + max(1, min(SLOTS, num_rows, CACHE_BYTES // row_bytes)), length)


def open_graph(path: Path, threads: int, context: int) -> OrtSession:
    """The session for the graph of a package: one that extends keys and values in place, or one that gives longer ones.

    Raises ModelError if the package does not say which it is.
    """
    from edgeft.bench.ort_growing import GrowingSession

    return (OrtSession if read_decoder(path.parent)[1] else GrowingSession)(path, threads, context)


def read_decoder(package: Path) -> tuple[dict[str, Any], bool]:
    """The decoder's facts from genai_config.json, and whether the graph extends keys and values in place."""
    path = package / "genai_config.json"
    if not path.is_file():
        raise ModelError(f"{path.parent} has no {path.name}", "export the package again; edgeft writes this file")
    config = json.loads(path.read_text("utf-8"))
    decoder: dict[str, Any] = config["model"]["decoder"]
    return decoder, bool(config["search"]["past_present_share_buffer"])
