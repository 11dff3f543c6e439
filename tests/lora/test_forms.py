"""Forms that files hold: ranks that stay, shared factors, exactness of every fall-back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.layout.operations import Concat, Rearrange, Split, Stack, Take
from lineage.lora.delta import Delta
from lineage.lora.forms import loha, lokr, low_rank, slices
from lineage.lora.network import Term
from lineage.lora.transport import transported
from tests.lora.builders import delta_of, whole_numbers

_GENERATOR = np.random.default_rng(3)


def _pair(rows: int, down: NDArray[Any], scale: float = 1.0) -> Delta:
    up = whole_numbers(_GENERATOR, rows, len(down))
    term = Term.of([(up, "ok"), (down, "ki")], ["o", "i"], scale=scale)
    return Delta(shape=(rows, down.shape[1]), terms=(term,))


def test_a_pair_stays_the_pair_it_was() -> None:
    delta = delta_of("lora", (6, 4), rank=3)
    up, down = (p.array for p in delta.terms[0].parts)
    pair = low_rank(delta)
    assert np.array_equal(pair.up, up)
    assert np.array_equal(pair.down, down)
    assert pair.up.dtype == np.float32


def test_fusing_adds_ranks_and_keeps_unequal_scales() -> None:
    (fused,) = transported([Concat(0)], [delta_of("lora", (4, 6), 0, 2, 0.5), delta_of("lora", (4, 6), 1, 3, 2.0)])
    pair = low_rank(fused)
    assert pair.rank == 5
    assert np.array_equal(pair.scale * pair.up @ pair.down, fused.dense())


def test_a_shared_down_factor_does_not_grow() -> None:
    down = whole_numbers(_GENERATOR, 3, 6)
    (fused,) = transported([Concat(0)], [_pair(4, down), _pair(8, down)])
    assert low_rank(fused).rank == 3


def test_a_shared_up_factor_does_not_grow_when_columns_are_fused() -> None:
    down = whole_numbers(_GENERATOR, 3, 6)
    (turned,) = transported([Concat(1)], transported([Rearrange("a b -> b a")], [_pair(4, down), _pair(4, down)]))
    assert low_rank(turned).rank == 3


def test_splitting_what_was_fused_gives_the_ranks_back() -> None:
    parts = [delta_of("lora", (4, 6), 0, 2), delta_of("lora", (4, 6), 1, 3)]
    found = transported([Concat(0), Split(0, 2)], parts)
    assert [low_rank(d).rank for d in found] == [2, 3]


def test_block_diagonal_factors_lose_their_dead_ranks_when_they_are_split() -> None:
    up = np.zeros((6, 4), np.float32)
    up[:3, :2], up[3:, 2:] = 1, 2
    delta = Delta(shape=(6, 5), terms=(Term.of([(up, "ok"), (whole_numbers(_GENERATOR, 4, 5), "ki")], ["o", "i"]),))
    assert [low_rank(d).rank for d in transported([Split(0, 2)], [delta])] == [2, 2]


def test_missing_members_are_zero_rows_without_ranks() -> None:
    (fused,) = transported([Concat(0)], [delta_of("lora", (4, 6)), Delta(shape=(4, 6))])
    pair = low_rank(fused)
    assert pair.rank == 2
    assert not pair.up[4:].any()


def test_a_tucker_core_stays_apart_where_it_may() -> None:
    up, mid, down = (whole_numbers(_GENERATOR, *s) for s in ((6, 2), (2, 3, 3, 3), (3, 5)))
    term = Term.of([(up, "ok"), (mid, "klhw"), (down, "li")], ["o", "i", "h", "w"])
    delta = Delta(shape=(6, 5, 3, 3), terms=(term,))
    kept, folded = low_rank(delta, keep_mid=True), low_rank(delta)
    assert kept.mid is not None
    assert np.array_equal(kept.mid, mid)
    assert folded.mid is None
    assert folded.rank == 2


def test_loha_of_parts_of_the_rows_stays_loha() -> None:
    parts = [delta_of("loha", (4, 6), 0), delta_of("lora", (4, 6), 1), Delta(shape=(4, 6))]
    (fused,) = transported([Concat(0)], parts)
    product = loha(fused)
    assert product is not None
    both = (product.w1_a @ product.w1_b) * (product.w2_a @ product.w2_b)
    assert np.array_equal(product.scale * both, fused.dense())


def test_lokr_survives_where_its_first_factor_moves_and_becomes_a_pair_where_not() -> None:
    delta = delta_of("lokr", (8, 6))
    (outer,) = transported([Take(0, [(4, 8, 1), (0, 4, 1)])], [delta])
    (inner,) = transported([Take(0, [1, 0, 2, 3, 4, 5, 7, 6])], [delta])
    assert lokr(outer) is not None
    assert lokr(inner) is None
    assert np.array_equal(low_rank(inner).up @ low_rank(inner).down * 0.5, inner.dense())


def test_a_full_rank_difference_becomes_a_pair_of_its_smaller_side() -> None:
    dense = whole_numbers(_GENERATOR, 6, 4)
    pair = low_rank(Delta(shape=(6, 4), terms=(Term.of([(dense, "oi")], ["o", "i"]),)))
    assert pair.rank == 4
    assert np.array_equal(pair.up @ pair.down, dense)


def test_slices_of_a_stack_are_what_was_stacked() -> None:
    parts = [delta_of("lora", (4, 6), seed, seed + 1) for seed in range(3)]
    (stack,) = transported([Stack(0)], parts)
    assert [low_rank(d).rank for d in slices(stack, 1)] == [1, 2, 3]
