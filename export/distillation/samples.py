"""Windows that the student generates, so that it is trained on its own output distribution.

On-policy distillation (GKD, arXiv 2306.13649): the student continues the start of a window at temperature 1, and the
teacher's distributions are computed after every token. No gradient flows through the sampled tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROMPT = 0.25
"""Fraction of a window that is kept as the prompt; the student generates the rest."""


def generate_windows(model: PreTrainedModel, windows: Tensor, vocabulary: int, *, bfloat16: bool = False) -> Tensor:
    """Generate windows [count, length] that start like the given ones and continue with samples from the model.

    Samples use torch's global generator. Generation continues after end-of-text tokens, as in packed windows.

    Args:
        model: The student, in evaluation mode.
        windows: int64 [count, length] on the model's device.
        vocabulary: Size of the tokenizer's vocabulary: ids beyond it are not sampled.
        bfloat16: Run matrix products in bfloat16 (torch.autocast).
    """
    length = windows.shape[1]
    prompt = max(1, int(PROMPT * length))
    generated = windows.clone()
    with torch.no_grad(), torch.autocast(windows.device.type, torch.bfloat16, enabled=bfloat16):
        past, new = None, generated[:, :prompt]
        for at in range(prompt, length):
            output = model(input_ids=new, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            new = torch.multinomial(output.logits[:, -1, :vocabulary].float().softmax(-1), 1)
            generated[:, at] = new[:, 0]
    return generated
