"""The members' 4-bit and 8-bit blocks, by the algorithm and the calibration text of the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from edgemix.bundle.stages import stage_key
from edgemix.errors import storage_errors
from edgemix.export.models.layout import layout
from edgemix.export.models.loading import versions
from edgemix.export.models.location import locate
from edgemix.export.quantization.algorithms import learned_rounding
from edgemix.export.quantization.algorithms.block_table import BlockTable
from edgemix.export.quantization.algorithms.gguf_blocks import gguf_blocks
from edgemix.export.quantization.algorithms.gptq_model import gptq_blocks
from edgemix.export.quantization.algorithms.learned_rounding import learn_rounding, linear_weights
from edgemix.export.quantization.statistics import calibration
from edgemix.export.quantization.statistics.sensitivity import most_sensitive, quantization_costs
from edgemix.export.training.checkpoints import Checkpoint
from edgemix.export.training.loop import fingerprint
from edgemix.formats import FORMAT_SPECS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.export.context import ExportContext
    from edgemix.export.models.loading import LoadedMember
    from edgemix.export.stages.models import MemberModels
    from edgemix.recipe.schema import MemberRecipe

_GGUF_BLOCK = 32


class MemberBlocks:
    """Compute members' blocks in the writer's scratch.

    Args:
        context: The export.
        models: The members' models.
    """

    def __init__(self, context: ExportContext, models: MemberModels) -> None:
        self._context, self._recipe, self._models = context, context.recipe, models

    def find(self, spec: MemberRecipe, eight_bit: Sequence[str] | None = None) -> BlockTable | None:
        """Return the blocks of an int4 or int8 member's linears; None for plain rounding and for other formats.

        Args:
            spec: The member.
            eight_bit: Names of the linears that get 8 bits in int4; None leaves the choice to the recipe.

        Raises:
            InputError: The member cannot be read, or its structure is not known.
        """
        weight_format, quantization = self._models.format(spec), self._models.quantization(spec)
        row = FORMAT_SPECS[weight_format]
        if eight_bit is None and row.block_bits is not None:
            own = self.repacked(spec, row.block_bits)
            if own is not None:
                return own
        if not row.mixed_bits or quantization.algorithm in ("rtn", "hqq"):
            return None
        if not self._models.has_text():
            note = "int4 by plain rounding; with text under data: calibration: it loses far less"
            self._context.progress.log(f"{spec.name}: {note}")
            return None
        member = self._models.load(spec)
        if eight_bit is None:
            eight_bit = self._sensitive(spec, member)
        key = stage_key(
            model=fingerprint(member.model),
            quantization=quantization,
            eight_bit=eight_bit,
            text=self._models.data_digest(),
            name=spec.name,
            versions=versions(),
            seed=self._recipe.seed,
        )
        path, linears = self._context.writer.scratch / f"{spec.name}.blocks.safetensors", eight_bit

        def make() -> bool:
            table = self._make(spec, member, linears, key)
            with storage_errors(f"writing {path}"):
                table.save(path)
            return True

        cleanup = self._checkpoint(spec, key).remove
        self._context.stage(f"blocks/{spec.name}", key, make, bool, files=[path], cleanup=cleanup)
        return BlockTable.load(path)

    def repacked(self, spec: MemberRecipe, bits: Literal[4, 8]) -> BlockTable | None:
        """Return the blocks of a member's GGUF file, if all its linears have some and the recipe changes no weights."""
        location = locate(spec.model, self._recipe.folder)
        own = self._models.quantization(spec)
        plain = own.algorithm == "auto" and own.group == _GGUF_BLOCK and not (own.rotate or own.scale or own.eight_bits)
        if not plain or spec.adapter or spec.prune or not location.gguf:
            return None
        progress = self._context.member_progress(spec)
        with progress.stage("repack"):
            table, model = gguf_blocks(location, bits), self._models.load(spec).model
            if not (len(table) and all(table.find(matrix) is not None for matrix in linear_weights(model).values())):
                return None
        progress.log("keeps the quantization of its GGUF file")
        return table

    def _make(self, spec: MemberRecipe, member: LoadedMember, eight_bit: Sequence[str], key: str) -> BlockTable:
        quantization, seed = self._models.quantization(spec), self._recipe.seed
        progress, bits = self._context.member_progress(spec), dict.fromkeys(eight_bit, 8)
        if quantization.algorithm == "gptq":
            text = self._calibration(spec, member)
            return gptq_blocks(member.model, text, bits=bits, block=quantization.group, seed=seed, progress=progress)
        count = quantization.steps * learned_rounding.BATCH
        text = self._models.calibration(member.tokenizer, spec.name, learned_rounding.LENGTH, count)
        return learn_rounding(
            member.model,
            np.array(text, np.int64),
            bits=bits,
            block=quantization.group,
            steps=quantization.steps,
            seed=seed,
            checkpoint=self._checkpoint(spec, key),
            progress=progress,
        )

    def _sensitive(self, spec: MemberRecipe, member: LoadedMember) -> tuple[str, ...]:
        """Return the names of the linears that get 8 bits by the recipe."""
        quantization = self._models.quantization(spec)
        if not quantization.eight_bits:
            return ()
        found = self.costs(spec, member)
        return most_sensitive(found, layout(member.model), quantization.eight_bits)

    def costs(self, spec: MemberRecipe, member: LoadedMember) -> dict[str, dict[int, float]]:
        """Return the loss of each linear of a member at 4 and at 8 bits; see `sensitivity.quantization_costs`."""
        quantization, seed = self._models.quantization(spec), self._recipe.seed
        text = self._calibration(spec, member)
        model, group = fingerprint(member.model), quantization.group
        key = stage_key(model=model, group=group, text=text, versions=versions(), seed=seed)

        def make() -> dict[str, dict[int, float]]:
            return quantization_costs(member.model, text, block=group, progress=self._context.member_progress(spec))

        return self._context.stage(f"costs/{spec.name}", key, make, dict[str, dict[int, float]])

    def _calibration(self, spec: MemberRecipe, member: LoadedMember) -> list[list[int]]:
        return self._models.calibration(member.tokenizer, spec.name, calibration.LENGTH, calibration.WINDOWS)

    def _checkpoint(self, spec: MemberRecipe, key: str) -> Checkpoint:
        return Checkpoint(self._context.writer.scratch / f"{spec.name}.training", key)
