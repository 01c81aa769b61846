"""Conversations become token ids exactly as at inference: the model's own chat template and tokenizer, nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from edgeft.errors import DataError, ModelError
from edgeft.text.spelling import Control, Hidden, hide, spell

Messages = Sequence[Mapping[str, Any]]  # {"role": "system" | "user" | "assistant", "content": str}

TEMPLATE_FILE = "chat_template.jinja"
PROBE_ANSWER = "Certainly"
PROBE: list[dict[str, str]] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": PROBE_ANSWER},
]


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer together with its chat template; made by `from_folder`."""

    tokenizer: Tokenizer
    template: str
    bos_token: str
    eos_token: str
    pad_id: int
    stop_ids: frozenset[int]  # tokens that end an answer: end of turn, end of text
    turn_end: str  # what the template writes after an answer, up to and including the end-of-turn token
    turn_tail: str  # all that it writes after an answer: turn_end and, often, a newline

    @staticmethod
    def from_folder(path: Path) -> ChatTokenizer:
        """Read tokenizer.json, tokenizer_config.json, generation_config.json and the template of a model folder.

        Raises ModelError if one is missing or damaged, or if the template closes no answer with a special token.
        """
        tokenizer = _load_tokenizer(path / "tokenizer.json")
        settings = read_json(path / "tokenizer_config.json")
        template = read_template(path)
        bos, eos, pad = (token_text(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad"))
        turn_end, turn_tail = _turn_end(tokenizer, template, bos, eos)
        turn_end_id = tokenizer.encode(turn_end, add_special_tokens=False).ids[-1]
        eos_id, pad_id = tokenizer.token_to_id(eos), tokenizer.token_to_id(pad)
        stops = {turn_end_id} | _configured_stops(path) | ({eos_id} if eos_id is not None else set())
        pad_id = next(i for i in (pad_id, eos_id, turn_end_id) if i is not None)
        return ChatTokenizer(tokenizer, template, bos, eos, pad_id, frozenset(stops), turn_end, turn_tail)

    @property
    def vocab_size(self) -> int:
        """Number of tokens the tokenizer knows; a model's output may be wider (padding)."""
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    @cached_property
    def start_id(self) -> int:
        """The token that stands for the beginning of a text: BOS, or end of text in a model without one."""
        found = (self.tokenizer.token_to_id(text) for text in (self.bos_token, self.eos_token) if text)
        return next((i for i in found if i is not None), self.pad_id)

    @cached_property
    def end_id(self) -> int:
        """One more than the largest token id: what a model's output has beyond it stands for no token (padding)."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def render(self, messages: Messages, add_generation_prompt: bool) -> str:
        """The conversation as one text. Raises DataError if the template refuses it."""
        return render_template(self.template, messages, add_generation_prompt, self.bos_token, self.eos_token)

    @cached_property
    def controls(self) -> tuple[Control, ...]:
        """The special tokens."""
        added = self.tokenizer.get_added_tokens_decoder()
        return tuple(Control(t.content, i, t.lstrip, t.rstrip) for i, t in sorted(added.items()) if t.special)

    def hide(self, value: Any) -> Hidden:
        """Messages, or a text, in which nothing looks like a control token any more; to be rendered, then encoded."""
        return hide(value, self.controls)

    def encode_text(self, text: str, originals: Mapping[int, str] | None = None) -> list[int]:
        """Token ids; special tokens in it are parsed, none is added (the template writes BOS itself).

        `originals` are those of what was hidden before `text` was rendered: that is spelled out, as plain text.
        """
        if not originals:
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return spell(text, originals, self.controls, self._encode_plain)

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Token ids of a conversation up to where the assistant answers. No text in it becomes a special token."""
        hidden = self.hide(list(messages))
        return self.encode_text(self.render(hidden.value, add_generation_prompt=True), hidden.originals)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, as its beginning: with the tokens that the model's tokenizer puts in front."""
        return list(self.tokenizer.encode(text, add_special_tokens=True).ids)

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an answer with the end-of-turn token after it."""
        hidden = self.hide(text)
        return self.encode_text(hidden.value + self.turn_end, hidden.originals)

    def _encode_plain(self, text: str) -> list[int]:
        return list(self._plain_tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.encode_special_tokens = True  # as text
        return tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def render_template(
    template: str, messages: Messages, add_generation_prompt: bool, bos_token: str, eos_token: str
) -> str:
    """Render a chat template in a sandbox, with the names and filters that published templates rely on.

    Raises ModelError if the template is not valid Jinja, DataError if it refuses the conversation.
    """
    compiled = _compile(template)
    try:
        return compiled.render(
            messages=[dict(m) for m in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise DataError(
            f"the model's chat template refuses a conversation of ({roles}): {error}",
            "order the turns as the model expects: usually system (optional), user, assistant, user, ...",
        ) from None


def read_template(folder: Path) -> str:
    """The chat template of a model folder: chat_template.jinja, or the older entry in tokenizer_config.json."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text("utf-8")
    entry = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(entry, list):  # several named templates
        entry = {t["name"]: t["template"] for t in entry}.get("default")
    if not isinstance(entry, str):
        raise ModelError(
            f"{folder} has no chat template ({TEMPLATE_FILE} or chat_template in tokenizer_config.json)",
            "take the instruct or chat version of the model",
        )
    return entry


def token_text(entry: Any) -> str:
    """Text of a token as tokenizer_config.json writes it: a string, an object with `content`, or null ('')."""
    return str(entry["content"]) if isinstance(entry, dict) else str(entry or "")


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ModelError(f"{path}: no such file", "save the model with its fast tokenizer (tokenizer.json)")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise ModelError(f"{path}: not a readable tokenizer: {error}", "fetch the model again") from None
    tokenizer.no_truncation()  # some published files cut or pad every text
    tokenizer.no_padding()
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelError if the file is missing or damaged."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file", "name a complete Hugging Face model folder, with its tokenizer")
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}", "fetch the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}", "fetch the model again")
    return value


def _configured_stops(folder: Path) -> set[int]:
    if not (folder / "generation_config.json").is_file():
        return set()
    ids = read_json(folder / "generation_config.json").get("eos_token_id")
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}


def _turn_end(tokenizer: Tokenizer, template: str, bos: str, eos: str) -> tuple[str, str]:
    """What the template writes after an answer: (up to the end-of-turn token, everything)."""
    prompt = render_template(template, PROBE[:1], True, bos, eos)
    whole = render_template(template, PROBE, False, bos, eos)
    tail = whole[whole.rfind(PROBE_ANSWER) + len(PROBE_ANSWER) :] if PROBE_ANSWER in whole else ""
    encoded = tokenizer.encode(tail, add_special_tokens=False)
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    ends = [end for i, (_, end) in zip(encoded.ids, encoded.offsets, strict=True) if i in special]
    if not ends:
        raise ModelError(
            f"the chat template ends an answer with {tail!r}, in which there is no special token",
            "a model that never says when it is done cannot be used; take its instruct version",
        )
    if whole.startswith(prompt):
        rest = whole[len(prompt) :]
        parts = [tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, rest, whole)]
        if parts[0] + parts[1] != parts[2]:
            raise ModelError(
                "this tokenizer gives an answer other tokens when it follows its prompt than on its own "
                f"({parts[1]} for {rest!r})",
                "edgeft needs a tokenizer that adds no space in front of a text; choose another base model",
            )
    return tail[: ends[0]], tail


class _GenerationTag(Extension):
    """{% generation %} marks assistant text for training masks; here it is only passed through."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    # The whitespace rules are those that templates on model hubs are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid Jinja: {error}", "fetch the model again") from None


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """For templates: Jinja's own filter escapes <, > and & for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def strftime_now(form: str) -> str:
    """For templates: the date or time of now."""
    return datetime.now().strftime(form)


def raise_exception(message: str) -> None:
    """For templates: refuse a conversation."""
    raise jinja2.TemplateError(message)
