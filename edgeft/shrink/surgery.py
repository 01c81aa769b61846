"""An operation on one model: cut after cut, each decided on the user's rows, with the loss on them after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from edgeft.shrink.depth import keep_layers
from edgeft.shrink.goal import size_of
from edgeft.shrink.importance import ffn_importance, group_importance, hidden_importance, norm_factors
from edgeft.shrink.vocabulary import cut_embeddings
from edgeft.shrink.width import Selection, keep_ffn, keep_groups, keep_hidden, loadable, strongest
from edgeft.tune.batches import Batch
from edgeft.tune.losses import answer_logits


@dataclass(frozen=True)
class CutReport:
    """What one cut removed, and why."""

    cut: str  # layers, kv_heads, ffn, hidden or vocabulary
    before: int
    after: int
    importance_removed: list[float]  # share of the importance that went, by layer; one in all for hidden; or empty
    loss: float  # nats per trained token of what is left, on the rows the cuts are decided on


class Surgery:
    """The model in float32 (`exact`), which becomes the student, and in fast arithmetic (`probed`), which decides."""

    def __init__(self, exact: Any, probed: Any, batches: Sequence[Batch]) -> None:
        self.exact, self.probed, self.batches = exact, probed, list(batches)
        self.loss_before = mean_loss(probed, self.batches)
        self.reports: list[CutReport] = []
        self.removed: dict[str, list[list[int]]] = {}  # what of the widths went, by layer

    def keep_layers(self, layers: list[int]) -> None:
        before = self.exact.config.num_hidden_layers
        if len(layers) < before:
            self._each(lambda model: keep_layers(model, layers))
            self._report("layers", before, len(layers))

    def keep_kv_heads(self, keep: int) -> None:
        if keep == size_of(self.exact.config, "kv_heads"):
            return
        selection = strongest(group_importance(self.probed, self.batches), keep)
        self._each(lambda model: keep_groups(model, selection.kept))
        self._report_width("kv_heads", selection)

    def keep_ffn(self, keep: int) -> None:
        if keep == size_of(self.exact.config, "ffn"):
            return
        selection = strongest(ffn_importance(self.probed, self.batches), keep)
        self._each(lambda model: keep_ffn(model, selection.kept))
        self._report_width("ffn", selection)

    def keep_hidden(self, keep: int) -> None:
        if keep == size_of(self.exact.config, "hidden"):
            return
        selection = strongest([hidden_importance(self.probed, self.batches)], keep)
        (kept,) = selection.kept
        factors = norm_factors(self.probed, self.batches, torch.tensor(kept))
        self._each(lambda model: keep_hidden(model, kept, factors))
        self._report_width("hidden", selection)

    def keep_tokens(self, kept: list[int]) -> None:
        """Every token of the rows must be among the kept ones."""
        before = self.exact.config.vocab_size
        for model in (self.exact, self.probed):
            cut_embeddings(model, kept)
        new = torch.zeros(before, dtype=torch.long, device=self.batches[0].ids_BT.device)
        new[kept] = torch.arange(len(kept), device=new.device)
        self.batches = [
            Batch(new[b.prefix_P], new[b.ids_BT], b.attention_BT, b.at_N, new[b.labels_N]) for b in self.batches
        ]
        self._report("vocabulary", before, len(kept))

    def finish(self) -> Any:
        """The student, as a class that loads again."""
        self.exact = loadable(self.exact)
        return self.exact

    def _each(self, cut: Callable[[Any], Any]) -> None:
        self.exact, self.probed = cut(self.exact), cut(self.probed)

    def _report_width(self, cut: str, selection: Selection) -> None:
        kept, removed = len(selection.kept[0]), len(selection.removed[0])
        self.removed[cut] = selection.removed
        self._report(cut, kept + removed, kept, selection.lost)

    def _report(self, cut: str, before: int, after: int, lost: Sequence[float] = ()) -> None:
        self.reports.append(CutReport(cut, before, after, list(lost), mean_loss(self.probed, self.batches)))


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy (nats) per trained token."""
    total = sum(
        float(F.cross_entropy(answer_logits(model, batch).float(), batch.labels_N, reduction="sum"))
        for batch in batches
    )
    return total / sum(len(batch.labels_N) for batch in batches)
