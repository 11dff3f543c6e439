"""Converted adapters in the libraries that people load them with: no key missing, none left, the right output.

Runs where PEFT and diffusers are installed (versions of this writing: peft 0.21.2, diffusers 0.42.1).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lineage.checkpoint import open_checkpoint
from lineage.layout.axes import Shape
from lineage.layout.operations import Concat, Operation, Rearrange, Split, Stack
from lineage.lora.converting import convert
from lineage.lora.merging import difference
from lineage.lora.reading import read_adapter
from lineage.lora.source import Base, open_adapter
from tests.lora.builders import Arrays, mapping, random

#: targets, sources and operations of a rule
Said = tuple[tuple[str, ...], tuple[str, ...], tuple[Operation, ...]]
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def torch() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("peft")
        import torch

        torch.manual_seed(0)
        yield torch


def _model(torch: Any, experts: bool = False) -> Any:
    """A network with every kind of layer that PEFT adapts."""
    nn = torch.nn

    class Experts(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
            self.down_proj = nn.Parameter(torch.randn(3, 6, 4))

        def forward(self, x: Any) -> Any:
            inner = torch.einsum("bi,eoi->beo", x, self.gate_up_proj)[..., :4].tanh()
            return torch.einsum("beo,eio->bi", inner, self.down_proj)

    class Net(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.norm = nn.LayerNorm(6)
            self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
            if experts:
                self.experts = Experts()

        def forward(self, x: Any) -> Any:
            x = self.norm(self.q(x) + self.k(x).tanh() * self.v(x))
            x = x + self.conv(x.reshape(-1, 1, 1, 6)).mean((1, 2)).reshape(x.shape)
            x = x + self.attn(x[None], x[None], x[None])[0][0]
            return x + self.experts(x) if experts else x

    return Net().eval()


def _loaded(torch: Any, model: Any, folder: Path) -> Any:
    """The network with the adapter, loaded by PEFT without a key too many or too few."""
    peft, utils = pytest.importorskip("peft"), pytest.importorskip("peft.utils")
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    wrapped = peft.get_peft_model(model, config)
    found = utils.set_peft_model_state_dict(wrapped, utils.load_peft_weights(str(folder), device="cpu"))
    assert not found.unexpected_keys
    marks = ("lora_", "hada_", "lokr_", "modules_to_save")
    assert not [k for k in found.missing_keys if any(m in k for m in marks)]
    return wrapped.eval()


def _merged(torch: Any, model: Any, folder: Path, stored: Path) -> None:
    """The adapter added to the network's own weights, by our reading of the converted file."""
    base = Base.of(open_checkpoint(stored))
    adapter = read_adapter(open_adapter(folder), base)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in adapter.deltas.items():
            change = difference(delta, own[name].numpy(), name)
            own[name] += torch.from_numpy(change.astype(np.float32)).reshape(own[name].shape)


def _converted(
    torch: Any, tmp_path: Path, arrays: Arrays, ops: list[Said], shapes: dict[str, Shape], *, experts: bool = False,
) -> tuple[Any, Path, Path]:  # fmt: skip
    """The network, its file, and a PEFT folder made of an adapter for another layout."""
    model = _model(torch, experts)
    save_file({n: p.detach().numpy() for n, p in model.named_parameters()}, tmp_path / "b.safetensors")
    save_file({n: random(k, *s) for k, (n, s) in enumerate(shapes.items())}, tmp_path / "a.safetensors")
    save_file(arrays, tmp_path / "lora.safetensors")
    done = convert(
        tmp_path / "lora.safetensors", mapping(*ops), "peft", tmp_path / "out", format="kohya",
        base=open_checkpoint(tmp_path / "a.safetensors"), target=open_checkpoint(tmp_path / "b.safetensors"),
    )  # fmt: skip
    assert not done.left
    return model, tmp_path / "b.safetensors", tmp_path / "out"


def _same_output(torch: Any, tmp_path: Path, *args: Any, **options: Any) -> None:
    model, stored, folder = _converted(torch, tmp_path, *args, **options)
    x = torch.randn(5, 6)
    plain = model(x)
    merged = copy.deepcopy(model)
    _merged(torch, merged, folder, stored)
    with_peft = _loaded(torch, model, folder)(x)
    torch.testing.assert_close(with_peft, merged(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(with_peft, plain, atol=1e-3)


def _pair(word: str, out: int, inside: int, rank: int, alpha: float) -> Arrays:
    found = {f"lora_unet_{word}.lora_down.weight": random(1, rank, inside)}
    found[f"lora_unet_{word}.lora_up.weight"] = random(2, out, rank)
    return found | {f"lora_unet_{word}.alpha": np.array(alpha, np.float32)}


SPLIT: Said = (("q.weight", "k.weight", "v.weight"), ("qkv.weight",), (Split(0, 3),))


def test_split_pairs_of_unequal_ranks_load_in_peft(torch: Any, tmp_path: Path) -> None:
    arrays = _pair("qkv", 18, 6, 3, 1.5)
    conv = {"lora_unet_c.lora_down.weight": random(3, 2, 1, 3, 3), "lora_unet_c.lora_up.weight": random(4, 4, 2, 1, 1)}
    rules: list[Said] = [SPLIT, (("conv.weight",), ("c.weight",), ())]
    _same_output(torch, tmp_path, arrays | conv, rules, {"qkv.weight": (18, 6), "c.weight": (4, 1, 3, 3)})


def test_attention_with_one_fused_matrix_loads_in_peft(torch: Any, tmp_path: Path) -> None:
    rules: list[Said] = [(("attn.in_proj_weight",), ("a.q.weight", "a.k.weight", "a.v.weight"), (Concat(0),))]
    shapes: dict[str, Shape] = {f"a.{n}.weight": (6, 6) for n in "qkv"}
    _same_output(torch, tmp_path, _pair("a_q", 6, 6, 2, 2.0) | _pair("a_v", 6, 6, 3, 1.0), rules, shapes)


def test_stacked_experts_load_in_peft(torch: Any, tmp_path: Path) -> None:
    rules: list[Said] = [
        (("experts.gate_up_proj",), ("e.{e}.w1.weight", "e.{e}.w3.weight"), (Stack(0, "e"), Concat(1))),
        (("experts.down_proj",), ("e.{e}.w2.weight",), (Stack(0, "e"),)),
    ]
    shapes: dict[str, Shape] = {f"e.{e}.w{w}.weight": (6, 4) if w == 2 else (4, 6) for e in range(3) for w in (1, 2, 3)}
    arrays = _pair("e_0_w1", 4, 6, 2, 2.0) | _pair("e_2_w3", 4, 6, 3, 1.0) | _pair("e_1_w2", 6, 4, 2, 4.0)
    _same_output(torch, tmp_path, arrays, rules, shapes, experts=True)


def test_dora_loads_in_peft(torch: Any, tmp_path: Path) -> None:
    arrays = _pair("qkv", 18, 6, 2, 1.0) | {"lora_unet_qkv.dora_scale": np.abs(random(5, 18, 1)) + 1}
    _same_output(torch, tmp_path, arrays, [SPLIT], {"qkv.weight": (18, 6)})


def test_loha_loads_in_peft(torch: Any, tmp_path: Path) -> None:
    arrays = {
        f"lora_unet_qkv.hada_w{n}_{x}": random(n, *((18, 2) if x == "a" else (2, 6))) for n in (1, 2) for x in "ab"
    }
    arrays["lora_unet_qkv.alpha"] = np.array(1.0, np.float32)
    _same_output(torch, tmp_path, arrays, [SPLIT], {"qkv.weight": (18, 6)})


def test_lokr_loads_in_peft(torch: Any, tmp_path: Path) -> None:
    arrays = {"lora_unet_x.lokr_w1": random(1, 2, 2), "lora_unet_x.lokr_w2": random(2, 3, 3)}
    _same_output(torch, tmp_path, arrays, [(("k.weight",), ("x.weight",), ())], {"x.weight": (6, 6)})


def test_biases_and_norms_load_in_peft(torch: Any, tmp_path: Path) -> None:
    arrays = {"lora_unet_n.diff": random(1, 6), "lora_unet_n.diff_b": random(2, 6), "lora_unet_x.diff_b": random(3, 6)}
    rules: list[Said] = [(("norm.weight",), ("n.weight",), ()), (("norm.bias",), ("n.bias",), ())]
    rules += [(("q.weight",), ("x.weight",), ()), (("q.bias",), ("x.bias",), ())]
    shapes: dict[str, Shape] = {"n.weight": (6,), "n.bias": (6,), "x.weight": (6, 6), "x.bias": (6,)}
    _same_output(torch, tmp_path, arrays | _pair("x", 6, 6, 2, 1.0), rules, shapes)


def test_a_fused_pair_loads_in_a_diffusers_transformer(torch: Any, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 9, 4), "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    targets = tuple(f"transformer_blocks.0.attn.to_{n}.weight" for n in "qkv")
    half = Rearrange("(two h) k -> (two h) k", {"two": 2})
    rules = mapping((targets, ("double_blocks.0.img_attn.qkv.weight",), (Split(0, 3),)),
                    (("norm_out.linear.weight",), ("final_layer.adaLN_modulation.1.weight",), (half,)))  # fmt: skip
    shapes: dict[str, Shape] = {"double_blocks.0.img_attn.qkv.weight": (96, 32)}
    shapes["final_layer.adaLN_modulation.1.weight"] = (64, 32)
    save_file({n: random(k, *s) for k, (n, s) in enumerate(shapes.items())}, tmp_path / "a.safetensors")
    save_file({n: p.detach().numpy() for n, p in model.named_parameters()}, tmp_path / "b.safetensors")
    arrays = _pair("double_blocks_0_img_attn_qkv", 96, 32, 3, 1.3)
    arrays |= _pair("final_layer_adaLN_modulation_1", 64, 32, 2, 0.7)
    save_file(arrays, tmp_path / "lora.safetensors")
    out = tmp_path / "pytorch_lora_weights.safetensors"
    with open_checkpoint(tmp_path / "b.safetensors") as b, open_checkpoint(tmp_path / "a.safetensors") as a:
        assert not convert(tmp_path / "lora.safetensors", rules, "diffusers", out, base=a, target=b).left

    with torch.no_grad():
        plain = model(**inputs).sample
        merged = copy.deepcopy(model)
        _merged(torch, merged, out, tmp_path / "b.safetensors")
        wanted = merged(**inputs).sample
        _load(diffusers, model, out)
        got = model(**inputs).sample
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-4)


def _load(diffusers: Any, model: Any, path: Path) -> None:
    """As a pipeline does: the file's state dict and the configuration in its header; every key finds its place."""
    state, _, metadata = diffusers.FluxPipeline.lora_state_dict(
        str(path), return_alphas=True, return_lora_metadata=True
    )
    model.load_lora_adapter(state, network_alphas=None, prefix="transformer", metadata=metadata)
    loaded = {n.replace(".default_0", "") for n, _ in model.named_parameters() if ".lora_" in n}
    assert loaded == {k.removeprefix("transformer.") for k in state}
