"""Emitted conversions in Transformers itself: a model loads the other layout to the bits that `lineage apply` gives.

Runs where Transformers 5 is installed (version of this writing: 5.24.0).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lineage.emit import EMITTERS
from lineage.filling import Filled
from lineage.layout.axes import Shape
from lineage.layout.mapping import Mapping, Rule
from lineage.layout.operations import Concat, Each, Operation, Rearrange, Split, Stack
from tests.emit.running import Bits, loaded, of_checkpoint, of_tensors
from tests.layout.memory import Memory

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

ROPE = Rearrange("(h d two) k -> (h two d) k", {"h": 2, "two": 2})


def rule(to: str | tuple[str, ...], source: str | tuple[str, ...], *ops: Operation, **more: Any) -> Rule:
    sides = [(s,) if isinstance(s, str) else s for s in (to, source)]
    return Rule(to=sides[0], source=sides[1], ops=ops, **more)


def layers(*names: str, shape: Shape = (8, 4), count: int = 3) -> dict[str, Shape]:
    """Shapes of tensors in a few layers."""
    return {f"layers.{i}.{name}.weight": shape for i in range(count) for name in names}


#: rules, and the shapes of the source's tensors
CASES: dict[str, tuple[list[Rule], dict[str, Shape]]] = {
    "renamed": (
        [rule("model.embed.weight", "tok.weight"), rule("model.blocks.{i}.norm.weight", "layers.{i}.n.weight")],
        {"tok.weight": (6, 4), **layers("n", shape=(4,), count=12)},
    ),
    "two norms that swap names": (
        [rule("layers.{i}.a.weight", "layers.{i}.b.weight"), rule("layers.{i}.b.weight", "layers.{i}.a.weight")],
        layers("a", "b", shape=(4,)),
    ),
    "names that begin alike": (
        [rule("b.weight", "a.weight"), rule("c.x", "a.weight_scale"), rule("d.a.weight", "d.x.weight")],
        {"a.weight": (2,), "a.weight_scale": (3,), "d.x.weight": (4,)},
    ),
    "some layers elsewhere": (
        [rule("twin.{i}.w.weight", "layers.{i}.w.weight", where={"i": "0:2"}),
         rule("single.{i}.w.weight", "layers.{i}.w.weight", where={"i": "2:4"})],
        layers("w", count=4),
    ),
    "layers from a table": (
        [rule("b.{j}.w.weight", "layers.{i}.w.weight", table={"i": (0, 1, 2), "j": (4, 3, 1)})], layers("w"),
    ),
    "two numbers": (
        [rule("b.{i}.y.{e}.up.weight", "layers.{i}.x.{e}.w3.weight"),
         rule("b.{i}.y.{e}.g.weight", "layers.{i}.x.{e}.w1.weight")],
        {f"layers.{i}.x.{e}.{w}.weight": (3, 2) for i in range(2) for e in range(11) for w in ("w1", "w3")},
    ),
    "fused": (
        [rule("model.layers.{i}.attn.qkv.weight", tuple(f"layers.{{i}}.{n}.weight" for n in "qkv"), Concat(0))],
        layers("q", "k", "v"),
    ),
    "split": (
        [rule(("m.{i}.g_proj.weight", "m.{i}.u_proj.weight"), "layers.{i}.gu.weight", Split(0, parts=2))],
        layers("gu"),
    ),
    "split into unequal parts": (
        [rule(tuple(f"m.{{i}}.{n}.weight" for n in "qkv"), "layers.{i}.qkv.weight", Split(0, sizes=(4, 2, 2)))],
        layers("qkv"),
    ),
    "split on the other axis": (
        [rule(("m.{i}.q.weight", "m.{i}.k.weight"), "layers.{i}.qk.weight",
              Rearrange("a b -> b a"), Split(0, parts=2))],
        layers("qk"),
    ),
    "transposed": (
        [rule("m.{i}.w.weight", "layers.{i}.w.weight", Rearrange("a b -> b a"))], layers("w", shape=(4, 4)),
    ),
    "experts": (
        [rule("m.{i}.experts.gate_up", ("layers.{i}.e.{e}.w1.weight", "layers.{i}.e.{e}.w3.weight"),
              Concat(0), Stack(0, over="e")),
         rule("m.{i}.experts.down", "layers.{i}.e.{e}.w2.weight", Stack(0, over="e"), Rearrange("e o i -> e i o"))],
        {f"layers.{i}.e.{e}.{w}.weight": (4, 3) for i in range(2) for e in range(11) for w in ("w1", "w2", "w3")},
    ),
    "rotary": (
        [rule("m.{i}.q.weight", "layers.{i}.q.weight", ROPE), rule("m.{i}.k.weight", "layers.{i}.k.weight")],
        layers("q", "k"),
    ),
    "rotary and fused": (
        [rule("m.{i}.qkv.weight", tuple(f"layers.{{i}}.{n}.weight" for n in "qkv"),
              Each({0: ROPE, 1: ROPE}), Concat(0))],
        layers("q", "k", "v"),
    ),
    "rotary, taken back and split": (
        [rule(("m.{i}.q.weight", "m.{i}.v.weight"), "layers.{i}.qv.weight",
              Split(0, parts=2), Each({0: ROPE.inverse(1, {})}))],
        layers("qv", shape=(16, 4)),
    ),
    "pairs": (
        [rule("m.{i}.w.weight", "layers.{i}.w.weight", Rearrange("(d two) k -> (two d) k", {"two": 2})),
         rule("m.{i}.v.weight", "layers.{i}.v.weight", Rearrange("(two d) k -> (d two) k", {"two": 2}))],
        layers("w", "v"),
    ),
}  # fmt: skip


@pytest.fixture
def transformers() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers", minversion="5.20")
        yield found


def _model(transformers: Any, shapes: dict[str, Shape]) -> Any:
    """A class of model whose parameters have these names and shapes."""
    import torch

    class Config(transformers.PretrainedConfig):  # type: ignore[misc]
        model_type = "emitted"

        def __init__(self, **more: Any) -> None:
            super().__init__(**more)
            self.num_attention_heads = 2

    class Emitted(transformers.PreTrainedModel):  # type: ignore[misc]
        config_class = Config
        base_model_prefix = ""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for name, shape in shapes.items():
                place, *path = self, *name.split(".")
                for part in path[:-1]:
                    if not hasattr(place, part):
                        place.add_module(part, torch.nn.Module())
                    place = getattr(place, part)
                place.register_parameter(path[-1], torch.nn.Parameter(torch.zeros(shape)))
            self.post_init()

        def _init_weights(self, module: Any) -> None:
            pass

    return Emitted


def _loaded(
    transformers: Any, text: str, held: dict[str, NDArray[Any]], shapes: dict[str, Shape], folder: Path
) -> tuple[Any, Bits]:
    """A model of the target's layout, loaded from the source's tensors, and what it holds."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping

    kind = _model(transformers, shapes)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    kind.config_class().save_pretrained(folder)
    register_checkpoint_conversion_mapping("Emitted", loaded(text)["CONVERSIONS"], overwrite=True)
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model, of_tensors({name: x.detach() for name, x in model.state_dict().items()})


@pytest.mark.parametrize("kind", CASES)
def test_loading_gives_what_apply_gives(kind: str, transformers: Any, tmp_path: Path) -> None:
    rules, shapes = CASES[kind]
    mapping = Mapping(rules=tuple(rules))
    rng = np.random.default_rng(0)
    held = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    wanted = of_checkpoint(Filled(mapping, Memory(held, "F32")))
    found = EMITTERS["transformers"](mapping, name="m", beside="")
    assert found.unsaid == ()
    _, bits = _loaded(transformers, found.text, held, {n: s for n, (_, s, _) in wanted.items()}, tmp_path)
    assert bits == wanted


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "two numbers"])
def test_saving_gives_the_checkpoint_back(kind: str, transformers: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    rules, shapes = CASES[kind]
    mapping = Mapping(rules=tuple(rules))
    held = {name: np.random.default_rng(0).standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    wanted = {spec.name: spec.shape for spec in Filled(mapping, Memory(held, "F32"))}
    text = EMITTERS["transformers"](mapping, name="m", beside="").text
    model, _ = _loaded(transformers, text, held, wanted, tmp_path)
    model.save_pretrained(tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {n: x.tobytes() for n, x in back.items()} == {n: x.tobytes() for n, x in held.items()}
