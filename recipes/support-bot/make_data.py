"""Builds train.jsonl, validation.jsonl and test.jsonl from source/, the same bytes every time.

Training rows are hand-written patterns whose slots are filled with invented values; validation and test rows were
written one by one. Run: python recipes/support-bot/make_data.py [--check]
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SOURCE = HERE / "source"
SLOT = re.compile(r"\{(\w+)\}")
MULTI_TURN = 0.13  # of the training rows whose reply asks for a detail, the share in which a second message gives it
TOPIC_CHANGE = 0.04  # share in which the second message asks for something else
ASIDES = 0.5  # share of the training rows in which a further detail is mentioned in a sentence of its own
ASIDE_SLOTS = {"out_of_scope": ["place", "email", "date"], "reset_password": ["email", "place"],
               "delete_account": ["email", "place"], "change_email": ["place", "date"]}  # fmt: skip
TYPOS = 0.08  # share in which one word is misspelled
PAST = {"not_received", "refund_status", "double_charge", "damaged_on_arrival", "missing_item", "track_order",
        "request_invoice", "not_working", "warranty_info", "start_return", "payment_failed"}  # fmt: skip
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December"]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


class Values:
    """Draws a value for a slot; ids and addresses never repeat, and no name before all others have been drawn."""

    def __init__(self, material: dict[str, Any], rng: random.Random) -> None:
        self.material, self.rng = material, rng
        self.used: set[str] = set()
        self.decks: dict[str, list[str]] = {}

    def deal(self, name: str) -> str:
        """One of the names of a list, none twice until all have been dealt."""
        if not self.decks.get(name):
            self.decks[name] = self.rng.sample(self.material[name], len(self.material[name]))
        return self.decks[name].pop()

    def draw(self, slot: str, before: str, intent: str) -> str:
        """`before` is the text in front of the slot."""
        for _ in range(50):
            value = self.date(before, intent) if slot == "date" else str(getattr(self, slot)())
            if slot in ("date", "place", "amount") or value not in self.used:
                break
        self.used.add(value)
        return value

    def order_id(self) -> str:
        digits = f"{self.rng.randrange(100_000, 1_000_000)}"
        return self.rng.choices(["AF-", "AF", "#", ""], [55, 10, 15, 20])[0] + digits

    def amount(self) -> str:
        whole, cents = (
            self.rng.choice([self.rng.randrange(3, 60), self.rng.randrange(60, 900)]),
            self.rng.randrange(100),
        )
        short = str(whole) if self.rng.random() < 0.4 else f"{whole}.{cents:02d}"
        sign, word = self.rng.choice([("$", "dollars"), ("£", "pounds"), ("€", "euros")])
        return f"{whole} {word}" if self.rng.random() < 0.25 else sign + short

    def product(self) -> str:
        line = self.deal("product_lines")
        if line.isalpha() and self.rng.random() < 0.12:
            line += f" {self.rng.choice([2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 40, 60, 75, 100, 200, 500])}"
        return line if self.rng.random() < 0.15 else f"{line} {self.rng.choice(self.material['product_nouns'])}"

    def email(self) -> str:
        first, last = self.deal("first_names"), self.deal("last_names")
        name = self.rng.choice([f"{first}.{last}", f"{first}{last}", f"{first[0]}.{last}", f"{first}_{last}", first,
                                f"{first}{self.rng.randrange(10, 99)}", f"{last}.{first}",
                                self.rng.choice(self.material["email_roles"])])  # fmt: skip
        return f"{name}@{self.deal('email_domains')}"

    def place(self) -> str:
        return self.deal("places")

    def coupon_code(self) -> str:
        word = self.deal("coupon_words")
        return word + self.rng.choice(["", "", "-"]) + str(self.rng.choice([5, 10, 15, 20, 25, 30, 40, 50, 100]))

    def date(self, before: str, intent: str) -> str:
        rng = self.rng
        day, month, weekday = rng.randrange(1, 29), rng.choice(MONTHS), rng.choice(DAYS)
        suffix = "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
        plain = [f"{day} {month}", f"{month} {day}", f"{day} {month[:3]}", f"{month} {day}{suffix}", weekday,
                 f"{day:02d}/{MONTHS.index(month) + 1:02d}", f"{weekday} {day} {month}", f"the {day}{suffix}",
                 f"the {day}{suffix} of {month}"]  # fmt: skip
        if re.search(r"\b(the|a|every)\s*$", before, re.IGNORECASE):
            return rng.choice(plain[:7])
        if re.search(r"\bon\s*$", before, re.IGNORECASE):
            return rng.choice(plain)
        past = intent in PAST or re.search(r"\bsince\s*$", before, re.IGNORECASE)
        near = [f"last {weekday}", "yesterday"] if past else [f"next {weekday}", f"this {weekday}", "tomorrow"]
        return rng.choice(plain + near * 3 + ["today"])


def fill(pattern: str, intent: str, values: Values) -> tuple[str, dict[str, str]]:
    """A pattern with its slots filled, and the values in order of appearance."""
    careless = pattern == pattern.lower() and values.rng.random() < 0.7  # who writes no capitals writes names so, too
    text, entities, end = "", {}, 0
    for match in SLOT.finditer(pattern):
        text += pattern[end : match.start()]
        value = values.draw(match[1], text, intent)
        if careless and match[1] in ("product", "place", "date"):
            value = value.lower()
        entities[match[1]] = value
        text, end = text + value, match.end()
    return text + pattern[end:], entities


def add_aside(
    text: str, intent: str, entities: dict[str, str], asides: dict[str, list[str]], values: Values
) -> tuple[str, dict[str, str]]:
    """One more detail, before or behind the rest, of a kind that the customer has not given yet."""
    rng = values.rng
    slot = rng.choice(ASIDE_SLOTS.get(intent, list(asides)))
    if slot in entities:
        return text, entities
    careless = text == text.lower()
    aside, more = fill(rng.choice(asides[slot]), intent, values)
    if careless and slot != "email":
        aside, more = aside.lower(), {k: v.lower() for k, v in more.items()}
    parts = [text if text[-1] in ".?!" or careless else text + ".", aside]
    if rng.random() < 0.25:
        parts.reverse()
    joined = " ".join(parts)
    return joined, in_order(entities | more, [joined])


def misspell(text: str, entities: dict[str, str], rng: random.Random) -> str:
    """One word of at least five letters with two letters swapped, one dropped or one doubled; never in a value."""
    words = text.split(" ")
    values = " ".join(entities.values())
    free = [i for i, w in enumerate(words) if w.isalpha() and len(w) >= 5 and w not in values]
    if free:
        i = rng.choice(free)
        w, at = words[i], rng.randrange(1, len(words[i]) - 2)
        words[i] = rng.choice([w[:at] + w[at + 1] + w[at] + w[at + 2 :], w[:at] + w[at + 1 :], w[:at] + w[at] + w[at:]])
    return " ".join(words)


def target(intent: str, entities: dict[str, str]) -> str:
    return json.dumps({"intent": intent, "entities": entities}, ensure_ascii=False)


def answer(intent: str, entities: dict[str, str], replies: dict[str, Any]) -> str:
    """The JSON line and the reply that the policy gives."""
    rule = next(r for r in replies[intent] if set(r["needs"]) <= set(entities))
    return target(intent, entities) + "\n" + SLOT.sub(lambda m: entities[m[1]], rule["reply"])


def missing_slot(intent: str, entities: dict[str, str], replies: dict[str, Any]) -> str | None:
    """The detail that the policy would ask for."""
    wanted = [s for rule in replies[intent] if rule["needs"] for s in rule["needs"][:1]]
    return next((s for s in wanted if s not in entities), None)


def in_order(entities: dict[str, str], texts: list[str]) -> dict[str, str]:
    """The values in their order of appearance."""
    whole = "\n".join(texts)
    return dict(sorted(entities.items(), key=lambda item: whole.index(item[1])))


def row(
    number: str,
    turns: list[tuple[str, str, dict[str, str]]],
    schema: dict[str, Any],
    replies: dict[str, Any],
    source: str,
) -> dict[str, Any]:
    """A chat row; each turn is (user text, intent after it, all values so far)."""
    messages = []
    for text, intent, entities in turns:
        messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer(intent, entities, replies)},
        ]
    _, intent, entities = turns[-1]
    meta = {"id": number, "intent": intent, "category": schema["intents"][intent]["category"], "entities": entities,
            "source": source, "target_json": target(intent, entities)}  # fmt: skip
    return {"messages": messages, "meta": meta}


def train_rows(schema: dict[str, Any], replies: dict[str, Any], material: dict[str, Any]) -> list[dict[str, Any]]:
    rng = random.Random(20_26)
    values = Values(material, rng)
    patterns = [
        (p.stem, line) for p in sorted((SOURCE / "train").glob("*.txt")) for line in p.read_text("utf-8").splitlines()
    ]
    rng.shuffle(patterns)
    rows = []
    for number, (intent, pattern) in enumerate(patterns):
        text, entities = fill(pattern, intent, values)
        if rng.random() < ASIDES:
            text, entities = add_aside(text, intent, entities, material["asides"], values)
        if rng.random() < TYPOS:
            text = misspell(text, entities, rng)
        turns = [(text, intent, entities)]
        slot = missing_slot(intent, entities, replies)
        other, next_pattern = patterns[(number * 7 + 13) % len(patterns)]
        if slot and rng.random() < MULTI_TURN:
            second, more = fill(rng.choice(material["followups"][slot]), intent, values)
            turns.append((second, intent, in_order(entities | more, [text, second])))
        elif rng.random() < TOPIC_CHANGE and not set(entities) & set(SLOT.findall(next_pattern)):
            second, more = fill(next_pattern, other, values)
            turns.append((second, other, in_order(entities | more, [text, second])))
        rows.append(row(f"train-{number:04d}", turns, schema, replies, "pattern"))
    return rows


def written_rows(split: str, schema: dict[str, Any], replies: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows written one by one; the first intent of a dialogue is the last one unless `first_intent` says otherwise."""
    rows = []
    for number, line in enumerate((SOURCE / f"{split}.jsonl").read_text("utf-8").splitlines()):
        item = json.loads(line)
        texts, intents = (
            item["user"],
            [item.get("first_intent", item["intent"])] * (len(item["user"]) - 1) + [item["intent"]],
        )
        turns = []
        for i, (text, intent) in enumerate(zip(texts, intents, strict=True)):
            so_far = {k: v for k, v in item["entities"].items() if any(v in t for t in texts[: i + 1])}
            turns.append((text, intent, in_order(so_far, texts)))
        rows.append(row(f"{split}-{number:04d}", turns, schema, replies, "written"))
    return rows


def main() -> int:
    schema, replies, material = (
        yaml.safe_load((SOURCE / f"{n}.yaml").read_text("utf-8")) for n in ("schema", "replies", "values")
    )
    splits = {"train": train_rows(schema, replies, material)}
    splits |= {split: written_rows(split, schema, replies) for split in ("validation", "test")}
    stale = []
    for split, rows in splits.items():
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        path = HERE / f"{split}.jsonl"
        if "--check" in sys.argv:
            stale += [] if path.is_file() and path.read_text("utf-8") == text else [path.name]
        else:
            path.write_text(text, "utf-8")
        print(f"{split}: {len(rows)} rows")
    if stale:
        print(f"not what source/ gives: {', '.join(stale)}; run this script without --check", file=sys.stderr)
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
