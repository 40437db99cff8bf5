"""The commented recipe that `edgemix init` writes."""

from __future__ import annotations

import json

from edgemix.formats import FORMATS, TARGETS
from edgemix.recipe.schema import NGRAMS


def template(*models: str) -> str:
    """Return a commented recipe to edit; its only mistakes are files that may be missing.

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
    # prune: {ffn: 0.25}     # share of its feed-forward channels to remove; also layers, heads, sparsity
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

# How int4 finds its weights. auto is learned-rounding (trained on the text under data: calibration; minutes) where
# there is such text, else rtn (rounding to nearest); gptq uses that text, too, but does not train; hqq is
# Half-Quadratic Quantization.
# quantization:
#   algorithm: auto
#   group: 32        # weights that share a scale
#   steps: 160       # of training, 2,048 tokens each
#   eight_bits: 0.1  # share of the weights that gets 8 bits: the most sensitive layers
#   scale: true      # first move scales from weights to the activations that they read (AWQ)
#   rotate: true     # first rotate the residual stream (QuaRot); also for int8-dynamic

# Put members that share one model (with an adapter each, or without) into one graph: the model is stored and read once
# for all of them, and the blocks of a quantized GGUF file stay as they are. With the model's name in place of true,
# full fine-tunes of it become such members, too, where a low-rank difference is enough.
# stack: true

# float, or int8: the key-value cache takes a quarter of the memory, with scales from the text under data: calibration.
# cache: int8

# Most tokens of a text, prompt included; by default the members' own, as far as tables of positions stay small.
# context: 2048

# A small model that is distilled from the mixture on the text under data: training, for when memory or power is short.
# It is cut from a member to a third of its decoding time.
# student:
#   format: int4
#   minutes: 30

# Number of n-grams of the text under data: training that the bundle keeps to draft from: continuations of up to four
# tokens that occur at least three times, 13 bytes each. 0 if pieces of that text must not be published.
# ngrams: {NGRAMS}

# Texts, one file for each domain: .txt, or .jsonl with a template for its lines. Weights are fitted on validation,
# which no member was trained on. Quantization uses calibration, which may be training text; the check after it
# uses that, too, or validation without it. The student and the n-grams come from training.
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
#   window: 512       # maximum tokens that are scored at once
#   max_tokens: 8000  # maximum tokens of each text

seed: 0
"""
