"""Writes reports/calibration.md and calibration.svg: how p-values fall on pairs that are not related.

    python reports/calibration.py [--pairs 1000]

The pairs come from tests/judge/nulls.py and open_nets.py; the slow tests hold the same figures to their binomial error.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.judge.nulls import (  # noqa: E402
    ADVERSARIES,
    Kinds,
    Null,
    adversarial_pairs,
    mixture_pairs,
    resampled_pairs,
    trained_pairs,
)
from tests.judge.open_nets import KINDS, open_pairs  # noqa: E402

ALPHAS = (0.05, 0.01, 0.001)


def tail(values: Sequence[float], alpha: float) -> int:
    return sum(value <= math.log10(alpha) for value in values)


def row(name: str, values: Sequence[float]) -> str:
    cells = [f"{tail(values, alpha)} ({alpha * len(values):g})" for alpha in ALPHAS]
    return f"| {name} | {len(values)} | {' | '.join(cells)} | {min(values):.2f} |"


def plot(lines: dict[str, Sequence[float]]) -> str:
    """Nominal against observed tail on logarithmic axes; a calibrated law stays on or below the diagonal."""
    size, margin, low = 360, 48, -3.5
    colours = ("#3366aa", "#cc6633", "#448844", "#884488", "#aa8800", "#008888", "#aa3355")

    def place(x: float, y: float) -> str:
        scale = (size - 2 * margin) / -low
        return f"{margin + (x - low) * scale:.1f},{size - margin - (y - low) * scale:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" font-family="sans-serif" font-size="11">',
        f'<rect width="{size}" height="{size}" fill="white"/>',
        f'<polyline points="{place(low, low)} {place(0, 0)}" stroke="#999" stroke-dasharray="4 3" fill="none"/>',
    ]
    for power in range(0, -4, -1):
        x, y = place(power, low).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 16}" text-anchor="middle">1e{power}</text>')
        x, y = place(low, power).split(",")
        parts.append(f'<text x="{float(x) - 6}" y="{float(y) + 4}" text-anchor="end">1e{power}</text>')
    for (name, values), colour, at in zip(lines.items(), colours, range(9), strict=False):
        grid = [low * k / 60 for k in range(61)]
        shares = [(x, sum(v <= x for v in values) / len(values)) for x in grid]
        points = " ".join(place(x, max(low, math.log10(share))) for x, share in shares if share > 0)
        parts.append(f'<polyline points="{points}" stroke="{colour}" fill="none" stroke-width="1.5"/>')
        parts.append(f'<text x="{margin + 8}" y="{margin + 14 * at}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{size / 2}" y="{size - 8}" text-anchor="middle">nominal</text>')
    parts.append(f'<text x="12" y="{size / 2}" transform="rotate(-90 12 {size / 2})" text-anchor="middle">observed</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=1000)
    pairs = options.parse_args().pairs
    trained: list[Null] = list(trained_pairs(pairs))
    resampled: list[Null] = list(resampled_pairs(pairs, seed=10_000))
    mixed: list[Kinds] = list(mixture_pairs(pairs))
    shown = {kind: list(open_pairs(kind, pairs)) for kind in KINDS}
    lines = {
        "trained: fixed points": [n.fixed for n in trained],
        "trained: order": [n.order for n in trained],
        "trained: reported p": [n.final or 0.0 for n in trained],
        "unlike statistics: fixed points": [n.fixed for n in resampled],
        "trained, heads: fixed points": [n.heads for n in mixed],
        "trained, experts: bound": [n.experts for n in mixed],
        "trained, heads and experts: reported p": [n.final or 0.0 for n in mixed],
    }
    text = [
        "# Calibration of the exact test",
        "",
        f"Made by `python reports/calibration.py --pairs {pairs}`. Every pair is unrelated; a calibrated p-value falls",
        "to alpha or below in at most alpha of them (expected count in brackets). The trained pairs saw the same data in",
        "the same order from the same teacher; only their initialisation differs. Laws are discrete and corrected",
        "upwards, so counts below the expected ones are right. First fixed points of convolutions are the best of one to",
        "three kernels, before the correction for that.",
        "",
        "| p-value | pairs | <= 0.05 | <= 0.01 | <= 0.001 | smallest log10 p |",
        "|---|---|---|---|---|---|",
        *[row(name, values) for name, values in lines.items()],
        row("unlike statistics: order", [n.order for n in resampled]),
        row("unlike statistics: reported p", [n.final or 0.0 for n in resampled]),
        *[row(f"trained, {kind}: first fixed points", [n.raw for n in found]) for kind, found in shown.items()],
        *[row(f"trained, {kind}: reported p", [n.final or 0.0 for n in found]) for kind, found in shown.items()],
        "",
        "![observed against nominal tail](calibration.svg)",
        "",
        "## What might make strangers look related",
        "",
        "Both networks of a pair went through the same change. `void` counts the pairs in which no axis was left.",
        "",
        "| both have | pairs | void | smallest log10 p reported |",
        "|---|---|---|---|",
    ]
    for name, change in ADVERSARIES.items():
        found = list(adversarial_pairs(change, max(10, pairs // 20)))
        void = sum(n.final is None for n in found)
        text.append(f"| {name} | {len(found)} | {void} | {min(n.final or 0.0 for n in found):.2f} |")
    (HERE / "calibration.md").write_text("\n".join([*text, ""]), encoding="utf-8")
    (HERE / "calibration.svg").write_text(plot(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
