"""The result table: one row per measured package or floor, the same fields in every row, every null with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

ACCURACY_FIELDS = (
    "n", "n_json", "n_reply", "json_valid", "intent_accuracy", "intent_macro_f1", "joint_exact_match", "reply_chrf",
    "reply_rouge_l", "perplexity", "perplexity_95", "ece", "escalation_precision", "escalation_recall",
    "request_tokens", "answer_tokens",
)  # fmt: skip
SPEED_FIELDS = (
    "load_s", "cold_load_s", "ttft_s", "cold_ttft_s", "prefill_tps", "decode_tps", "decode_ms_p50", "decode_ms_p90",
    "decode_ms_p95", "decode_ms_p99", "peak_rss_bytes", "weights_bytes", "cache_bytes_per_token",
    "read_bytes_per_token", "bandwidth_share", "gemm_share", "joules_per_token",
)  # fmt: skip
SAVED_FIELDS = ("replaced_tokens", "saved_s")
FIELDS = (
    "name", "format", "quant", "runtime", "digest", "bytes", "bits_per_weight", *SPEED_FIELDS, *ACCURACY_FIELDS,
    *SAVED_FIELDS, "kl_mean", "top1", "package", "conditions",
)  # fmt: skip
NAMES = ("teacher", "student", "base_fewshot", "svm")  # order in the table; other names follow
FORMATS = ("hf", "gguf", "onnx")
USUAL = {"gguf": "llama.cpp", "onnx": "onnxruntime", "hf": "torch"}  # the runtime that goes without saying
DASH = "—"

# header, field, unit factor, decimals; a percentage has the factor 100
COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("size MB", "bytes", 1e-6, 1),
    ("bits/weight", "bits_per_weight", 1, 2),
    ("load s", "load_s", 1, 2),
    ("TTFT ms", "ttft_s", 1000, 0),
    ("prefill tok/s", "prefill_tps", 1, 0),
    ("decode tok/s", "decode_tps", 1, 1),
    ("p50 ms", "decode_ms_p50", 1, 1),
    ("p95 ms", "decode_ms_p95", 1, 1),
    ("p99 ms", "decode_ms_p99", 1, 1),
    ("bandwidth %", "bandwidth_share", 100, 0),
    ("GEMM %", "gemm_share", 100, 0),
    ("J/token", "joules_per_token", 1, 3),
    ("peak RSS MB", "peak_rss_bytes", 1e-6, 0),
    ("weights MB", "weights_bytes", 1e-6, 0),
    ("KV MB/1,000 tok", "cache_bytes_per_token", 1e-3, 1),
    ("joint exact %", "joint_exact_match", 100, 1),
    ("intent %", "intent_accuracy", 100, 1),
    ("macro-F1 %", "intent_macro_f1", 100, 1),
    ("JSON %", "json_valid", 100, 1),
    ("reply chrF", "reply_chrf", 1, 1),
    ("reply ROUGE-L", "reply_rouge_l", 1, 1),
    ("perplexity", "perplexity", 1, 3),
    ("ECE %", "ece", 100, 1),
    ("escalated %", "escalation_recall", 100, 1),
    ("KL", "kl_mean", 1, 4),
    ("top-1 %", "top1", 100, 1),
)
TERMINAL = (
    "bytes", "ttft_s", "decode_tps", "peak_rss_bytes", "joint_exact_match", "intent_accuracy", "perplexity", "kl_mean",
)  # fmt: skip


def make_row(values: Row, absent: dict[str, str]) -> Row:
    """All fields in order; a missing one is None. Raises ValueError if a None (other than name) has no reason."""
    row: Row = {field: values.get(field) for field in FIELDS}
    unexplained = [field for field in FIELDS if row[field] is None and field not in absent and field != "name"]
    if unexplained:
        raise ValueError(f"absent without a reason: {', '.join(unexplained)}")
    row["absent"] = {field: absent[field] for field in FIELDS if row[field] is None and field in absent}
    return row


def name_of_input(input_name: str, row: Row) -> str:
    """'teacher' from the report's input 'bench-teacher-gguf-q8_0' and that input's row; 'svm' from 'bench-svm'."""
    name = input_name.removeprefix("bench-")
    return name.removesuffix(f"-{row['format']}-{row['quant']}")


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Teacher, student, floors; within a name GGUF before ONNX and large before small."""

    def rank(value: Any, known: Sequence[str]) -> tuple[int, str]:
        return (known.index(value) if value in known else len(known), str(value))

    return sorted(rows, key=lambda r: (rank(r["name"], NAMES), rank(r["format"], FORMATS), -(r["bytes"] or 0)))


def package_label(row: Row) -> str:
    """'gguf q8_0', 'onnx int8 in onnxruntime-genai', or a dash for what is no package."""
    other = row["format"] and row.get("runtime") not in (None, USUAL.get(row["format"]))
    parts = (row["format"], row["quant"], f"in {row['runtime']}" if other else None)
    return " ".join(part for part in parts if part) or DASH


def cell(row: Row, field: str, scale: float = 1, decimals: int = 1) -> str:
    """A figure as text, without its interval; a dash when absent."""
    value = row.get(field)
    if value is None:
        return DASH
    return f"{(value[0] if isinstance(value, list | tuple) else value) * scale:,.{decimals}f}"


def interval(row: Row, field: str, scale: float = 1, decimals: int = 1) -> str:
    """'88.1-93.9', or '' for a figure without an interval."""
    value = row.get(field) if field != "perplexity" or row.get(field) is None else [None, *row["perplexity_95"]]
    if not isinstance(value, list | tuple):
        return ""
    return f"{value[1] * scale:.{decimals}f}-{value[2] * scale:.{decimals}f}"


def marks_of(row: Row) -> list[str]:
    """What makes the timings of a row doubtful."""
    return list((row.get("conditions") or {}).get("marks") or ())


def text_table(rows: Iterable[Row], fields: Sequence[str] = TERMINAL) -> tuple[list[str], list[list[str]]]:
    """Headers and cells for a terminal; joint exact match comes with its 95% interval, doubtful timings with a star."""
    columns = [column for column in COLUMNS if column[1] in fields]
    body = []
    for row in in_order(rows):
        cells = [str(row["name"] or DASH) + ("*" if marks_of(row) else ""), package_label(row)]
        for _, field, scale, decimals in columns:
            text = cell(row, field, scale, decimals)
            with_interval = field == "joint_exact_match" and text != DASH
            cells.append(f"{text} ({interval(row, field, scale, decimals)})" if with_interval else text)
        body.append(cells)
    return ["model", "package", *(header for header, *_ in columns)], body
