"""Windows that the student writes itself: what it learns on is then what it will meet when it writes.

On-policy distillation (GKD, arXiv 2306.13649): the student continues the beginning of a window at temperature 1, and
the teacher says what it would have said after every token. No gradient goes through the choice of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROMPT = 0.25
"""Share of a window that is its text's; the student writes the rest."""


def write_windows(model: PreTrainedModel, windows: Tensor, vocabulary: int, *, bfloat16: bool = False) -> Tensor:
    """Windows [count, length] that begin as those given do, and go on as the model draws.

    Draws come from torch's global generator. An end-of-text token is followed by another text, as in packed windows.

    Args:
        model: The student, in evaluation mode.
        windows: int64 [count, length] on the model's device.
        vocabulary: The tokenizer's: nothing beyond it is drawn.
        bfloat16: Run matrix products in bfloat16 (torch.autocast).
    """
    length = windows.shape[1]
    begin = max(1, int(PROMPT * length))
    written = windows.clone()
    with torch.no_grad(), torch.autocast(windows.device.type, torch.bfloat16, enabled=bfloat16):
        past, new = None, written[:, :begin]
        for at in range(begin, length):
            output = model(input_ids=new, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            new = torch.multinomial(output.logits[:, -1, :vocabulary].float().softmax(-1), 1)
            written[:, at] = new[:, 0]
    return written
