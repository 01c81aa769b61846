"""How many operations a training step's matrix products take, and so how much of the machine's rate it reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Arithmetic:
    """Operations of the products with weights, forward and backward, two per multiply-add.

    The products inside attention, padding and all that is no product are left out: `share` is the useful share.
    `gflops` is the measured rate of large products in the training precision (`gemm_gflops`).
    """

    per_token: float
    per_answer_token: float
    gflops: float

    @staticmethod
    def of(model: Any, gflops: float) -> Arithmetic:
        """Of a causal language model whose trainable weights require gradients.

        A weight costs one product forward, one for the gradient to its input if its layer or one below learns (which
        counts the first projections of the first such layer once too often), and one for its own gradient if it does.
        A side of an adapter costs two, as its forward product is folded into that of the weight (`qlora.FoldedLora`).
        """
        learns = any(p.requires_grad for p in model.get_input_embeddings().parameters())
        per_token = 0.0
        for layer in model.get_decoder().layers:
            learns = learns or any(p.requires_grad for p in layer.parameters())
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    products = 2 if ".lora_" in name else 1 + learns + module.weight.requires_grad
                    per_token += 2.0 * products * module.in_features * module.out_features
        head = model.get_output_embeddings().weight
        return Arithmetic(per_token, 2.0 * (1 + learns + head.requires_grad) * head.numel(), gflops)

    def share(self, tokens: int, answer_tokens: int, seconds: float) -> float:
        """Of the rate, reached by so much work in so much time."""
        return (tokens * self.per_token + answer_tokens * self.per_answer_token) / seconds / 1e9 / self.gflops
