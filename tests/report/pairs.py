"""Reports made by hand, so that each test says what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import lineage.api as api
from lineage.checkpoint.claims import Claim
from lineage.judge import Verdict
from lineage.measure.compare import compare, compare_mapped
from lineage.report.document import Part, Report, build

#: names that try to take over a terminal, a table, a page, a template
HOSTILE = (
    "\x1b[2Jcls",
    "right\u202eleft",
    "<script>alert(1)</script>",
    "a|b`c*_",
    "{i}{{j}}",
    "'\"&amp;",
    "多字节",
    "x\ny",
)


def verdict(class_: str = "transformed", **changes: object) -> Verdict:
    """A verdict of the class with plausible other fields."""
    related = {"copied": True, "transformed": True, "retrained": False, "unrelated": False}.get(class_)
    fields = {
        "class_": class_, "related": related, "log10_p": -300.5 if related else None, "coverage": 1.0,
        "relations": ("renamed", "fine-tuned") if related else (), "direction": None, "reasons": ("First.", "Second."),
    }  # fmt: skip
    return Verdict(**{**fields, **changes})


def network(
    folder: Path, names: Sequence[str], *, seed: int = 0, layers: int = 2, moved: float = 0.0, width: int = 16
) -> str:
    """A file with one square matrix for each layer and name."""
    draw, noise = np.random.default_rng(seed), np.random.default_rng(99)
    tensors = {}
    for i in range(layers):
        for name in names:
            x = draw.standard_normal((width, width)) + moved * noise.standard_normal((width, width))
            tensors[f"layers.{i}.{name}"] = x.astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def report(
    a: str, b: str, found: Verdict | None = None, *, claims: Sequence[Claim] = (), parts: Sequence[tuple[str, str]] = ()
) -> Report:
    """The report on two files under a given verdict; `parts` names components and the classes of their verdicts."""
    with api.open(a) as one, api.open(b) as two:
        mapping = api.map(one, two)
        made = []
        for name, class_ in parts or [("", "")]:
            x, y = (c.component(name) if name else c for c in (one, two))
            own = api.map(x, y)
            comparison = compare_mapped(own, x, y) if own.rules else compare(x, y, [])
            judged = (found or verdict()) if not class_ else verdict(class_)
            made.append(
                Part(a=name, b=name, parameters=y.parameters, mapping=own, comparison=comparison, verdict=judged)
            )
        return build(one, two, mapping, made, claims, [])
