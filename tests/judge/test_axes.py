from __future__ import annotations

import pytest

from lineage.judge.axes import Axis, Shape, channel_axes, hidden_axes, matrices

Shapes = dict[str, Shape]


def axes(shapes: Shapes, other: Shapes | None = None) -> tuple[list[Axis], list[Axis]]:
    found, vectors = matrices({name: (shape, (other or shapes)[name]) for name, shape in shapes.items()})

    def bound(name: str) -> bool:
        return "attn" in name

    hidden = hidden_axes(found, vectors, bound)
    return hidden, channel_axes(found, hidden, bound)


def hidden(shapes: Shapes) -> dict[str, int]:
    return {axis.title: len(axis.blocks) for axis in axes(shapes)[0]}


def layered(layer: Shapes, layers: int = 3, **outside: Shape) -> Shapes:
    inside = {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    return inside | {name.replace("__", "."): shape for name, shape in outside.items()}


GATED: Shapes = {
    "attn.q": (64, 64), "attn.k": (32, 64), "attn.v": (32, 64), "attn.o": (64, 64), "norm": (64,),
    "mlp.gate": (160, 64), "mlp.up": (160, 64), "mlp.down": (64, 160),
}  # fmt: skip


def test_neurons_of_a_gated_mlp_are_found_and_nothing_else() -> None:
    found = axes(layered(GATED, embed=(384, 64), head=(384, 64)))
    assert [(a.title, len(a.blocks), len(a.blocks[0].members)) for a in found[0]] == [
        ("layers.{}.mlp (160 units)", 3, 3)
    ]


def test_the_vocabulary_is_bound_to_its_index_even_where_matrices_are_transposed() -> None:
    found = axes(layered(GATED, embed=(384, 64), head=(64, 384)))
    assert {block.b for axis in (*found[0], *found[1]) for block in axis.blocks} == {160, 64}


def test_input_first_matrices_are_found_too() -> None:
    layer: Shapes = {"norm": (64,), "mlp.up": (64, 256), "mlp.up_bias": (256,), "mlp.down": (256, 64)}
    assert hidden(layered(layer, embed=(100, 64))) == {"layers.{}.mlp (256 units)": 3}


def test_an_mlp_without_a_folder_of_its_own_is_found() -> None:
    layer: Shapes = {"attn.q": (64, 64), "ln": (64,), "fc1.weight": (256, 64), "fc2.weight": (64, 256)}
    assert hidden(layered(layer, embed=(100, 64))) == {"layers.{} (256 units)": 3}


def test_gate_and_up_in_one_tensor_leave_the_reader_to_test() -> None:
    layer: Shapes = {"norm": (64,), "mlp.gate_up": (320, 64), "mlp.down": (64, 160)}
    found = axes(layered(layer, embed=(100, 64)))[0]
    assert [(a.title, len(a.blocks[0].members)) for a in found] == [("layers.{}.mlp (160 units)", 1)]


def test_experts_are_blocks_of_their_own() -> None:
    layer: Shapes = {"norm": (64,), "router": (4, 64)}
    for e in range(4):
        layer |= {f"experts.{e}.w1": (80, 64), f"experts.{e}.w2": (64, 80), f"experts.{e}.w3": (80, 64)}
    assert hidden(layered(layer, embed=(100, 64))) == {"layers.{}.experts.{} (80 units)": 12}


def test_layers_stacked_on_an_axis_are_taken_apart() -> None:
    stacked: Shapes = {
        "layers.norm": (4, 64), "layers.mlp.up": (4, 64, 160), "layers.mlp.down": (4, 160, 64), "embed": (100, 64)
    }  # fmt: skip
    assert hidden(stacked) == {"layers.{}.mlp (160 units)": 4}


def test_experts_stacked_inside_layers_are_taken_apart() -> None:
    layer: Shapes = {"norm": (64,), "mlp.experts.gate_up": (6, 160, 64), "mlp.experts.down": (6, 64, 80)}
    assert hidden(layered(layer, layers=2, embed=(100, 64))) == {"layers.{}.mlp.{}.experts (80 units)": 12}


def test_heads_of_attention_are_never_tested() -> None:
    layer: Shapes = {"norm": (64,), "attn.q": (96, 64), "attn.o": (64, 96)}
    assert axes(layered(layer, embed=(100, 64)))[0] == []


def test_a_width_that_is_known_in_the_layer_outside_the_mlp_is_not_hidden() -> None:
    layer: Shapes = {"norm": (64,), "other": (160,), "mlp.up": (160, 64), "mlp.down": (64, 160)}
    assert hidden(layered(layer, embed=(100, 64))) == {}


def test_layers_of_nothing_but_an_mlp_do_not_confuse_channels_with_neurons() -> None:
    layer: Shapes = {"up": (160, 64), "down": (64, 160)}
    assert hidden(layered(layer, embed=(100, 64))) == {"layers.{} (160 units)": 3}


def test_where_both_axes_look_alike_none_is_taken() -> None:
    assert hidden(layered({"up": (160, 64), "down": (64, 160)})) == {}


def test_channels_are_shown_by_what_stands_outside_the_layers() -> None:
    found = axes(layered(GATED, embed=(384, 64), head=(384, 64)))[1]
    assert [[block.path for block in axis.blocks] for axis in found] == [[("embed",), ("head",)]]


def test_square_matrices_show_no_channels() -> None:
    assert axes(layered(GATED, turn=(64, 64)))[1] == []


def test_kernels_show_channels_of_a_convolution_stack() -> None:
    stages: Shapes = {"stem": (24, 3, 7, 7), "norm": (24,), "fc": (10, 48)}
    stages |= {"stage.1.conv": (48, 24, 3, 3), "stage.1.conv2": (48, 48, 3, 3), "stage.0.conv": (24, 24, 3, 3)}
    stages |= {"stage.2.conv": (40, 48, 3, 3)}
    found = axes(stages)[1]
    assert sorted((axis.blocks[0].b, len(axis.blocks)) for axis in found) == [(24, 2), (48, 3)]


def test_widths_that_differ_between_the_sides_are_kept_apart() -> None:
    one = layered(GATED, embed=(100, 64))
    two = {n: tuple(120 if k == 160 else k for k in shape) for n, shape in one.items()}
    assert {(b.a, b.b) for axis in axes(one, two)[0] for b in axis.blocks} == {(160, 120)}


@pytest.mark.parametrize("layers", [5, 200])
def test_many_layers_cost_no_more_than_a_few(layers: int) -> None:
    found = axes(layered(GATED, layers=layers, embed=(384, 64)))[0]
    assert len(found[0].blocks) == min(layers, 32)


def test_counters_of_a_block_are_read_from_its_path() -> None:
    (axis,) = axes(layered(GATED, embed=(384, 64)))[0]
    assert [block.numbers for block in axis.blocks] == [(0,), (1,), (2,)]
