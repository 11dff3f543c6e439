"""The traps of existing converters (shared/lora-formats.md, T1 to T27), one test or more each, by its number.

Sources: kohya-ss sd-scripts networks/convert_flux_lora.py, lora_flux.py; diffusers loaders/lora_conversion_utils.py;
musubi-tuner; mflux #458; llama.cpp convert_lora_to_gguf.py; openpi models/lora.py; ComfyUI comfy/weight_adapter;
peft tuners/lora/layer.py; mergekit scripts/extract_lora.py; LongCat-Video modules/lora_utils.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lineage.checkpoint import open_checkpoint
from lineage.checkpoint.dtypes import encode
from lineage.checkpoint.write import write_safetensors
from lineage.layout.axes import Shape
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.layout.operations import Concat, Rearrange, Split, Stack, Take
from lineage.lora.converting import Conversion, convert
from lineage.lora.delta import strength
from lineage.lora.extraction import extract
from lineage.lora.inspection import inspect
from lineage.lora.merging import merge
from lineage.lora.reading import Adapter, read_adapter
from lineage.lora.source import Base, open_adapter
from tests.lora.builders import base, kohya_dense, mapping, peft, random, read, renaming, save

QKV = mapping((("q.weight", "k.weight", "v.weight"), ("qkv.weight",), (Split(0, 3),)))
FUSE = mapping((("qkv.weight",), ("q.weight", "k.weight", "v.weight"), (Concat(0),)))
THREE: dict[str, Shape] = {"q.weight": (4, 6), "k.weight": (4, 6), "v.weight": (4, 6)}


def _read(path: Path, model: Base, format: str | None = None) -> Adapter:
    return read_adapter(open_adapter(path), model, format=format)


def _shapes(**shapes: Shape) -> Base:
    return Base({name.replace("__", "."): shape for name, shape in shapes.items()})


def _convert(
    tmp_path: Path, adapter: Path, rules: LayoutMapping, model: Mapping[str, Shape], to: str = "kohya", **options: Any
) -> tuple[Conversion, Path]:
    """The adapter converted with its base at hand."""
    out = tmp_path / ("out.gguf" if to == "gguf" else "out" if to == "peft" else "out.safetensors")
    return convert(adapter, rules, to, out, base=base(tmp_path, "a", model), **options), out


def _kohya(path: Path, **pairs: tuple[NDArray[Any], NDArray[Any], float | None]) -> Path:
    """A kohya file of (down, up, alpha)."""
    arrays: dict[str, NDArray[Any]] = {}
    for word, (down, up, alpha) in pairs.items():
        arrays |= {f"lora_unet_{word}.lora_down.weight": down, f"lora_unet_{word}.lora_up.weight": up}
        if alpha is not None:
            arrays[f"lora_unet_{word}.alpha"] = np.array(alpha, np.float32)
    return save(path, arrays)


def test_t01_swapped_halves_move_rows_of_up_and_leave_down_alone(tmp_path: Path) -> None:
    swap = mapping((("norm_out.weight",), ("final.weight",), (Take(0, [(4, 8, 1), (0, 4, 1)]),)))
    down, up = random(0, 4, 6), random(1, 8, 4)
    _, out = _convert(
        tmp_path, _kohya(tmp_path / "l.safetensors", final=(down, up, 2.0)), swap, {"final.weight": (8, 6)}
    )
    found = read(out)
    assert np.array_equal(found["lora_unet_norm_out.lora_down.weight"], down)
    assert np.array_equal(found["lora_unet_norm_out.lora_up.weight"], np.concatenate([up[4:], up[:4]]))


@pytest.mark.parametrize("missing", ["q", "k", "v"])
def test_t02_a_missing_member_of_a_fusion_loses_nothing_of_the_others(tmp_path: Path, missing: str) -> None:
    pairs = {n: (random(k, k + 1, 6), random(k + 9, 4, k + 1), float(k + 1)) for k, n in enumerate("qkv")}
    del pairs[missing]
    done, out = _convert(tmp_path, _kohya(tmp_path / "l.safetensors", **pairs), FUSE, THREE)
    dense = kohya_dense(out, "lora_unet_qkv")
    for k, n in enumerate("qkv"):
        wanted = pairs[n][1] @ pairs[n][0] if n in pairs else np.zeros((4, 6))
        np.testing.assert_allclose(dense[4 * k : 4 * k + 4], wanted, atol=1e-6)
    assert not done.left


def test_t02_an_alpha_that_is_not_the_rank_survives_and_text_encoders_are_reported(tmp_path: Path) -> None:
    path = _kohya(tmp_path / "l.safetensors", q=(random(0, 2, 6), random(1, 4, 2), 16.0))
    arrays = read(path) | {"lora_te1_x.lora_down.weight": random(3, 2, 4), "lora_te1_x.lora_up.weight": random(4, 4, 2)}
    done, out = _convert(tmp_path, save(path, arrays), FUSE, THREE)
    np.testing.assert_allclose(
        kohya_dense(out, "lora_unet_qkv")[:4], 8 * random(1, 4, 2) @ random(0, 2, 6), rtol=1e-5, atol=1e-6
    )
    assert [k.key for k in done.left] == ["lora_te1_x.lora_down.weight", "lora_te1_x.lora_up.weight"]
    assert all("another model" in k.reason for k in done.left)


def test_t03_a_fused_adapter_trained_dense_keeps_all_of_its_rows(tmp_path: Path) -> None:
    down, up = random(0, 6, 5), random(1, 12, 6)
    _, out = _convert(tmp_path, _kohya(tmp_path / "l.safetensors", qkv=(down, up, 6.0)), QKV, {"qkv.weight": (12, 5)})
    for k, n in enumerate("qkv"):
        np.testing.assert_allclose(kohya_dense(out, f"lora_unet_{n}"), (up @ down)[4 * k : 4 * k + 4], atol=1e-5)


@pytest.mark.parametrize("rank", [3, 16, 32])
def test_t04_splitting_keeps_the_shared_down_factor_whatever_the_rank(tmp_path: Path, rank: int) -> None:
    down, up = random(0, rank, 5), random(1, 12, rank)
    _, out = _convert(tmp_path, _kohya(tmp_path / "l.safetensors", qkv=(down, up, 1.0)), QKV, {"qkv.weight": (12, 5)})
    assert np.array_equal(read(out)["lora_unet_k.lora_down.weight"], down)
    assert np.array_equal(read(out)["lora_unet_k.lora_up.weight"], up[4:8])


@pytest.mark.parametrize(("noise", "rank"), [(0.0, 2), (1e-4, 6)])
def test_t05_block_diagonal_factors_lose_ranks_only_where_off_blocks_are_zero(
    tmp_path: Path, noise: float, rank: int
) -> None:
    up = np.full((12, 6), noise, np.float32)
    for k in range(3):
        up[4 * k : 4 * k + 4, 2 * k : 2 * k + 2] = random(k, 4, 2)
    path = _kohya(tmp_path / "l.safetensors", qkv=(random(9, 6, 5), up, 6.0))
    _, out = _convert(tmp_path, path, QKV, {"qkv.weight": (12, 5)})
    assert len(read(out)["lora_unet_v.lora_down.weight"]) == rank
    np.testing.assert_allclose(kohya_dense(out, "lora_unet_v"), (up @ random(9, 6, 5))[8:], atol=1e-6)


def test_t06_attention_alone_a_few_blocks_and_no_alpha_are_no_errors(tmp_path: Path) -> None:
    rules = mapping((("b.{i}.to_q.weight",), ("blocks.{i}.self_attn.q.weight",), ()))
    model = {f"blocks.{i}.self_attn.q.weight": (4, 6) for i in range(5)}
    arrays = {"diffusion_model.blocks.3.self_attn.q.lora_down.weight": random(0, 2, 6)}
    arrays |= {"diffusion_model.blocks.3.self_attn.q.lora_up.weight": random(1, 4, 2)}
    done, out = _convert(tmp_path, save(tmp_path / "l.safetensors", arrays), rules, model, "comfy")
    assert not done.left
    np.testing.assert_allclose(read(out)["diffusion_model.b.3.to_q.alpha"], 2)


def test_t07_differences_of_norms_and_biases_are_carried(tmp_path: Path) -> None:
    names = {"norm3.weight": "norm2.weight", "norm3.bias": "norm2.bias", "k_img.weight": "add_k.weight"}
    model: dict[str, Shape] = {"norm3.weight": (6,), "norm3.bias": (6,), "k_img.weight": (4, 6)}
    arrays = {"diffusion_model.norm3.diff": random(0, 6), "diffusion_model.norm3.diff_b": random(1, 6)}
    arrays |= {"diffusion_model.k_img.lora_down.weight": random(2, 2, 6)}
    arrays |= {"diffusion_model.k_img.lora_up.weight": random(3, 4, 2)}
    done, out = _convert(tmp_path, save(tmp_path / "l.safetensors", arrays), renaming(names), model, "comfy")
    assert not done.left
    assert np.array_equal(read(out)["diffusion_model.norm2.diff"], random(0, 6))
    assert np.array_equal(read(out)["diffusion_model.norm2.diff_b"], random(1, 6))


def test_t08_a_second_pair_for_one_tensor_is_reported_not_dropped(tmp_path: Path) -> None:
    arrays = {f"{p}q.{e}": v for p in ("diffusion_model.", "transformer.") for e, v in
              (("lora_A.weight", random(0, 2, 6)), ("lora_B.weight", random(1, 4, 2)))}  # fmt: skip
    found = _read(save(tmp_path / "l.safetensors", arrays), _shapes(q__weight=(4, 6)), "comfy")
    assert [f.status for f in found.fates] == ["read", "read", "left", "left"]
    assert all("second" in f.reason for f in found.left)


@pytest.mark.parametrize(("shape", "axis"), [((4, 1), 0), ((1, 4), 1), ((4,), 0)])
def test_t09_the_axis_of_magnitudes_is_told_by_their_shape_on_square_layers(
    tmp_path: Path, shape: tuple[int, ...], axis: int
) -> None:
    vector = np.abs(random(5, 4)).reshape(shape)
    arrays = {"lora_unet_q.lora_down.weight": random(0, 2, 4), "lora_unet_q.lora_up.weight": random(1, 4, 2)}
    found = _read(
        save(tmp_path / "l.safetensors", arrays | {"lora_unet_q.dora_scale": vector}), _shapes(q__weight=(4, 4))
    )
    told = found.deltas["q.weight"].magnitude()
    assert told is not None
    assert told[0] == axis


def test_t10_dora_divides_by_the_norm_of_weight_and_difference_together(tmp_path: Path) -> None:
    model = base(tmp_path, "a", {"q.weight": (4, 6)})
    down, up, vector = random(10, 2, 6), random(11, 4, 2), np.abs(random(12, 4))
    adapter = peft(tmp_path / "l", {"q.lora_A.weight": down, "q.lora_B.weight": up, "q.lora_magnitude_vector": vector})
    merge(model, adapter, tmp_path / "m.safetensors")
    merged = model.tensor("q.weight") + up @ down
    wanted = vector[:, None] * merged / np.linalg.norm(merged, axis=1, keepdims=True)
    np.testing.assert_allclose(read(tmp_path / "m.safetensors")["q.weight"], wanted, rtol=1e-5, atol=1e-6)


def test_t11_gguf_has_one_alpha_so_unequal_scales_go_into_the_factors(tmp_path: Path) -> None:
    arrays = {f"{n}.lora_{x}.weight": v for n in "qk" for x, v in (("A", random(0, 2, 6)), ("B", random(1, 4, 2)))}
    adapter = peft(tmp_path / "l", arrays, alpha_pattern={"k": 8}, use_rslora=True)
    names = {"q.weight": "blk.0.attn_q.weight", "k.weight": "blk.0.attn_k.weight"}
    _, out = _convert(tmp_path, adapter, renaming(names), THREE, "gguf")
    opened = open_checkpoint(out)
    assert float(opened.metadata["adapter.lora.alpha"]) == 0
    for name, alpha in (("q", 2), ("k", 8)):
        got = opened.tensor(f"blk.0.attn_{name}.weight.lora_b") @ opened.tensor(f"blk.0.attn_{name}.weight.lora_a")
        np.testing.assert_allclose(got, alpha / 2**0.5 * random(1, 4, 2) @ random(0, 2, 6), rtol=1e-5, atol=1e-6)


def test_t12_rope_order_of_a_gguf_base_permutes_rows_of_up(tmp_path: Path) -> None:
    rope = Rearrange("(h two d) k -> (h d two) k", {"h": 2, "two": 2})
    adapter = peft(tmp_path / "l", {"q.lora_A.weight": random(0, 2, 6), "q.lora_B.weight": random(1, 8, 2)})
    rules = mapping((("blk.0.attn_q.weight",), ("q.weight",), (rope,)))
    _, out = _convert(tmp_path, adapter, rules, {"q.weight": (8, 6)}, "gguf")
    got = open_checkpoint(out).tensor("blk.0.attn_q.weight.lora_b")
    assert np.array_equal(got, rope.one(random(1, 8, 2)))


def test_t13_mlx_factors_are_transposed_on_square_layers_too(tmp_path: Path) -> None:
    a, b = random(0, 4, 4), random(1, 4, 4)
    folder = tmp_path / "mlx"
    folder.mkdir()
    save(folder / "adapters.safetensors", {"q.lora_a": a, "q.lora_b": b})
    (folder / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 4, "scale": 20.0}}))
    _, out = _convert(tmp_path, folder, renaming({"q.weight": "r.weight"}), {"q.weight": (4, 4)}, "peft")
    found, config = read(out), json.loads((out / "adapter_config.json").read_text())
    up, down = (found[f"base_model.model.r.lora_{x}.weight"] for x in "BA")
    np.testing.assert_allclose(config["lora_alpha"] / 4 * up @ down, 20 * (a @ b).T, rtol=1e-5, atol=1e-6)


def test_t14_peft_stacks_have_the_expert_slowest_in_a_and_fastest_in_b(tmp_path: Path) -> None:
    rules = mapping((("mlp.experts.down_proj",), ("e.{e}.w2.weight",), (Stack(0, "e"),)))
    model = {f"e.{e}.w2.weight": (4, 6) for e in range(3)}
    pairs = {f"e_{e}_w2": (random(e, 2, 6), random(9 + e, 4, 2), 2.0) for e in (0, 2)}
    _, out = _convert(tmp_path, _kohya(tmp_path / "l.safetensors", **pairs), rules, model, "peft")
    found = read(out)
    a = found["base_model.model.mlp.experts.lora_A.weight"].reshape(3, 2, 6)
    b = found["base_model.model.mlp.experts.lora_B.weight"].reshape(4, 2, 3)
    dense = np.einsum("ore,eri->eoi", b, a)
    wanted = [pairs[f"e_{e}_w2"][1] @ pairs[f"e_{e}_w2"][0] if e != 1 else np.zeros((4, 6)) for e in range(3)]
    np.testing.assert_allclose(dense, wanted, atol=1e-6)
    back = _read(out, _shapes(mlp__experts__down_proj=(3, 4, 6)))
    np.testing.assert_allclose(back.deltas["mlp.experts.down_proj"].dense(), wanted, atol=1e-6)


def test_t15_the_second_factor_of_attn_vec_counts_summed_over_the_heads(tmp_path: Path) -> None:
    a, b = random(0, 3, 4, 2), random(1, 3, 2, 5)
    path = save(tmp_path / "l.safetensors", {"attn/attn_vec_einsum/lora_a": a, "attn/attn_vec_einsum/lora_b": b})
    found = _read(path, Base({"attn/attn_vec_einsum/w": (3, 4, 5)})).deltas["attn/attn_vec_einsum/w"]
    encoded = random(2, 7, 3, 4)
    inner = np.einsum("tnh,nhl->tl", encoded, a)
    wanted = np.einsum("tl,nld->td", inner, b)
    np.testing.assert_allclose(np.einsum("tnh,nhd->td", encoded, found.dense()), wanted, rtol=1e-5, atol=1e-5)


def test_t16_keys_that_the_mapping_has_no_place_for_are_named(tmp_path: Path) -> None:
    pairs = {n: (random(0, 2, 6), random(1, 4, 2), 1.0) for n in "qk"}
    path = _kohya(tmp_path / "l.safetensors", **pairs)
    done, _ = _convert(tmp_path, path, renaming({"q.weight": "r.weight"}), THREE)
    assert {k.key.partition(".")[0] for k in done.left} == {"lora_unet_k"}
    assert all("no counterpart" in k.reason for k in done.left)


def test_t17_flattened_names_are_looked_up_and_ambiguous_ones_refused(tmp_path: Path) -> None:
    path = _kohya(tmp_path / "l.safetensors", a_b_c=(random(0, 2, 6), random(1, 4, 2), 1.0),
                  cross_attn_k_img=(random(0, 2, 6), random(1, 4, 2), 1.0))  # fmt: skip
    found = _read(path, _shapes(a_b__c__weight=(4, 6), a__b_c__weight=(4, 6), cross_attn__k_img__weight=(4, 6)))
    assert set(found.deltas) == {"cross_attn.k_img.weight"}
    assert all("may be a.b_c or a_b.c" in f.reason for f in found.left)


def test_t18_mixed_ranks_without_alpha_each_have_scale_one(tmp_path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    for k, n in enumerate("qk"):
        arrays |= {f"transformer.{n}.lora_A.weight": random(k, 2 + 6 * k, 6)}
        arrays |= {f"transformer.{n}.lora_B.weight": random(k + 5, 4, 2 + 6 * k)}
    found = _read(save(tmp_path / "l.safetensors", arrays), _shapes(q__weight=(4, 6), k__weight=(4, 6)), "diffusers")
    for k, n in enumerate("qk"):
        np.testing.assert_allclose(
            found.deltas[f"{n}.weight"].dense(), random(k + 5, 4, 2 + 6 * k) @ random(k, 2 + 6 * k, 6), rtol=1e-5
        )
        assert found.deltas[f"{n}.weight"].assumed


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (np.array(8, np.int64), 4.0),
        (np.array([8.0], np.float32), 4.0),
        (np.array(8.0, np.float16), 4.0),
        (np.array(0.0, np.float32), 1.0),
    ],
)
def test_t19_alpha_of_any_type_and_shape_is_read_and_zero_is_the_rank(
    tmp_path: Path, alpha: NDArray[Any], scale: float
) -> None:
    arrays = {"lora_unet_q.lora_down.weight": random(0, 2, 6), "lora_unet_q.lora_up.weight": random(1, 4, 2)}
    found = _read(save(tmp_path / "l.safetensors", arrays | {"lora_unet_q.alpha": alpha}), _shapes(q__weight=(4, 6)))
    assert found.deltas["q.weight"].terms[0].scale == scale


def test_t20_a_scaled_fp8_base_gets_the_difference_added_to_its_real_values(tmp_path: Path) -> None:
    codes, factor = encode(random(0, 4, 6), "F8_E4M3"), np.array(0.25, np.float32)
    entries: list[tuple[str, str, Shape]] = [("q.weight", "F8_E4M3", (4, 6)), ("q.weight_scale", "F32", ())]
    stored = {"q.weight": codes, "q.weight_scale": factor}
    write_safetensors(tmp_path / "m.safetensors", entries, lambda name: stored[name])
    model = open_checkpoint(tmp_path / "m.safetensors")
    values = model.tensor("q.weight")
    adapter = _kohya(tmp_path / "l.safetensors", q=(random(1, 2, 6), random(2, 4, 2), 2.0))
    done = merge(model, adapter, tmp_path / "out.safetensors")
    merged = open_checkpoint(tmp_path / "out.safetensors")
    assert done.decoded == 1
    np.testing.assert_allclose(merged.tensor("q.weight"), values + random(2, 4, 2) @ random(1, 2, 6), rtol=1e-2)


def test_t21_ranks_that_differ_by_module_have_alphas_that_follow(tmp_path: Path) -> None:
    model = base(tmp_path, "a", {"q.weight": (8, 8), "k.weight": (8, 8), "embed.weight": (10, 8)})
    tuned = {n: model.tensor(n) for n in ("q.weight", "k.weight")}
    tuned["q.weight"] = tuned["q.weight"] + random(1, 8, 1) @ random(2, 1, 8)
    tuned["k.weight"] = tuned["k.weight"] + random(3, 8, 3) @ random(4, 3, 8)
    save_file({**tuned, "embed.weight": random(9, 12, 8)}, tmp_path / "b.safetensors")
    done = extract(model, open_checkpoint(tmp_path / "b.safetensors"), tmp_path / "out", energy=0.999999)
    assert {c.tensor: c.rank for c in done.tensors} == {"q.weight": 1, "k.weight": 3}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {"q": 1, "k": 3}
    for name, rank in ranks.items():
        assert config["rank_pattern"].get(name, config["r"]) == rank
        assert config["alpha_pattern"].get(name, config["lora_alpha"]) == rank
    assert "shape [10, 8] in the base, [12, 8]" in done.skipped["embed.weight"]


def test_t22_one_by_one_convolutions_and_linear_layers_take_each_others_pairs(tmp_path: Path) -> None:
    rules = mapping((("to_q.weight",), ("q.weight",), (Rearrange("o i 1 1 -> o i"),)))
    arrays = {"q.lora_A.weight": random(0, 2, 6, 1, 1), "q.lora_B.weight": random(1, 4, 2, 1, 1)}
    adapter = peft(tmp_path / "l", arrays)
    _, out = _convert(tmp_path, adapter, rules, {"q.weight": (4, 6, 1, 1)}, "peft")
    assert read(out)["base_model.model.to_q.lora_A.weight"].shape == (2, 6)
    back = convert(out, rules.inverse(), "peft", tmp_path / "back", target=open_checkpoint(tmp_path / "a.safetensors"))
    assert not back.left
    assert np.array_equal(read(tmp_path / "back")["base_model.model.q.lora_A.weight"], arrays["q.lora_A.weight"])


def test_t22_a_flattened_patch_embedding_keeps_its_kernel_as_columns(tmp_path: Path) -> None:
    rules = mapping((("proj.weight",), ("conv.weight",), (Rearrange("o c h w -> o (c h w)"),)))
    path = _kohya(tmp_path / "l.safetensors", conv=(random(0, 2, 3, 2, 2), random(1, 4, 2, 1, 1), 2.0))
    _, out = _convert(tmp_path, path, rules, {"conv.weight": (4, 3, 2, 2)})
    assert read(out)["lora_unet_proj.lora_down.weight"].shape == (2, 12)


def test_t23_interleaved_qkv_is_a_permutation_of_rows_not_three_slices(tmp_path: Path) -> None:
    order = Rearrange("(h three d) k -> (three h d) k", {"h": 2, "three": 3})
    rules = mapping((("q.weight", "k.weight", "v.weight"), ("qkv.weight",), (order, Split(0, 3))))
    down, up = random(0, 2, 5), random(1, 12, 2)
    _, out = _convert(tmp_path, _kohya(tmp_path / "l.safetensors", qkv=(down, up, 2.0)), rules, {"qkv.weight": (12, 5)})
    assert np.array_equal(read(out)["lora_unet_k.lora_up.weight"], up.reshape(2, 3, 2, 2)[:, 1].reshape(4, 2))


def test_t24_a_transposed_base_swaps_the_roles_of_the_factors(tmp_path: Path) -> None:
    rules = mapping((("c_attn.weight",), ("h.c_attn.weight",), (Rearrange("i o -> o i"),)))
    arrays = {"h.c_attn.lora_A.weight": random(0, 2, 6), "h.c_attn.lora_B.weight": random(1, 6, 2)}
    adapter = peft(tmp_path / "l", arrays, fan_in_fan_out=True)
    _, out = _convert(tmp_path, adapter, rules, {"h.c_attn.weight": (6, 6)}, "peft")
    found = read(out)
    assert np.array_equal(found["base_model.model.c_attn.lora_B.weight"], arrays["h.c_attn.lora_B.weight"])
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is False


def test_t25_every_key_of_a_mixed_file_is_read_by_its_own_format(tmp_path: Path) -> None:
    arrays = {
        "double_blocks.0.processor.qkv_lora1.down.weight": random(0, 2, 6),
        "double_blocks.0.processor.qkv_lora1.up.weight": random(1, 12, 2),
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": random(2, 2, 4),
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": random(3, 6, 2),
        "lora_unet_double_blocks_0_img_attn_proj.alpha": np.array(1.0, np.float32),
    }
    model = _shapes(double_blocks__0__img_attn__qkv__weight=(12, 6), double_blocks__0__img_attn__proj__weight=(6, 4))
    found = _read(save(tmp_path / "l.safetensors", arrays), model)
    assert set(found.formats) == {"kohya", "xlabs"}
    assert not found.left
    assert found.deltas["double_blocks.0.img_attn.proj.weight"].terms[0].scale == 0.5


@pytest.mark.parametrize(("trained", "factor"), [(False, 1.0), (True, 3.0)])
def test_t26_split_qkv_is_read_literally_warned_of_and_undone_on_request(
    tmp_path: Path, trained: bool, factor: float
) -> None:
    up = np.zeros((12, 6), np.float32)
    for k in range(3):
        up[4 * k : 4 * k + 4, 2 * k : 2 * k + 2] = random(k, 4, 2)
    path = _kohya(tmp_path / "l.safetensors", qkv=(random(9, 6, 5), up, 2.0))
    save(path, read(path), {"ss_network_args": json.dumps({"split_qkv": "True"})})
    done, out = _convert(tmp_path, path, QKV, {"qkv.weight": (12, 5)}, trained_strength=trained)
    wanted = factor * 2 / 6 * (up @ random(9, 6, 5))[:4]
    np.testing.assert_allclose(kohya_dense(out, "lora_unet_q"), wanted, rtol=1e-5, atol=1e-6)
    assert any("split_qkv" in n for n in done.notes) is not trained
    assert any("block-diagonal" in a for a in inspect(path).ailments)


def test_t26_dense_factors_with_split_qkv_in_the_arguments_are_left_alone(tmp_path: Path) -> None:
    path = _kohya(tmp_path / "l.safetensors", qkv=(random(9, 6, 5), random(8, 12, 6), 2.0))
    save(path, read(path), {"ss_network_args": json.dumps({"split_qkv": "True"})})
    done, _ = _convert(tmp_path, path, QKV, {"qkv.weight": (12, 5)}, trained_strength=True)
    assert not any("split_qkv" in n for n in done.notes)


def test_t27_alpha_scale_is_the_scale_and_pieces_of_up_have_ranks_of_their_own(tmp_path: Path) -> None:
    stem = "lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___qkv"
    arrays = {f"{stem}.lora_down.weight": random(0, 6, 5), f"{stem}.alpha_scale": np.array(0.5, np.float32)}
    arrays |= {f"{stem}.lora_up.blocks.{j}.weight": random(1 + j, 4, 2) for j in range(3)}
    rules = mapping((("q.weight", "k.weight", "v.weight"), ("blocks.0.attn.qkv.weight",), (Split(0, 3),)))
    _, out = _convert(tmp_path, save(tmp_path / "l.safetensors", arrays), rules, {"blocks.0.attn.qkv.weight": (12, 5)})
    for j, n in enumerate("qkv"):
        wanted = 0.5 * random(1 + j, 4, 2) @ random(0, 6, 5)[2 * j : 2 * j + 2]
        np.testing.assert_allclose(kohya_dense(out, f"lora_unet_{n}"), wanted, rtol=1e-5, atol=1e-6)


def test_dora_formula_against_numbers_small_enough_to_see() -> None:
    weight = np.array([[3.0, 4.0], [0.0, 2.0]])
    change = strength(weight, np.zeros((2, 2)), 0, np.array([10.0, 2.0]))
    assert np.array_equal(weight + change, [[6, 8], [0, 2]])
