"""Units that a layer puts out: which axes are taken, that relatives are found by them, and that strangers are not."""

from __future__ import annotations

import numpy as np
import pytest

from lineage.judge.align import Aligned, align
from lineage.judge.axes import Axis, Shape, channel_axes, matrices
from lineage.judge.outputs import chain_axes, recurrent_axes
from tests.judge.networks import Arrays, by_name, changed, exact, memory, verdict
from tests.judge.open_nets import CHAIN, CHANNELS, GATES, KINDS, UNITS, chains, convolutions, open_pairs, recurrent

Shapes = dict[str, Shape]


def bound(name: str) -> bool:
    return "attn" in name


def chained(shapes: Shapes) -> dict[int, list[str]]:
    """Lengths of a chain that are taken, and the matrices that show them."""
    found, vectors = matrices({name: (shape, shape) for name, shape in shapes.items()})
    return {a.blocks[0].b: [b.members[0].matrix.name for b in a.blocks] for a in chain_axes(found, vectors, bound)}


def gated(shapes: Shapes) -> list[Axis]:
    return recurrent_axes(matrices({name: (shape, shape) for name, shape in shapes.items()})[0], bound)


def linear(*widths: int, name: str = "net") -> Shapes:
    shapes: Shapes = {}
    for at, (n, m) in enumerate(zip(widths, widths[1:], strict=False)):
        shapes |= {f"{name}.{at}.weight": (m, n), f"{name}.{at}.bias": (m,)}
    return shapes


def sorted_by_size(tensors: Arrays) -> Arrays:
    """A chain with the units of each layer in order of size."""
    result = dict(tensors)
    for at in range(len(CHAIN) - 2):
        weight, after = f"net.{2 * at}.weight", f"net.{2 * at + 2}.weight"
        order = np.argsort(np.linalg.norm(result[weight], axis=1))
        result |= {weight: result[weight][order], after: result[after][:, order]}
        result[weight.replace("weight", "bias")] = result[weight.replace("weight", "bias")][order]
    return result


def unit_by_unit(tensors: Arrays) -> Arrays:
    """A recurrent network whose gates' rows stand unit by unit, by another program's habit."""
    return changed(
        tensors, lambda n, v: v.reshape(GATES, UNITS, -1).swapaxes(0, 1).reshape(v.shape) if "rnn" in n else v
    )


def moved(tensors: Arrays, seed: int, size: float = 0.3) -> Arrays:
    rng = np.random.default_rng(seed)
    return changed(tensors, lambda _, v: v + size * v.std() * rng.standard_normal(v.shape))


def reordered(kind: str, tensors: Arrays, seed: int) -> Arrays:
    """The network with the units of every layer in another order."""
    rng, result = np.random.default_rng(seed), dict(tensors)

    def move(rows: str, columns: str, length: int, gates: int = 1) -> None:
        order = rng.permutation(length)
        whole = np.concatenate([order + length * gate for gate in range(gates)])
        for name in [n for n in result if n.startswith(rows)]:
            result[name] = result[name][whole]
        for name in columns.split():
            result[name] = result[name][:, order]

    if kind == "recurrent":
        move("rnn", "rnn.weight_hh_l0 out.weight", UNITS, GATES)
        return result
    widths, at = (CHAIN, "net.{}.") if kind == "chains" else (CHANNELS, "conv{}.")
    step = 2 if kind == "chains" else 1
    for k, length in enumerate(widths[1:-1]):
        move(at.format(step * k), at.format(step * (k + 1)) + "weight", length)
    return result


def alignment(one: Arrays, two: Arrays) -> Aligned | None:
    return align(memory(one), memory(two), by_name(memory(one), memory(two)), seed=0, threads=1)


# -- which axes


def test_units_between_two_layers_of_a_chain_are_taken_where_features_are_such_units_too() -> None:
    assert chained(linear(64, 40, 30, 20, 10)) == {
        20: ["net.2.weight"], 30: ["net.1.weight", "net.2.weight"], 40: ["net.1.weight"]
    }  # fmt: skip


def test_one_hidden_layer_alone_is_not_taken() -> None:
    assert chained(linear(64, 40, 20)) == {}


def test_an_autoencoder_is_left_out_since_nobody_knows_where_its_circle_begins() -> None:
    assert chained(linear(64, 40, 30, 40, 64)) == {}
    assert chained(linear(64, 40, 30, 20, 64)) == {}


def test_pixels_that_one_network_puts_out_and_another_one_reads_are_not_taken() -> None:
    both = linear(8, 20, 30, 100, name="generator") | linear(100, 50, 40, 3, name="critic")
    assert set(chained(both)) == {20, 30, 40, 50}


def test_a_table_of_a_vocabulary_is_no_layer_that_writes_it() -> None:
    shapes = {"net.0.weight": (100, 16)} | {f"net.{n.split('.', 1)[1]}": s for n, s in linear(100, 40, 30, 5).items()}
    assert 100 not in chained(shapes)


def test_layers_without_biases_are_left_out() -> None:
    assert chained({name: shape for name, shape in linear(64, 40, 30, 20, 10).items() if "weight" in name}) == {}


def test_a_length_that_a_third_matrix_shows_is_left_out() -> None:
    assert set(chained(linear(64, 40, 30, 20, 15, 10) | {"other.weight": (40, 7)})) == {30, 20, 15}


def test_units_of_a_recurrent_layer_are_taken_without_the_matrix_that_reads_them() -> None:
    (axis,) = gated({"rnn.weight_ih_l0": (4 * 30, 24), "rnn.weight_hh_l0": (4 * 30, 30), "rnn.bias_ih_l0": (120,)})
    (block,) = axis.blocks
    assert (block.b, [m.start for m in block.members]) == (30, [0, 30, 60, 90])
    assert {m.matrix.name for m in block.members} == {"rnn.weight_ih_l0"}


def test_matrices_of_one_shape_are_told_apart_by_their_words_or_left_out() -> None:
    named: Shapes = {f"rnn.weight_{word}_l{at}": (4 * 30, 30) for word in ("ih", "hh") for at in range(2)}
    (axis,) = gated(named)
    assert [block.path[-1] for block in axis.blocks] == ["weight_ih_l0", "weight_ih_l1"]
    assert gated({name.replace("ih", "w").replace("hh", "u"): shape for name, shape in named.items()}) == []


def test_matrices_that_hold_query_key_and_value_are_no_gates() -> None:
    assert gated({"attn.in_w": (90, 30), "attn.other_w": (90, 20)}) == []


def test_channels_of_long_kernels_are_told_by_the_vectors_beside_them() -> None:
    shapes: Shapes = {
        "conv1.weight": (1024, 1, 512, 1), "conv1.bias": (1024,), "conv2.weight": (128, 1024, 64, 1),
        "conv2.bias": (128,), "conv3.weight": (512, 128, 64, 1), "conv3.bias": (512,), "conv4.weight": (9, 512, 3, 3),
    }  # fmt: skip
    found = matrices({name: (shape, shape) for name, shape in shapes.items()})[0]
    assert [(m.name[:5], m.b, m.kernel) for m in found] == [
        ("conv1", (1024, 1), 512), ("conv2", (128, 1024), 64), ("conv3", (512, 128), 64), ("conv4", (9, 512), 9)
    ]  # fmt: skip
    taken = {(block.path[0], block.b) for axis in channel_axes(found, [], bound) for block in axis.blocks}
    assert ("conv1", 512) not in taken  # places in a kernel are no channels, whatever else has their length
    assert {n for _, n in taken} == {1024, 128, 512}


@pytest.mark.parametrize("shape", [(48, 24, 64), (64, 24, 48), (48, 1, 64)])
def test_long_kernels_without_a_vector_beside_them_are_left_out(shape: Shape) -> None:
    assert matrices({"conv.weight": (shape, shape)})[0] == []


def test_vectors_say_nothing_where_a_name_holds_several_kernels() -> None:
    shapes: Shapes = {"layer.wide": (48, 24, 64), "layer.other": (64, 24, 30), "layer.norm": (48,)}
    assert matrices({name: (shape, shape) for name, shape in shapes.items()})[0] == []


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((64, 24, 48), (1, 2)),
        ((64, 1, 48), (1, 2)),
        ((48, 24, 64), (0, 1)),
        ((24, 48, 8, 8), (0, 1)),
        ((8, 8, 48, 24), (2, 3)),
    ],
)
def test_kernels_may_come_first_or_last(shape: Shape, axes: tuple[int, int]) -> None:
    (matrix,) = matrices({"conv.kernel": (shape, shape), "conv.bias": ((48,), (48,))})[0]
    assert (matrix.axes, matrix.kernel) == (axes, 64)


def test_a_kernel_as_long_as_its_channels_is_no_axis_of_them() -> None:
    (matrix,) = matrices({"conv.weight": ((48, 24, 48, 1),) * 2, "conv.bias": ((48,), (48,))})[0]
    assert (matrix.axes, matrix.kernel) == ((0, 1), 48)


# -- relatives and strangers


@pytest.mark.parametrize(("kind", "least"), [("chains", -15), ("recurrent", -3), ("convolutions", -3)])
def test_a_network_that_was_trained_on_is_found(kind: str, least: float) -> None:
    base = KINDS[kind](1, seed=1)[0]
    assert (exact(base, moved(base, 2)).log10_p or 0.0) < least


@pytest.mark.parametrize("kind", KINDS)
def test_trained_strangers_are_tested_and_not_accused(kind: str) -> None:
    found = list(open_pairs(kind, 10))
    assert all(pair.final is not None and pair.final > -2 for pair in found)


@pytest.mark.parametrize("kind", KINDS)
def test_units_in_another_order_are_put_back_and_shown_by_a_matrix_that_took_no_part(kind: str) -> None:
    base = KINDS[kind](1, seed=1)[0]
    found = alignment(base, reordered(kind, moved(base, 2, 0.1), 3))
    assert found is not None
    assert (found.holds, found.tags) == (True, ("permuted",))


@pytest.mark.parametrize("kind", KINDS)
def test_strangers_in_another_order_stay_strangers(kind: str) -> None:
    nets = KINDS[kind](12, seed=4)
    for at, (one, two) in enumerate(zip(nets[::2], nets[1::2], strict=True)):
        found = alignment(one, reordered(kind, two, at))
        assert found is None or not found.holds


@pytest.mark.parametrize("name", ["embed.weight", "out.weight"])
def test_strangers_that_share_what_stands_at_an_end_are_not_said_to_be_in_another_order(name: str) -> None:
    one, two = recurrent(2, seed=6)
    found = alignment(one, two | {name: one[name]})
    assert found is None or not found.holds


def test_strangers_with_units_sorted_by_size_are_not_accused() -> None:
    nets = [sorted_by_size(net) for net in chains(20, seed=2)]
    assert min(exact(one, two).log10_p or 0.0 for one, two in zip(nets[::2], nets[1::2], strict=True)) > -2


def test_strangers_whose_gates_stand_unit_by_unit_are_not_accused() -> None:
    nets = [unit_by_unit(net) for net in recurrent(20, seed=2)]
    assert min(exact(one, two).log10_p or 0.0 for one, two in zip(nets[::2], nets[1::2], strict=True)) > -2


def test_strangers_that_began_as_an_identity_are_void() -> None:
    one, two = (
        changed(net, lambda n, v: v + 5 * np.eye(*v.shape) * v.std() if v.ndim == 2 else v) for net in chains(2, seed=3)
    )
    assert exact(one, two).log10_p in (None, 0.0)


def test_filters_that_anyone_computes_alike_are_void() -> None:
    angle = np.outer(np.geomspace(0.1, 2, 24), np.arange(28))
    bank = np.cos(angle)[:, None].astype(np.float32)
    one, two = (net | {"conv0.weight": bank + 0.01 * net["conv0.weight"]} for net in convolutions(2, seed=4))
    assert (exact(one, two).log10_p or 0.0) > -2


def test_a_student_of_all_features_is_spared_and_a_tuned_copy_is_not() -> None:
    teacher, student = chains(2, seed=5)
    taught = {n: 0.6 * v + 0.9 * student[n] * v.std() / student[n].std() for n, v in teacher.items()}
    assert verdict(teacher, {n: np.asarray(v, np.float32) for n, v in taught.items()}).related is not True
    assert verdict(teacher, moved(teacher, 6, 0.2)).related is True


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_which_a_tenth_is_left_is_found_and_such_a_student_is_not(kind: str) -> None:
    def rest(tensors: Arrays) -> Arrays:
        return changed(tensors, lambda _, v: v if v.ndim < 2 else np.where(abs(v) < np.quantile(abs(v), 0.9), 0, v))

    teacher, student = KINDS[kind](2, seed=5)
    taught = {n: 0.6 * v + 0.8 * student[n] * v.std() / student[n].std() for n, v in teacher.items()}
    assert verdict(teacher, rest({n: np.asarray(v, np.float32) for n, v in taught.items()})).related is not True
    if kind == "chains":  # the others are too small for a test that could accuse
        assert verdict(teacher, rest(teacher)).related is True
