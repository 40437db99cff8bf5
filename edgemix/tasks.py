"""The tasks: what the members of a mixture predict. One row a task, named as Hugging Face names it.

Exporter, bundle and runtime read the row; a new task is a new row, and a module if its graphs or answers are new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TaskName = Literal["text-generation"]
GraphKind = Literal["decoder"]
"""`bundle.graph_io.GRAPH_TENSORS` has the tensors of each kind."""


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: Hugging Face's name.
        inputs: Modalities that members read.
        auto_class: The class of transformers that loads a model with the head of the task.
        shared: What members must have in common: one tokenizer's vocabulary, or the names of labels.
        mixing: Ways to combine the members' distributions; the first is the default.
        metrics: Metrics that an evaluation reports; the first decides between mixtures.
        graph: Kind of a member's graph.
        runtime_class: Import path of the class that runs a bundle; it has `load(path, **options)`.
    """

    name: TaskName
    inputs: tuple[Literal["text", "image", "audio"], ...]
    auto_class: str
    shared: Literal["vocabulary", "labels"]
    mixing: tuple[str, ...]
    metrics: tuple[str, ...]
    graph: GraphKind
    runtime_class: str


_ROWS = (
    Task(
        name="text-generation",
        inputs=("text",),
        auto_class="AutoModelForCausalLM",
        shared="vocabulary",
        mixing=("linear", "log-linear"),
        metrics=("bits_per_byte", "perplexity"),
        graph="decoder",
        runtime_class="edgemix.runtime.mixture.Mixture",
    ),
)

TASKS: dict[TaskName, Task] = {row.name: row for row in _ROWS}
DEFAULT_TASK: TaskName = "text-generation"
"""The task of manifests and recipes that name none."""
