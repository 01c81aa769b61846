"""Perplexity of general text, and divergence on it, by llama-perplexity and by edgeft, on the same tokens.

The text is taken in chunks of WINDOW tokens; of each its second half is judged, every token after all before it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgeft.bench.host import physical_cores
from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.formats.parity import Floats, compare
from edgeft.text.chat import ChatTokenizer

TEXT = Path(__file__).parents[2] / "edgeft/text/general.txt"
WINDOW = 256
WAYS = {  # of running the model that is judged
    "default": (),
    "a chunk a call": ("-b", str(WINDOW), "-ub", str(WINDOW)),
    "no flash attention": ("-fa", "off"),
}


def llama_perplexity(tool: Path, model: Path) -> float:
    """What llama-perplexity says about TEXT."""
    return float(_said(tool, model).split("Final estimate: PPL =")[1].split()[0])


def llama_divergences(tool: Path, reference: Path, model: Path, work: Path) -> dict[str, float]:
    """The mean KL divergence of a model from a reference by llama-perplexity, in nats, by its own settings.

    They round activations otherwise: the same Q4_K_M file gives figures that are 2% apart, so that there is no one
    figure to agree with.
    """
    kept = work / "reference.kld"
    _said(tool, reference, "--kl-divergence-base", str(kept))
    found = {}
    for name, options in WAYS.items():
        said = _said(tool, model, "--kl-divergence-base", str(kept), "--kl-divergence", *options)
        line = next(line for line in said.splitlines() if line.startswith("Mean") and "KLD:" in line)
        found[name] = float(line.split("KLD:")[1].split()[0])
    kept.unlink()
    return found


def own_perplexity(model: Path, chat: ChatTokenizer) -> float:
    """What `llama_perplexity` gives, by edgeft."""
    nll = [np.log(compare(logits, logits, next_ids).perplexity) for logits, next_ids in _scored(model, chat)]
    return float(np.exp(np.mean(nll)))


def own_divergence(reference: Path, model: Path, chat: ChatTokenizer) -> float:
    """What `llama_divergences` give, by edgeft."""
    both = zip(_scored(reference, chat), _scored(model, chat), strict=True)
    return float(np.mean([compare(theirs, ours, next_ids).kl_mean for (theirs, next_ids), (ours, _) in both]))


def _scored(model: Path, chat: ChatTokenizer) -> Iterator[tuple[Floats, np.ndarray]]:
    """Logits [P, V] of each chunk's judged positions, and the tokens that follow there."""
    ids = chat.encode_text(TEXT.read_text("utf-8"))
    chunks = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
    at = range(WINDOW // 2, WINDOW - 1)
    session = LlamaCppSession(model, physical_cores(), WINDOW)
    try:
        for chunk, logits_PV in zip(chunks, session.score([(chunk, at) for chunk in chunks]), strict=True):
            yield logits_PV, np.array([chunk[i + 1] for i in at], np.int32)
    finally:
        session.close()


def _said(tool: Path, model: Path, *options: str) -> str:
    command = [str(tool), "-m", str(model), "-f", str(TEXT), "-c", str(WINDOW), "-t", str(physical_cores()), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
