"""The stored layouts against the public converters: bit by bit, both ways, at two sizes each.

Runs where diffusers and transformers are installed (versions of this writing: diffusers 0.42.1, transformers 5.24.0).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.match import originals
from tests.match.models import Tensors, save
from tests.match.originals import Shapes, filled
from tests.match.proofs import prove

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

#: layout: which function of diffusers converts it, a model's shapes at two sizes, and constants that the function
#: knows for one size only, with what stands for them at each
CONVERTERS: dict[str, tuple[str, tuple[Shapes, ...], tuple[dict[str, object], ...]]] = {
    "flux-diffusers-original": (
        "convert_flux_transformer_checkpoint_to_diffusers",
        (
            originals.flux(width=32, head=8, double=2, single=3, guidance=True),
            originals.flux(width=48, head=16, double=3, single=2, guidance=False),
        ),
        ({"inner_dim = 3072": "inner_dim = 32"}, {"inner_dim = 3072": "inner_dim = 48"}),
    ),
    "sd3-diffusers-original": (
        "convert_sd3_transformer_checkpoint_to_diffusers",
        (
            originals.sd3(width=32, head=8, layers=3, second=2, normed=True),
            originals.sd3(width=48, head=16, layers=4, second=0, normed=False),
        ),
        ({}, {}),
    ),
    "wan21-original-diffusers": (
        "convert_wan_transformer_to_diffusers",
        (
            originals.wan(width=32, ffn=72, layers=2, image=True, vace=0),
            originals.wan(width=48, ffn=80, layers=3, image=False, vace=2),
        ),
        ({}, {}),
    ),
    "unet-diffusers-ldm": (
        "convert_ldm_unet_checkpoint",
        (
            originals.unet(widths=(8, 16, 24, 24), depths=(1, 1, 1, 0), text=12, flat=False, added=False),
            originals.unet(widths=(8, 16, 32), depths=(0, 2, 3), text=20, flat=True, added=True),
        ),
        ({}, {}),
    ),
    "vae-ldm-diffusers": (
        "convert_ldm_vae_checkpoint",
        (originals.vae(widths=(8, 16, 24, 24), quant=True), originals.vae(widths=(16, 16, 32, 40), quant=False)),
        ({}, {}),
    ),
    "hunyuan-video-diffusers-original": (
        "convert_hunyuan_video_transformer_to_diffusers",
        (
            originals.hunyuan_video(width=32, head=8, double=2, single=3, refined=2, guidance=True),
            originals.hunyuan_video(width=48, head=16, double=3, single=2, refined=1, guidance=False),
        ),
        ({"hidden_size = 3072": "hidden_size = 32"}, {"hidden_size = 3072": "hidden_size = 48"}),
    ),
    "ltx-video-original-diffusers": (
        "convert_ltx_transformer_checkpoint_to_diffusers",
        (originals.ltx_video(width=32, layers=2), originals.ltx_video(width=48, layers=3)),
        ({}, {}),
    ),
    "mochi-diffusers-original": (
        "convert_mochi_transformer_checkpoint_to_diffusers",
        (
            originals.mochi(width=32, text=16, head=8, heads=4, layers=2),
            originals.mochi(width=48, text=32, head=16, heads=3, layers=3),
        ),
        ({"num_layers = 48": "num_layers = 2"}, {"num_layers = 48": "num_layers = 3"}),
    ),
    "lumina2-diffusers-original": (
        "convert_lumina2_to_diffusers",
        (
            originals.lumina2(width=32, kv=16, head=8, layers=2, refined=2),
            originals.lumina2(width=48, kv=16, head=16, layers=3, refined=1),
        ),
        ({"2304": "32", "768": "16"}, {"2304": "48", "768": "16"}),
    ),
}  # fmt: skip


def converter(name: str, constants: dict[str, object]) -> Callable[..., dict[str, Any]]:
    """A function of diffusers, its constants of one model's size replaced."""
    module = pytest.importorskip("diffusers.loaders.single_file_utils")
    source = inspect.getsource(getattr(module, name))
    for text, new in constants.items():
        assert text in source
        source = source.replace(text, str(new))
    names = dict(vars(module))
    exec(source, names)
    made: Callable[..., dict[str, Any]] = names[name]
    return made


def numbers(tensors: dict[str, Any]) -> Tensors:
    return {name: np.ascontiguousarray(x.detach().numpy()) for name, x in tensors.items()}


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("pair", CONVERTERS)
def test_a_stored_layout_does_what_the_converter_of_diffusers_does(tmp_path: Path, pair: str, size: int) -> None:
    torch = pytest.importorskip("torch")
    name, shapes, constants = CONVERTERS[pair]
    original = filled(shapes[size])
    levels = ["block"] * 4
    config: dict[str, object] = {"layers_per_block": 2, "down_block_types": levels, "up_block_types": levels}
    if any("label_emb" in n for n in original):
        config["addition_embed_type"] = "text_time"
    options = {"config": config} if name.startswith("convert_ldm") else {}
    given = {n: torch.from_numpy(x.copy()) for n, x in original.items()}
    converted = numbers(converter(name, constants[size])(given, **options))
    original.pop("norm_final.weight", None)  # the model does not use it, the converter drops it
    forward = pair.endswith("-diffusers")
    sides = (original, converted) if forward or pair == "vae-ldm-diffusers" else (converted, original)
    prove(tmp_path, pair, *sides)


@pytest.mark.parametrize(("experts", "width", "layers"), [(3, 32, 2), (4, 48, 3)])
def test_a_stored_layout_stacks_experts_as_transformers_does(
    tmp_path: Path, experts: int, width: int, layers: int
) -> None:
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    shapes: Shapes = {
        "model.embed_tokens.weight": (64, width),
        "lm_head.weight": (64, width),
        "model.norm.weight": (width,),
    }
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (width, width) for n in "qo"}
        shapes |= {f"{at}self_attn.{n}_proj.weight": (width // 2, width) for n in "kv"}
        shapes |= {f"{at}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
        shapes |= {at + "block_sparse_moe.gate.weight": (experts, width)}
        for e in range(experts):
            one = f"{at}block_sparse_moe.experts.{e}."
            shapes |= {f"{one}w{n}.weight": (width, 40) if n == 2 else (40, width) for n in (1, 2, 3)}
    old = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=width, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=experts, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["MixtralForCausalLM"]}))
    save(folder / "model.safetensors", old)
    (folder / "model.safetensors").write_bytes(_with_format((folder / "model.safetensors").read_bytes()))
    model = transformers.MixtralForCausalLM.from_pretrained(folder, dtype="float32")
    prove(tmp_path, "mixtral-transformers4-transformers5", old, numbers(model.state_dict()))


def _with_format(raw: bytes) -> bytes:
    """A safetensors file with the metadata that transformers asks for."""
    length = int.from_bytes(raw[:8], "little")
    head = json.dumps({"__metadata__": {"format": "pt"}, **json.loads(raw[8 : 8 + length])}).encode()
    return len(head).to_bytes(8, "little") + head + raw[8 + length :]
