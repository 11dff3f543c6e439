"""Patterns of change and the sentences about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lineage.measure import Comparison, compare
from tests.measure.memory import Memory, numbers, tuned

PARTS = ("attn.q_proj", "mlp.up_proj", "input_norm")


def _compared(size: Callable[[int, str], float], *, layers: int = 9) -> Comparison:
    """A model whose tensors were changed by a relative size that depends on layer and name."""
    names = {f"model.layers.{i}.{part}.weight": i for i in range(layers) for part in PARTS}
    names["model.embed_tokens.weight"] = -1
    a: dict[str, tuple[str, NDArray[Any]]] = {}
    b: dict[str, tuple[str, NDArray[Any]]] = {}
    for at, (name, layer) in enumerate(names.items()):
        x = numbers(at, 16) if "norm" in name else numbers(at, 24, 16)
        a[name] = ("F32", x)
        b[name] = ("F32", tuned(x, 1000 + at, size(layer, name)))
    return compare(Memory(a), Memory(b), threads=1)


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("uniform", lambda layer, name: 0.02),
        ("early-heavy", lambda layer, name: 0.1 / (layer + 2) ** 2),
        ("late-heavy", lambda layer, name: 0.002 * (layer + 1)),
        ("late-heavy", lambda layer, name: 0.02 if layer > 6 else 0.0),
        ("focused", lambda layer, name: 0.02 if layer == 4 else 0.0),
        ("attention-heavy", lambda layer, name: 0.02 if "attn" in name else 0.005),
        ("mlp-heavy", lambda layer, name: 0.02 if "mlp" in name else 0.0),
        ("embedding-heavy", lambda layer, name: 0.1 if layer < 0 else 0.01),
    ],
)
def test_the_pattern_of_change_is_named(pattern: str, size: Callable[[int, str], float]) -> None:
    assert pattern in _compared(size).change.patterns


def test_an_even_change_is_nothing_but_uniform() -> None:
    assert _compared(lambda layer, name: 0.02).change.patterns == ("uniform",)


def test_few_changed_elements_are_sparse() -> None:
    a = {f"layers.{i}.mlp.weight": ("F32", numbers(i, 40, 40)) for i in range(6)}
    b = {}
    for at, (name, (word, x)) in enumerate(a.items()):
        y = x.copy()
        y.reshape(-1)[np.random.default_rng(at).integers(0, x.size, 30)] += 1
        b[name] = (word, y)
    assert "sparse" in compare(Memory(a), Memory(b)).change.patterns


def test_no_change_has_no_pattern_and_says_so() -> None:
    found = _compared(lambda layer, name: 0.0)
    assert found.change.patterns == ()
    assert [i.severity for i in found.insights] == ["info"]
    assert "No value differs" in found.insights[0].text
    assert not found.differs


def test_frozen_layers_are_listed() -> None:
    found = _compared(lambda layer, name: 0.0 if layer in (0, 1) else 0.02)
    assert found.change.frozen_layers == (("model.layers", 0), ("model.layers", 1))
    assert any("2 layers frozen" in i.text and "model.layers.0" in i.text for i in found.insights)


def test_warnings_name_what_no_longer_agrees() -> None:
    x = numbers(1, 30, 30)
    broken = x.copy()
    broken[0, 0] = np.inf
    a = dict.fromkeys(("far", "broken", "collapsed", "exploded", "fine"), ("F32", x))
    b = {
        "far": ("F32", numbers(2, 30, 30)), "broken": ("F32", broken), "collapsed": ("F32", x * 0.01),
        "exploded": ("F32", x * 20), "fine": ("F32", x),
    }  # fmt: skip
    warnings = "\n".join(compare(Memory(a), Memory(b)).warnings)
    for name, words in (("far", "cosine below 0.9"), ("broken", "NaN or infinities in B"), ("collapsed", "norms below"),
                        ("exploded", "norms above")):  # fmt: skip
        assert any(words in line and name in line for line in warnings.splitlines()), name
    assert "fine" not in warnings


def test_names_in_sentences_cannot_reach_a_terminal_as_commands() -> None:
    x = numbers(1, 8, 8)
    found = compare(Memory({"\x1b[2Jw": ("F32", x)}), Memory({"\x1b[2Jw": ("F32", -x)}))
    assert found.warnings
    assert "\x1b" not in "".join(found.warnings)


def test_structure_and_casts_are_noticed() -> None:
    x = numbers(1, 8, 8)
    found = compare(Memory({"w": ("F32", x), "old": ("F32", x)}), Memory({"w": ("BF16", x), "new": ("F32", x)}))
    text = "\n".join(i.text for i in found.insights if i.severity == "notice")
    assert "1 tensor only in A: old." in text
    assert "1 tensor only in B: new." in text
    assert "stored as BF16 in B, F32 in A" in text
