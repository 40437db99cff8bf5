"""The summary's sentences and headline numbers."""

from __future__ import annotations

from dataclasses import replace

from helpers.samples import evaluation, manifest, profile, weight_traces

from edgemix.report.data import ReportData
from edgemix.report.sections.summary import kpis, summary


def test_the_summary_uses_the_data_that_is_there():
    everything = ReportData("experts", manifest(), evaluation(), weight_traces(), profile())
    assert summary(everything).startswith(
        "The mixture needs 0.847 bits per byte on these texts, 5.2% fewer than its best"
    )
    assert [kpi.value for kpi in kpis(everything)] == ["0.847", "66.9", "17.9", "418", "61%"]

    unread = ReportData("experts", manifest(), profile=profile())
    assert summary(unread).endswith("473 MB for cpu. It generates 66.9 tokens per second with 2 threads.")

    alone = ReportData("one", manifest(("alone",), student=False, budget=False))
    assert summary(alone) == "One member in int8-dynamic: 141 MB for cpu."
    assert [kpi.label for kpi in kpis(alone)] == ["member"]


def test_a_mixture_worse_than_its_best_member_is_called_worse():
    found = evaluation()
    rows = [
        replace(
            row, overall=replace(row.overall, bits_per_byte=0.9 if row.name == "fitted" else row.overall.bits_per_byte)
        )
        for row in found.rows
    ]
    data = ReportData("experts", manifest(), replace(found, rows=tuple(rows)))

    assert "0.8% more than its best member, math" in summary(data)
