"""The commented recipe that `edgemix init` writes."""

from __future__ import annotations

import json

from edgemix.formats import FORMATS, TARGETS
from edgemix.recipe.schema import NGRAMS


def template(*models: str) -> str:
    """A recipe with comments, for people to edit; it has no mistakes but files that may be missing.

    Args:
        models: The members' models, each a folder, hub id or .gguf file; without any, an example.
    """
    sources = [_member_lines(f"member{number}", model) for number, model in enumerate(models, start=1)]
    return _TEMPLATE.format(members="".join(sources) or _EXAMPLE_MEMBERS)


def _member_lines(name: str, model: str) -> str:
    return f"  - name: {name}\n    model: {json.dumps(model, ensure_ascii=False)}\n"


_EXAMPLE_MEMBERS = """\
  - name: general
    model: HuggingFaceTB/SmolLM2-135M # a Hugging Face folder, a hub id, or a .gguf file
  - name: math
    model: HuggingFaceTB/SmolLM2-135M
    adapter: adapters/math # a LoRA adapter; edgemix finetune makes one
    # format: int4           # this member's own format
    # prune: {ffn: 0.25}     # share of its feed-forward channels that goes; also layers, heads, sparsity
"""


_TEMPLATE = f"""\
# What edgemix export builds. Paths are relative to this file.

# The models to mix. They must share one tokenizer.
members:
{{members}}
# uniform, fit (on the text under data: validation:), or a number for each member:
#   weights: {{{{general: 0.7, math: 0.3}}}}
# fit on several domains follows the text that is generated; say fixed for weights that stay, adaptive to follow always.
weights: uniform

# {", ".join(FORMATS)}
format: int8

# {", ".join(TARGETS)}
target: cpu

# How int4 finds its weights. auto is distil (trained on the text under data: calibration; minutes) where there is such
# text, else rtn (rounding to nearest); gptq looks at that text, too, but does not train; hqq is Half-Quadratic
# Quantization.
# quantization:
#   algorithm: auto
#   group: 32        # weights that share a scale
#   steps: 160       # of training, 2,048 tokens each
#   eight_bits: 0.1  # share of the weights that gets 8 bits: the layers that suffer most from 4
#   scale: true      # move scales from weights to what they read first (AWQ)
#   rotate: true     # turn the residual stream first (QuaRot); of int8-dynamic, too

# Members that are one model and an adapter each, or not even that, in one graph: the model is stored and read once for
# all of them, and of a quantised GGUF file it stays as it is, bit for bit. With the model's name in the place of true,
# full fine-tunes of it become such members, too, where a few ranks of what differs are enough.
# stack: true

# float, or int8: a text takes a quarter of the memory, with scales found on the text under data: calibration.
# cache: int8

# A small model that is distilled from the mixture on the text under data: training, for where memory or power is short.
# It is cut from the members to a third of one's decoding time.
# student:
#   format: int4
#   minutes: 30

# How many n-grams of the text under data: training the bundle keeps, to draft from while it writes: what follows pieces
# of up to four tokens that come three times at least, 13 bytes each. 0 if nobody should see pieces of that text.
# ngrams: {NGRAMS}

# Texts, one file for each domain: .txt, or .jsonl with a template for its lines. Weights are fitted on validation,
# which no member was trained on. Quantisation looks at calibration, which may be training text; the check after it
# reads that, or validation without it. The student learns from training, and its n-grams are counted.
# data:
#   validation:
#     prose: data/prose.txt
#     math:
#       file: data/math.jsonl
#       template: "Question: {{{{question}}}}\\nAnswer: {{{{answer}}}}\\n"
#   calibration:
#     math: {{{{file: data/math-train.jsonl, template: "{{{{question}}}} {{{{answer}}}}"}}}}
#   training:
#     prose: data/prose-train.txt
#   window: 512       # longest stretch that is scored at once, in tokens
#   max_tokens: 8000  # most tokens that are read of each text

seed: 0
"""
