"""Weight formats: one file an algorithm, one table of formats."""

from edgemix.export.quantization.formats import EMITTERS, Algorithm, quantize

__all__ = ["EMITTERS", "Algorithm", "quantize"]
