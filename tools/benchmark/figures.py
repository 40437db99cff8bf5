"""Summarize, print and plot the benchmark's figures."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
from sides import ALL, ALONE, NAIVE, Side

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from turns import Turns

    from edgemix.cli.console import Console


def summary(found: Mapping[str, Turns], compared: Mapping[str, Side], domains: list[str]) -> dict[str, Any]:
    """Medians, spreads and ratios of each side."""
    rows: dict[str, Any] = {}
    for name, turns in found.items():
        decode = [rate for rates in turns.decode.values() for rate in rates]
        prefill = [rate for rates in turns.prefill.values() for rate in rates]
        row = {
            "decode": statistics.median(decode),
            "decode_quartiles": np.percentile(decode, [25, 75]).tolist(),
            "prefill": statistics.median(prefill),
            "times_naive": _ratio(turns, found[NAIVE]),
            "times_one_member": _ratio(turns, found[ALONE]),
            "all_times_this": _ratio(found[ALL], turns),
            "by_domain": {
                domain: statistics.median(
                    rate for number, rates in turns.decode.items() if domains[number] == domain for rate in rates
                )
                for domain in dict.fromkeys(domains)
            },
        }
        if like := compared[name].like:
            row["differ"] = sum(text != found[like].text[number] for number, text in turns.text.items())
        rows[name] = row
    return rows


def _ratio(turns: Turns, base: Turns) -> float:
    pairs = (zip(rates, base.decode[number], strict=True) for number, rates in turns.decode.items())
    return statistics.median(ours / theirs for pair in pairs for ours, theirs in pair)


def show(figures: dict[str, Any], console: Console) -> None:
    """The table for people."""
    rows = figures["sides"]
    domains = next(iter(rows.values()))["by_domain"]
    ratios = ("x naive", "x member", "All is")
    columns = ("", "Decode", *(domains if len(domains) > 1 else ()), *ratios, "Prefill", "Texts differ")
    console.table(
        f"Tokens/s: {figures['prompts']} prompts, {figures['new_tokens']} new tokens, {figures['threads']} threads",
        columns,
        [
            (
                name,
                f"{row['decode']:.1f}",
                *(f"{rate:.1f}" for rate in row["by_domain"].values() if len(domains) > 1),
                f"{row['times_naive']:.2f}",
                f"{row['times_one_member']:.2f}",
                f"{row['all_times_this']:.2f}x",
                f"{row['prefill']:,.0f}",
                str(row.get("differ", "")),
            )
            for name, row in rows.items()
        ],
    )
    load = figures["loading"]
    for prefix, name in (("", "all members, warm"), ("packed_", "the same from packed weights")):
        seconds, resident = load[f"{prefix}seconds"], load[f"{prefix}resident"]
        size = f"{resident / 1e6:,.0f} MB resident, {resident / load['files']:.2f} times their files"
        console.note(f"{seconds:.2f} s to load {name}; {size}")
    if figures["throughput"]:
        many = figures["throughput"]
        console.table(
            f"All texts together, prompts and all, in batches of {many['batch']}",
            ("", "Tokens/s"),
            [(name, f"{many[name]:.1f}") for name in ("alone", "together", "continuous")],
        )


def plot(figures: dict[str, Any], path: Path) -> None:
    """A picture of the decoding rates: bars with the quartiles, the naive loop's rate as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = figures["sides"]
    names = list(rows)[::-1]
    rates = [rows[name]["decode"] for name in names]
    low, high = zip(*(rows[name]["decode_quartiles"] for name in names), strict=True)
    colors = ["#1f6f8b" if "differ" in rows[name] else "#c8793d" if name == NAIVE else "#9aa5ab" for name in names]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(names) + 1.4), layout="constrained")
    spread = [np.subtract(rates, low).clip(0), np.subtract(high, rates).clip(0)]
    axes.barh(names, rates, color=colors, xerr=spread, error_kw={"ecolor": "#444", "lw": 1, "capsize": 2})
    axes.axvline(rows[NAIVE]["decode"], color="#c8793d", lw=1, ls="--")
    for name, rate, end in zip(names, rates, high, strict=True):
        axes.annotate(
            f" {rate:.0f}  ({rows[name]['times_naive']:.2f}x)",
            (max(rate, end), name),
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.set_xlabel("tokens/s, greedy, batch 1 (median, quartiles)")
    axes.set_title(f"{figures['bundle']}: {figures['members']} member(s), {figures['threads']} threads", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.18)
    figure.savefig(path, dpi=144)
