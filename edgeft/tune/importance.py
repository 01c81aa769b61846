"""How much each input channel of each matrix carries, measured on real rows.

The weights by which llama.cpp's quantisers are told what to keep (its `imatrix`): E[x_c^2] over the tokens, because
the expected squared error of a product is the sum over channels of E[x_c^2] times the squared error of the weights,
if channels are uncorrelated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from edgeft.errors import ModelError
from edgeft.text.encode import Encoded
from edgeft.tune.batches import collate
from edgeft.tune.losses import answer_logits


def mean_input_squares(
    model: PreTrainedModel, rows: Iterable[Encoded], done: Callable[[], None] = lambda: None
) -> dict[str, NDArray[np.float32]]:
    """{name of a linear layer's weight: float32 [in_features]}: mean over the rows' tokens of each squared input.

    The output head counts the positions that predict a trained token alone: it runs nowhere else. Its entry has its
    own name (lm_head.weight) even if its weight is the embedding's. `done` is called after every row. Raises
    ModelError if an input is not finite.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x_TC = inputs[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x_TC.square().sum(0).double()
            counts[name] = counts.get(name, 0) + len(x_TC)

        return add

    linears = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    try:
        with torch.inference_mode():
            for row in rows:
                answer_logits(model, collate([row], pad_id=0))  # one at a time, so that padding never counts
                done()
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: (total / counts[name]).float().numpy() for name, total in sums.items()}
    if broken := [name for name, mean in means.items() if not np.isfinite(mean).all()]:
        raise ModelError(f"the inputs of {broken[0]} are not finite", "train again with a lower learning rate")
    return means
