"""Bundle in, text out: the runtime that apps embed.

with Mixture.load("bundle") as mixture:
    print(mixture.generate("Once upon a time").text)
"""

from edgemix.runtime.mixing.ensemble import WeightChoice
from edgemix.runtime.mixture import Mixture
from edgemix.runtime.options import GenerateOptions
from edgemix.runtime.results import Chunk, Completion, Score, Timings
from edgemix.runtime.serving.scheduler import BatchScheduler, RequestHandle
from edgemix.runtime.session import Session

__all__ = [
    "BatchScheduler",
    "Chunk",
    "Completion",
    "GenerateOptions",
    "Mixture",
    "RequestHandle",
    "Score",
    "Session",
    "Timings",
    "WeightChoice",
]
