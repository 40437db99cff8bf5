"""Members and bundles with known outputs."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

import pytest
from helpers.onnx_members import VOCABULARY, ClosedForm, random_member, write_bundle, write_graph

from edgemix.runtime import Mixture
from edgemix.runtime.decoding.cost_model import SpeculationCostModel
from edgemix.runtime.graphs.decoder import DecoderGraph

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class GraphCalls(list[int]):
    """The tokens of each call of a graph, since it was cleared.

    Attributes:
        before: Called with nothing before each call; it may raise, or take its time.
    """

    before: Callable[[], object] = staticmethod(lambda: None)


@pytest.fixture
def graph_calls(monkeypatch: pytest.MonkeyPatch) -> GraphCalls:
    """Counts the calls of all graphs."""
    calls, within = GraphCalls(), threading.local()

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(graph: DecoderGraph, cache: object, tokens: Any) -> Any:
            if getattr(within, "call", False):  # of one row among several
                return real(graph, cache, tokens)
            calls.append(sum(map(len, tokens)))
            calls.before()
            within.call = True
            try:
                return real(graph, cache, tokens)
            finally:
                within.call = False

        return call

    for name in ("extend", "extend_all"):
        monkeypatch.setattr(DecoderGraph, name, counted(getattr(DecoderGraph, name)))
    return calls


@pytest.fixture
def load(tmp_path: Path) -> Callable[[ClosedForm], DecoderGraph]:
    """Turns closed forms into loaded members."""
    names = iter("abcdefgh")

    def load(form: ClosedForm) -> DecoderGraph:
        graph = tmp_path / next(names) / "model.onnx"
        return DecoderGraph.load(graph, write_graph(graph, form), threads=1)

    return load


@pytest.fixture
def mixture_of(tmp_path: Path) -> Callable[..., Mixture]:
    """Turns closed forms over the byte tokenizer into a loaded mixture."""

    def load(members: dict[str, ClosedForm], **options: Any) -> Mixture:
        return Mixture.load(write_bundle(tmp_path / "bundle", members, **options), provider="cpu", threads=1)

    return load


@pytest.fixture(scope="session")
def pair_forms() -> dict[str, ClosedForm]:
    """Two members that disagree: one of each cache kind, padded to different widths."""
    return {
        "shared": random_member(1, tokens=VOCABULARY, padding=6),
        "growing": random_member(2, tokens=VOCABULARY, padding=14, cache="growing"),
    }


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, pair_forms: dict[str, ClosedForm]) -> Mixture:
    """The mixture of `pair_forms`, weights 0.7 and 0.3; domains "first" and "second" are one member each."""
    folder = write_bundle(
        tmp_path_factory.mktemp("pair") / "bundle",
        pair_forms,
        weights={"shared": 0.7, "growing": 0.3},
        domains={"first": {"shared": 1.0, "growing": 0.0}, "second": {"shared": 0.0, "growing": 1.0}},
    )
    return Mixture.load(folder, provider="cpu", threads=1)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft pays, the student's two times of three, and a member that writes alone goes on."""
    for question in ("worth_drafting", "defer_verification"):
        monkeypatch.setattr(SpeculationCostModel, question, lambda *_: True)
    promises = itertools.cycle((1.0, 1.0, -1.0))
    monkeypatch.setattr(SpeculationCostModel, "expected_saving", lambda *_: next(promises))
