"""Weight formats: one file an algorithm, one table of formats."""

from edgemix.export.quantization.formats import FORMATS, Algorithm, quantize

__all__ = ["FORMATS", "Algorithm", "quantize"]
