"""Factors of every kind against the plain formula of the library that defines them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lineage.checkpoint import open_checkpoint
from lineage.layout.axes import Shape
from lineage.layout.operations import Concat, Rearrange, Unstack
from lineage.lora.converting import convert
from lineage.lora.delta import Delta, Refused
from lineage.lora.extraction import extract
from lineage.lora.merging import merge
from lineage.lora.reading import read_adapter
from lineage.lora.source import Base, open_adapter
from tests.lora.builders import base, mapping, peft, random, read, renaming, save

Formula = NDArray[Any]


def _tucker(t: Formula, a: Formula, b: Formula) -> Formula:
    """LyCORIS `functional/general.py` rebuild_tucker."""
    result: Formula = np.einsum("ij...,ip,jr->pr...", t, a, b)
    return result


def _read(tmp_path: Path, arrays: dict[str, NDArray[Any]], shape: Shape) -> Delta:
    path = save(tmp_path / "l.safetensors", {f"lora_unet_q.{k}": v for k, v in arrays.items()})
    return read_adapter(open_adapter(path), Base({"q.weight": shape})).deltas["q.weight"]


def test_loha_with_tucker_cores(tmp_path: Path) -> None:
    t1, t2 = random(0, 2, 2, 3, 3), random(1, 2, 2, 3, 3)
    w = {"w1_a": random(2, 2, 6), "w1_b": random(3, 2, 4), "w2_a": random(4, 2, 6), "w2_b": random(5, 2, 4)}
    arrays = {f"hada_{k}": v for k, v in (w | {"t1": t1, "t2": t2}).items()} | {"alpha": np.array(1.0, np.float32)}
    wanted = 0.5 * _tucker(t1, w["w1_a"], w["w1_b"]) * _tucker(t2, w["w2_a"], w["w2_b"])
    np.testing.assert_allclose(_read(tmp_path, arrays, (6, 4, 3, 3)).dense(), wanted, rtol=1e-5, atol=1e-6)


def test_lokr_with_both_factors_decomposed_takes_the_rank_of_the_second(tmp_path: Path) -> None:
    w = {"w1_a": random(0, 2, 3), "w1_b": random(1, 3, 2), "w2_a": random(2, 3, 2), "w2_b": random(3, 2, 2)}
    arrays = {f"lokr_{k}": v for k, v in w.items()} | {"alpha": np.array(4.0, np.float32)}
    wanted = 4 / 2 * np.kron(w["w1_a"] @ w["w1_b"], w["w2_a"] @ w["w2_b"])
    np.testing.assert_allclose(_read(tmp_path, arrays, (6, 4)).dense(), wanted, rtol=1e-5, atol=1e-6)


def test_lokr_with_whole_factors_knows_no_alpha(tmp_path: Path) -> None:
    arrays = {"lokr_w1": random(0, 2, 2), "lokr_w2": random(1, 3, 2), "alpha": np.array(7.0, np.float32)}
    np.testing.assert_allclose(_read(tmp_path, arrays, (6, 4)).dense(), np.kron(arrays["lokr_w1"], arrays["lokr_w2"]))


def test_lokr_of_a_convolution_with_and_without_a_core(tmp_path: Path) -> None:
    w1, t2, a, b = random(0, 2, 2), random(1, 2, 2, 3, 3), random(2, 2, 3), random(3, 2, 2)
    found = _read(tmp_path, {"lokr_w1": w1, "lokr_t2": t2, "lokr_w2_a": a, "lokr_w2_b": b}, (6, 4, 3, 3)).dense()
    np.testing.assert_allclose(found, np.kron(w1[..., None, None], _tucker(t2, a, b)), rtol=1e-5, atol=1e-6)
    flat = {"lokr_w1": w1, "lokr_w2_a": random(4, 3, 2), "lokr_w2_b": random(5, 2, 2 * 9)}
    product = (flat["lokr_w2_a"] @ flat["lokr_w2_b"]).reshape(3, 2, 3, 3)
    found = _read(tmp_path, flat, (6, 4, 3, 3)).dense()
    np.testing.assert_allclose(found, np.kron(w1[..., None, None], product), rtol=1e-5, atol=1e-6)


def test_locon_with_a_core(tmp_path: Path) -> None:
    arrays = {"lora_down.weight": random(0, 2, 4, 1, 1), "lora_mid.weight": random(1, 3, 2, 3, 3)}
    arrays["lora_up.weight"] = random(2, 6, 3, 1, 1)
    wanted = np.einsum(
        "ok,klhw,li->oihw", *(arrays[k].squeeze() for k in ("lora_up.weight", "lora_mid.weight", "lora_down.weight"))
    )
    np.testing.assert_allclose(_read(tmp_path, arrays, (6, 4, 3, 3)).dense(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}, "different shapes"),
        ({"hada_w1_a": (6, 2), "hada_w1_b": (3, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4)}, "do not fit each other"),
        ({"hada_w1_a": (5, 2), "hada_w1_b": (2, 4), "hada_w2_a": (5, 2), "hada_w2_b": (2, 4)}, "do not fit a tensor"),
        ({"lokr_w1": (2, 2), "lokr_w2": (3, 3)}, "do not fit a tensor"),
        ({"dora_scale": (6, 1)}, "without factors"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (6, 2), "dora_scale": (5,)}, "5 magnitudes do not fit"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (6, 2), "alpha": (2,)}, "alpha is no single number"),
        ({"diff": (6, 5)}, "a difference of .* does not fit"),
    ],
)
def test_factors_that_fit_nothing_are_refused(tmp_path: Path, arrays: dict[str, Shape], message: str) -> None:
    with pytest.raises(Exception, match=message):
        _read(tmp_path, {k: random(0, *s) for k, s in arrays.items()}, (6, 4))


def test_a_table_of_tokens_is_adapted_by_rows(tmp_path: Path) -> None:
    a, b = random(0, 2, 10), random(1, 4, 2)
    adapter = peft(tmp_path / "l", {"wte.lora_embedding_A": a, "wte.lora_embedding_B": b})
    model = base(tmp_path, "a", {"wte.weight": (10, 4)})
    found = read_adapter(open_adapter(adapter), Base.of(model)).deltas["wte.weight"]
    np.testing.assert_allclose(found.dense(), (b @ a).T, rtol=1e-5, atol=1e-6)
    rules = renaming({"wte.weight": "embed.weight"})
    convert(adapter, rules, "peft", tmp_path / "o", base=model)
    assert np.array_equal(read(tmp_path / "o")["base_model.model.embed.lora_embedding_A"], a)
    convert(adapter, rules, "gguf", tmp_path / "o.gguf", base=model)
    again = read_adapter(open_adapter(tmp_path / "o.gguf"), Base({"embed.weight": (10, 4)}))
    np.testing.assert_allclose(again.deltas["embed.weight"].dense(), (b @ a).T, rtol=1e-5, atol=1e-6)


def test_stacks_of_mlx_number_their_matrices_first(tmp_path: Path) -> None:
    a, b = random(0, 3, 2, 4), random(1, 3, 6, 2)
    name = "mlp.switch_mlp.up_proj"
    path = save(tmp_path / "l.safetensors", {f"{name}.lora_a": a, f"{name}.lora_b": b}, {"scale": "2.0"})
    model = base(tmp_path, "a", {f"{name}.weight": (3, 6, 4)})
    found = read_adapter(open_adapter(path), Base.of(model)).deltas[f"{name}.weight"]
    np.testing.assert_allclose(found.dense(), 2 * np.matmul(b, a), rtol=1e-5, atol=1e-6)
    done = convert(path, renaming({f"{name}.weight": f"{name}.weight"}), "mlx", tmp_path / "o", base=model)
    assert done.verified == 1
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == ["mlp.switch_mlp.up_proj"]


def test_einsum_factors_come_and_go_through_separate_matrices(tmp_path: Path) -> None:
    rules = mapping(
        (
            ("l.{i}.o.weight",),
            ("attn/attn_vec_einsum/w",),
            (Rearrange("l n h d -> l d (n h)", {"n": 3}), Unstack(0, "i")),
        ),
    )
    model = base(tmp_path, "a", {"attn/attn_vec_einsum/w": (2, 3, 4, 5)})
    arrays = {
        "attn/attn_vec_einsum/lora_a": random(0, 2, 3, 4, 2),
        "attn/attn_vec_einsum/lora_b": random(1, 2, 3, 2, 5),
    }
    path = save(tmp_path / "l.safetensors", arrays)
    convert(path, rules, "peft", tmp_path / "o", base=model)
    back = convert(
        tmp_path / "o",
        rules.inverse(),
        "openpi",
        tmp_path / "b.safetensors",
        base=base(tmp_path, "b", {f"l.{i}.o.weight": (5, 12) for i in range(2)}),
    )
    assert not back.left
    before, after = (
        read_adapter(open_adapter(p), Base.of(model)).deltas["attn/attn_vec_einsum/w"].dense()
        for p in (path, tmp_path / "b.safetensors")
    )
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_dora_beside_a_plain_pair_gets_the_norms_that_change_nothing(tmp_path: Path) -> None:
    arrays = {
        f"{n}.lora_{x}.weight": random(k, *((2, 6) if x == "A" else (4, 2))) for k, n in enumerate("qk") for x in "AB"
    }
    adapter = peft(tmp_path / "l", arrays | {"q.lora_magnitude_vector": np.abs(random(9, 4)) + 1}, use_dora=True)
    rules = mapping((("qk.weight",), ("q.weight", "k.weight"), (Concat(0),)))
    model = base(tmp_path, "a", {"q.weight": (4, 6), "k.weight": (4, 6)})
    convert(adapter, rules, "peft", tmp_path / "o", base=model)
    merge(model, adapter, tmp_path / "apart.safetensors")
    fused = np.concatenate([model.tensor("q.weight"), model.tensor("k.weight")])
    merge(
        open_checkpoint(save(tmp_path / "b.safetensors", {"qk.weight": fused})),
        tmp_path / "o",
        tmp_path / "fused.safetensors",
    )
    apart = read(tmp_path / "apart.safetensors")
    wanted = np.concatenate([apart["q.weight"], apart["k.weight"]])
    np.testing.assert_allclose(read(tmp_path / "fused.safetensors")["qk.weight"], wanted, rtol=1e-4, atol=1e-5)


def test_magnitudes_of_rows_and_of_columns_do_not_meet() -> None:
    from tests.lora.builders import delta_of

    rows, columns = (delta_of("dora", (4, 4), k) for k in range(2))
    turned = columns.changed(lambda t: t.with_layout(t.layout[::-1]), (4, 4))
    both = Delta(shape=(4, 4), magnitudes=rows.magnitudes + turned.magnitudes)
    with pytest.raises(Refused, match="of rows and of columns"):
        both.magnitude()


def test_differences_of_vectors_are_extracted_where_the_format_holds_them(tmp_path: Path) -> None:
    model = base(tmp_path, "a", {"q.weight": (8, 6), "norm.weight": (6,), "w/w": (2, 4, 6), "only.weight": (3, 3)})
    tuned = {
        n: model.tensor(n) + random(k, *model.specs[n].shape) for k, n in enumerate(("q.weight", "norm.weight", "w/w"))
    }
    other = open_checkpoint(save(tmp_path / "b.safetensors", tuned))
    done = extract(model, other, tmp_path / "o.safetensors", rank=2, to="comfy")
    assert "diffusion_model.norm.diff" in read(tmp_path / "o.safetensors")
    assert done.skipped["only.weight"] == "the tuned model has no such tensor"
    assert {c.tensor for c in done.tensors} == {"q.weight", "w/w"}
