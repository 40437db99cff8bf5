"""The weight formats and targets by name: what a recipe may ask for and a manifest may hold."""

from __future__ import annotations

from typing import Literal, get_args

Format = Literal["fp32", "fp16", "int8", "int8-dynamic", "int4", "nf4"]
Target = Literal["cpu", "cuda"]

FORMATS: tuple[Format, ...] = get_args(Format)
TARGETS: tuple[Target, ...] = get_args(Target)
