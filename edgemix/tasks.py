"""The tasks: what the members of a mixture predict. One row a task, named as Hugging Face names it.

Exporter, bundle and runtime read the row; a new task is a new row, and a module if its graphs or answers are new.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

TaskName = Literal["text-generation", "text-classification", "token-classification", "fill-mask"]
LabelTaskName = Literal["text-classification", "token-classification", "fill-mask"]
"""Tasks whose y is a label, or a label for each token."""
LabelCombine = Literal["linear", "log-linear", "bayes"]
"""Ways to mix distributions over labels: the mean of probabilities, the weighted geometric mean, the product of
posteriors over the prior."""
GraphKind = Literal["decoder", "encoder"]
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
        recipe: Import path of the class of its recipes.
        manifest: Import path of the class of its bundles' manifests.
        export: Import path of the function that builds its bundles.
    """

    name: TaskName
    inputs: tuple[Literal["text", "image", "audio"], ...]
    auto_class: str
    shared: Literal["vocabulary", "labels"]
    mixing: tuple[str, ...]
    metrics: tuple[str, ...]
    graph: GraphKind
    runtime_class: str
    recipe: str
    manifest: str
    export: str

    def load(self, attribute: Literal["runtime_class", "recipe", "manifest", "export"]) -> Any:
        """Import what one of the row's import paths names."""
        module, _, name = getattr(self, attribute).rpartition(".")
        return getattr(import_module(module), name)


_LABELS: Any = {
    "inputs": ("text",),
    "shared": "labels",
    "mixing": ("linear", "log-linear", "bayes"),
    "graph": "encoder",
    "recipe": "edgemix.recipe.labels.LabelRecipe",
    "manifest": "edgemix.bundle.label_bundle.manifest.LabelManifest",
    "export": "edgemix.export.labels.pipeline.export_label_bundle",
}
"""What all tasks over labels have in common."""
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
        recipe="edgemix.recipe.schema.Recipe",
        manifest="edgemix.bundle.manifest.Manifest",
        export="edgemix.export.pipeline.export_bundle",
    ),
    Task(
        name="text-classification",
        auto_class="AutoModelForSequenceClassification",
        metrics=("accuracy", "macro_f1", "nll", "calibration_error"),
        runtime_class="edgemix.runtime.classification.classifier.Classifier",
        **_LABELS,
    ),
    Task(
        name="token-classification",
        auto_class="AutoModelForTokenClassification",
        metrics=("entity_f1", "accuracy", "nll"),
        runtime_class="edgemix.runtime.classification.token_classifier.TokenClassifier",
        **_LABELS,
    ),
    Task(
        name="fill-mask",
        auto_class="AutoModelForMaskedLM",
        metrics=("accuracy", "nll"),
        runtime_class="edgemix.runtime.classification.fill_mask_mixture.FillMask",
        **_LABELS,
    ),
)

TASKS: dict[TaskName, Task] = {row.name: row for row in _ROWS}
DEFAULT_TASK: TaskName = "text-generation"
"""The task of manifests and recipes that name none."""
