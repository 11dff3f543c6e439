"""Conversions end to end: exactness through all formats, the fate of every key, what is needed and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lineage.checkpoint import open_checkpoint
from lineage.checkpoint.dtypes import encode
from lineage.checkpoint.write import write_safetensors
from lineage.errors import InputError
from lineage.layout.axes import Shape
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.layout.mapping import Rule
from lineage.layout.operations import Concat, Pad, Rearrange, Split, Take
from lineage.lora.converting import convert
from lineage.lora.reading import read_adapter
from lineage.lora.source import Base, open_adapter
from tests.lora.builders import Arrays, base, kohya_dense, mapping, peft, random, read, renaming, save

MODEL: dict[str, Shape] = {f"transformer_blocks.{i}.{n}.weight": (6, 4) for i in range(2) for n in ("to_q", "to_k")}
SAME = mapping(*(((n,), (n,), ()) for n in MODEL))


def _deltas(path: Path, model: Path) -> dict[str, NDArray[Any]]:
    found = read_adapter(open_adapter(path), Base.of(open_checkpoint(model)))
    assert not found.left
    return {name: delta.dense() for name, delta in found.deltas.items()}


def _all_modules() -> Arrays:
    arrays: Arrays = {}
    for k, name in enumerate(MODEL):
        stem = name.removesuffix(".weight")
        rank = 2 + k % 2
        arrays |= {f"{stem}.lora_A.weight": random(k, rank, 4), f"{stem}.lora_B.weight": random(k + 9, 6, rank)}
    return arrays


@pytest.mark.parametrize("rslora", [False, True])
def test_the_way_through_four_formats_and_back_keeps_every_bit(tmp_path: Path, rslora: bool) -> None:
    model = base(tmp_path, "a", MODEL)
    config = {"lora_alpha": 3, "use_rslora": rslora, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"1.to_q": 5}}
    path = peft(tmp_path / "peft", _all_modules(), **config)
    wanted = _deltas(path, Path(model.path))
    for k, to in enumerate(["kohya", "comfy", "diffusers", "peft"]):
        out = tmp_path / (f"{k}" if to == "peft" else f"{k}.safetensors")
        done = convert(path, SAME, to, out, base=model)
        assert not done.left
        assert done.verified == len(MODEL)
        path = out
    found = _deltas(path, Path(model.path))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_every_key_has_a_fate_with_the_keys_that_it_went_into(tmp_path: Path) -> None:
    rules = mapping((("qkv.weight",), ("q.weight", "k.weight", "v.weight"), (Concat(0),)))
    model = base(tmp_path, "a", {f"{n}.weight": (4, 6) for n in "qkv"})
    arrays = {"q.lora_A.weight": random(0, 2, 6), "q.lora_B.weight": random(1, 4, 2), "q.strange": random(2, 3)}
    done = convert(peft(tmp_path / "l", arrays), rules, "kohya", tmp_path / "o.safetensors", base=model)
    fates = {k.key.removeprefix("base_model.model."): k for k in done.keys}
    assert fates["q.lora_A.weight"].to == tuple(
        f"lora_unet_qkv.{e}" for e in ("lora_down.weight", "lora_up.weight", "alpha")
    )
    assert fates["q.lora_A.weight"].tensor == "q.weight"
    assert fates["q.strange"].reason == "no adapter format writes such a key"
    assert len(done.keys) == 3


def test_bfloat16_factors_that_only_move_stay_as_they_are(tmp_path: Path) -> None:
    rules = mapping((("r.weight",), ("q.weight",), (Take(0, [(2, 4, 1), (0, 2, 1)]),)))
    codes = {
        "lora_unet_q.lora_down.weight": encode(random(0, 2, 6), "BF16"),
        "lora_unet_q.lora_up.weight": encode(random(1, 4, 2), "BF16"),
    }
    entries = [(k, "BF16", v.shape) for k, v in codes.items()] + [("lora_unet_q.alpha", "BF16", ())]
    codes["lora_unet_q.alpha"] = encode(np.array(0.7), "BF16")
    write_safetensors(tmp_path / "l.safetensors", entries, lambda name: codes[name])
    convert(
        tmp_path / "l.safetensors",
        rules,
        "comfy",
        tmp_path / "o.safetensors",
        base=base(tmp_path, "a", {"q.weight": (4, 6)}),
    )
    found = open_checkpoint(tmp_path / "o.safetensors")
    assert found.specs["diffusion_model.r.lora_up.weight"].dtype == "BF16"
    assert np.array_equal(found.codes("diffusion_model.r.lora_down.weight"), codes["lora_unet_q.lora_down.weight"])
    assert np.array_equal(found.codes("diffusion_model.r.lora_up.weight")[:2], codes["lora_unet_q.lora_up.weight"][2:])


def test_the_mapping_alone_is_enough_where_it_tells_names_and_shapes(tmp_path: Path) -> None:
    rule = Rule(to=("h.{i}.q.weight", "h.{i}.k.weight"), source=("blocks.{i}.attn_qk.weight",), ops=(Split(0, 2),))
    arrays = {
        "lora_unet_blocks_1_attn_qk.lora_down.weight": random(0, 2, 6),
        "lora_unet_blocks_1_attn_qk.lora_up.weight": random(1, 8, 2),
    }
    done = convert(
        save(tmp_path / "l.safetensors", arrays), LayoutMapping(rules=(rule,)), "kohya", tmp_path / "o.safetensors"
    )
    assert not done.left
    np.testing.assert_allclose(
        kohya_dense(tmp_path / "o.safetensors", "lora_unet_h_1_k"), random(1, 8, 2)[4:] @ random(0, 2, 6)
    )


def test_a_shape_that_only_the_base_tells_is_asked_for(tmp_path: Path) -> None:
    rules = mapping((("qk.weight",), ("q.weight", "k.weight"), (Concat(0),)))
    arrays = {"lora_unet_q.lora_down.weight": random(0, 2, 6), "lora_unet_q.lora_up.weight": random(1, 4, 2)}
    with pytest.raises(InputError, match="k.weight: .*shape is needed; give the base with --base"):
        convert(save(tmp_path / "l.safetensors", arrays), rules, "kohya", tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def test_whole_biases_become_differences_and_whole_biases_again(tmp_path: Path) -> None:
    names = {"q.weight": "r.weight", "q.bias": "r.bias"}
    model = base(tmp_path, "a", {"q.weight": (4, 6), "q.bias": (4,)})
    arrays = {"q.lora_A.weight": random(0, 2, 6), "q.lora_B.weight": random(1, 4, 2), "q.base_layer.bias": random(2, 4)}
    adapter = peft(tmp_path / "l", arrays, bias="lora_only")
    convert(adapter, renaming(names), "comfy", tmp_path / "o.safetensors", base=model)
    np.testing.assert_allclose(
        read(tmp_path / "o.safetensors")["diffusion_model.r.diff_b"], random(2, 4) - model.tensor("q.bias"), rtol=1e-6
    )
    convert(adapter, renaming(names), "peft", tmp_path / "o", base=model)
    assert np.array_equal(read(tmp_path / "o")["base_model.model.r.base_layer.bias"], random(2, 4))
    with pytest.raises(InputError, match="needs the base's values; give the base with --base"):
        convert(adapter, renaming(names), "comfy", tmp_path / "p.safetensors")


def test_a_rank_cut_states_what_it_loses_and_nothing_else_loses(tmp_path: Path) -> None:
    model = base(tmp_path, "a", {"q.weight": (8, 6)})
    arrays = {"q.lora_A.weight": random(0, 4, 6), "q.lora_B.weight": random(1, 8, 4)}
    adapter = peft(tmp_path / "l", arrays, r=4, lora_alpha=4)
    rules = renaming({"q.weight": "r.weight"})
    done = convert(adapter, rules, "kohya", tmp_path / "o.safetensors", base=model, rank=2)
    values = np.linalg.svd(random(1, 8, 4) @ random(0, 4, 6), compute_uv=False)
    assert done.lost["r.weight"] == pytest.approx(float((values[2:] ** 2).sum() / (values**2).sum()), rel=1e-5)
    assert not convert(adapter, rules, "kohya", tmp_path / "p.safetensors", base=model).lost


def test_growth_that_keeps_a_product_exact_is_reported(tmp_path: Path) -> None:
    arrays = {f"q.hada_w{n}_{x}": random(n, *((6, 2) if x == "a" else (2, 8))) for n in (1, 2) for x in "ab"}
    adapter = peft(tmp_path / "l", arrays, peft_type="LOHA", alpha=2)
    rules = mapping((("r.weight",), ("q.weight",), (Rearrange("o i -> i o"),)))
    done = convert(
        adapter, rules, "diffusers", tmp_path / "o.safetensors", base=base(tmp_path, "a", {"q.weight": (6, 8)})
    )
    assert done.grown == {"r.weight": (2, 4)}


def test_two_rules_that_each_know_a_part_of_a_tensor_are_put_together(tmp_path: Path) -> None:
    rules = mapping(
        (("t.weight",), ("a.weight",), (Pad(0, 0, 4, None),)),
        (("t.weight",), ("b.weight",), (Pad(0, 4, 0, None),)),
    )  # fmt: skip
    arrays: Arrays = {}
    for k, n in enumerate("ab"):
        arrays |= {f"{n}.lora_A.weight": random(k, 2, 6), f"{n}.lora_B.weight": random(k + 5, 4, 2)}
    model = base(tmp_path, "a", {"a.weight": (4, 6), "b.weight": (4, 6)})
    convert(peft(tmp_path / "l", arrays), rules, "kohya", tmp_path / "o.safetensors", base=model,
            target=base(tmp_path, "t", {"t.weight": (8, 6)}))  # fmt: skip
    wanted = np.concatenate([random(5, 4, 2) @ random(0, 2, 6), random(6, 4, 2) @ random(1, 2, 6)])
    np.testing.assert_allclose(kohya_dense(tmp_path / "o.safetensors", "lora_unet_t"), wanted, rtol=1e-5)


def test_metadata_is_kept_hashes_are_made_anew_and_the_origin_is_noted(tmp_path: Path) -> None:
    arrays = {"lora_unet_q.lora_down.weight": random(0, 2, 6), "lora_unet_q.lora_up.weight": random(1, 4, 2)}
    path = save(tmp_path / "l.safetensors", arrays, {"ss_output_name": "mine", "sshs_model_hash": "0" * 64})
    convert(
        path,
        renaming({"q.weight": "r.weight"}),
        "kohya",
        tmp_path / "o.safetensors",
        base=base(tmp_path, "a", {"q.weight": (4, 6)}),
    )
    metadata = open_checkpoint(tmp_path / "o.safetensors").metadata
    assert metadata["ss_output_name"] == "mine"
    assert metadata["sshs_model_hash"] == json.loads(metadata["lineage"])["content_sha256"] != "0" * 64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"lora_unet_q.lora_down.weight": (2, 6)}, r"the other half of the pair \(up\) is missing"),
        ({"lora_unet_q.lora_down.weight": (2, 5), "lora_unet_q.lora_up.weight": (4, 2)}, "do not fit a tensor of"),
        ({"lora_unet_q.lora_down.weight": (2, 6), "lora_unet_q.lora_up.weight": (4, 3)}, "of rank 3 and 2 do not fit"),
        ({"foo.bar": (2, 6)}, "no adapter format writes such a key"),
        ({"lora_unet_z.lora_down.weight": (2, 6)}, "the base has no such module"),
        ({"lora_unet_q.lokr_w1": (2, 2)}, r"\(lokr_w2_a\) is missing"),
        ({"lora_unet_q.hada_w1_a": (4, 2), "lora_unet_q.hada_w1_b": (2, 6)}, r"\(hada_w2_a\) is missing"),
    ],
)
def test_an_adapter_of_which_nothing_fits_is_an_error_that_says_why(
    tmp_path: Path, arrays: dict[str, Shape], message: str
) -> None:
    path = save(tmp_path / "l.safetensors", {k: random(0, *s) for k, s in arrays.items()})
    with pytest.raises(InputError, match=message) as told:
        convert(
            path,
            renaming({"q.weight": "r.weight"}),
            "kohya",
            tmp_path / "o.safetensors",
            base=base(tmp_path, "a", {"q.weight": (4, 6)}),
        )
    assert str(told.value).startswith(str(path))
    assert not (tmp_path / "o.safetensors").exists()


def test_a_module_with_nan_is_left_over_and_the_others_are_converted(tmp_path: Path) -> None:
    arrays = {"lora_unet_q.lora_down.weight": random(0, 2, 6), "lora_unet_q.lora_up.weight": random(1, 4, 2)}
    arrays |= {k.replace("_q.", "_k."): v * np.float32(np.nan) for k, v in arrays.items()}
    model = base(tmp_path, "a", {"q.weight": (4, 6), "k.weight": (4, 6)})
    rules = renaming({"q.weight": "q.weight", "k.weight": "k.weight"})
    done = convert(save(tmp_path / "l.safetensors", arrays), rules, "kohya", tmp_path / "o.safetensors", base=model)
    assert [k.reason for k in done.left] == ["down holds NaN or infinity"] * 2


def test_peft_factors_of_another_rank_than_configured_are_left_over(tmp_path: Path) -> None:
    adapter = peft(tmp_path / "l", {"q.lora_A.weight": random(0, 3, 6), "q.lora_B.weight": random(1, 4, 3)})
    with pytest.raises(InputError, match="have rank 3, the configuration says 2"):
        convert(
            adapter,
            renaming({"q.weight": "r.weight"}),
            "kohya",
            tmp_path / "o.safetensors",
            base=base(tmp_path, "a", {"q.weight": (4, 6)}),
        )
