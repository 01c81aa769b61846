"""What genai_config.json says of the graph beside it; edgeft writes one into every ONNX package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgeft.errors import ModelError

FILE = "genai_config.json"


@dataclass(frozen=True)
class GenaiConfig:
    """The decoder's shape, where answers end, and whether the graph extends keys and values in place."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_size: int
    stop_ids: frozenset[int]
    extends_in_place: bool  # otherwise it gives longer ones

    @staticmethod
    def of(package: Path) -> GenaiConfig:
        """Raises ModelError if the package has no such file or not all of it can be read."""
        path = package / FILE
        if not path.is_file():
            raise ModelError(f"{package} has no {FILE}", "export the package again; edgeft writes this file")
        try:
            config = json.loads(path.read_text("utf-8"))
            decoder, stop = config["model"]["decoder"], config["model"]["eos_token_id"]
            return GenaiConfig(
                int(config["model"]["vocab_size"]),
                int(decoder["hidden_size"]),
                int(decoder["num_hidden_layers"]),
                int(decoder["num_key_value_heads"]),
                int(decoder["head_size"]),
                frozenset(map(int, stop if isinstance(stop, list) else [stop])),
                bool(config["search"]["past_present_share_buffer"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} cannot be read: {error!r}", "export the package again") from None
