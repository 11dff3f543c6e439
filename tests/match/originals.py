"""Names and shapes of public models in the layouts of their releases, at any size: what converters take in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lineage.layout.axes import Shape
from tests.match.models import Tensors

Shapes = dict[str, Shape]


def filled(shapes: Shapes, seed: int = 0) -> Tensors:
    """Random weights of these shapes."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def linear(name: str, out: int, width: int, *kernel: int) -> Shapes:
    """Weight and bias."""
    return {f"{name}.weight": (out, width, *kernel), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    """Gain and bias."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def flux(*, width: int, head: int, double: int, single: int, guidance: bool) -> Shapes:
    out = linear("img_in", width, 12) | linear("txt_in", width, 20) | linear("final_layer.linear", 12, width)
    out |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    for name, wide in (("time_in", 16), ("vector_in", 24), *([("guidance_in", 16)] if guidance else [])):
        out |= linear(f"{name}.in_layer", width, wide) | linear(f"{name}.out_layer", width, width)
    for i in range(double):
        for side in ("img", "txt"):
            at = f"double_blocks.{i}.{side}_"
            out |= linear(at + "mod.lin", 6 * width, width) | linear(at + "attn.qkv", 3 * width, width)
            out |= {f"{at}attn.norm.{n}_norm.scale": (head,) for n in ("query", "key")}
            out |= linear(at + "attn.proj", width, width)
            out |= linear(at + "mlp.0", 4 * width, width) | linear(at + "mlp.2", width, 4 * width)
    for i in range(single):
        at = f"single_blocks.{i}."
        out |= linear(at + "linear1", 7 * width, width) | linear(at + "linear2", width, 5 * width)
        out |= linear(at + "modulation.lin", 3 * width, width)
        out |= {f"{at}norm.{n}_norm.scale": (head,) for n in ("query", "key")}
    return out


def sd3(*, width: int, head: int, layers: int, second: int, normed: bool) -> Shapes:
    """`second` layers have a second attention; the last layer's context ends in a modulation of two parts."""
    out = {"pos_embed": (1, 9, width)} | linear("x_embedder.proj", width, 4, 2, 2)
    out |= linear("context_embedder", width, 20) | linear("final_layer.linear", 16, width)
    out |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    for name, wide in (("t_embedder", 16), ("y_embedder", 24)):
        out |= linear(f"{name}.mlp.0", width, wide) | linear(f"{name}.mlp.2", width, width)
    for i in range(layers):
        for side in ("x", "context"):
            at, last = f"joint_blocks.{i}.{side}_block.", side == "context" and i == layers - 1
            twice = side == "x" and i < second
            out |= linear(at + "adaLN_modulation.1", (2 if last else 9 if twice else 6) * width, width)
            for attention in ("attn", "attn2") if twice else ("attn",):
                out |= linear(f"{at}{attention}.qkv", 3 * width, width)
                out |= {f"{at}{attention}.ln_{n}.weight": (head,) for n in ("q", "k") if normed}
                out |= {} if last else linear(f"{at}{attention}.proj", width, width)
            if not last:
                out |= linear(at + "mlp.fc1", 4 * width, width) | linear(at + "mlp.fc2", width, 4 * width)
    return out


def wan(*, width: int, ffn: int, layers: int, image: bool, vace: int) -> Shapes:
    out = (
        linear("patch_embedding", width, 4, 1, 2, 2)
        | linear("head.head", 16, width)
        | {"head.modulation": (1, 2, width)}
    )
    out |= linear("time_embedding.0", width, 16) | linear("time_embedding.2", width, width)
    out |= linear("text_embedding.0", width, 20) | linear("text_embedding.2", width, width)
    out |= linear("time_projection.1", 6 * width, width)
    if image:
        out |= norm("img_emb.proj.0", 24) | linear("img_emb.proj.1", 24, 24)
        out |= linear("img_emb.proj.3", width, 24) | norm("img_emb.proj.4", width)
    blocks = [f"blocks.{i}." for i in range(layers)] + [f"vace_blocks.{i}." for i in range(vace)]
    for at in blocks:
        out |= {at + "modulation": (1, 6, width)} | norm(at + "norm3", width)
        for attention in ("self_attn", "cross_attn"):
            for n in "qkvo":
                out |= linear(f"{at}{attention}.{n}", width, width)
            out |= {f"{at}{attention}.norm_{n}.weight": (width,) for n in "qk"}
        if image:
            out |= linear(at + "cross_attn.k_img", width, width) | linear(at + "cross_attn.v_img", width, width)
            out |= {at + "cross_attn.norm_k_img.weight": (width,)}
        out |= linear(at + "ffn.0", ffn, width) | linear(at + "ffn.2", width, ffn)
        if at.startswith("vace"):
            out |= linear(at + "after_proj", width, width)
    if vace:
        out |= linear("vace_patch_embedding", width, 6, 1, 2, 2) | linear("vace_blocks.0.before_proj", width, width)
    return out


def _resnet(at: str, names: tuple[str, ...], given: int, made: int, shortcut: str) -> Iterator[Shapes]:
    first, conv1, second, conv2 = names
    yield norm(f"{at}.{first}", given) | linear(f"{at}.{conv1}", made, given, 3, 3)
    yield norm(f"{at}.{second}", made) | linear(f"{at}.{conv2}", made, made, 3, 3)
    if given != made:
        yield linear(f"{at}.{shortcut}", made, given, 1, 1)


def unet(*, widths: tuple[int, ...], depths: tuple[int, ...], text: int, flat: bool, added: bool) -> Shapes:
    """`depths` transformer layers a level, 0 for none; `flat` projections are linear, the others convolutions."""
    out = (
        linear("input_blocks.0.0", widths[0], 4, 3, 3) | norm("out.0", widths[0]) | linear("out.2", 4, widths[0], 3, 3)
    )
    wide = 4 * widths[0]
    out |= linear("time_embed.0", wide, widths[0]) | linear("time_embed.2", wide, wide)
    if added:
        out |= linear("label_emb.0.0", wide, 20) | linear("label_emb.0.2", wide, wide)

    def resnet(at: str, given: int, made: int) -> None:
        names = ("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3")
        for part in _resnet(at, names, given, made, "skip_connection"):
            out.update(part)
        out.update(linear(f"{at}.emb_layers.1", made, wide))

    def attention(at: str, width: int, depth: int) -> None:
        kernel = () if flat else (1, 1)
        out.update(norm(f"{at}.norm", width))
        out.update(linear(f"{at}.proj_in", width, width, *kernel) | linear(f"{at}.proj_out", width, width, *kernel))
        for k in range(depth):
            inner = f"{at}.transformer_blocks.{k}."
            for n, read in ((1, width), (2, text)):
                out.update({f"{inner}attn{n}.to_q.weight": (width, width)})
                out.update({f"{inner}attn{n}.to_{x}.weight": (width, read) for x in "kv"})
                out.update(linear(f"{inner}attn{n}.to_out.0", width, width))
            for n in (1, 2, 3):
                out.update(norm(f"{inner}norm{n}", width))
            out.update(linear(inner + "ff.net.0.proj", 8 * width, width) | linear(inner + "ff.net.2", width, 4 * width))

    block, at, skips = 1, widths[0], [widths[0]]
    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for _ in range(2):
            resnet(f"input_blocks.{block}.0", at, width)
            if depth:
                attention(f"input_blocks.{block}.1", width, depth)
            block, at = block + 1, width
            skips.append(at)
        if level < len(widths) - 1:
            out |= linear(f"input_blocks.{block}.0.op", at, at, 3, 3)
            block += 1
            skips.append(at)
    resnet("middle_block.0", at, at)
    attention("middle_block.1", at, max(1, depths[-1]))
    resnet("middle_block.2", at, at)
    block = 0
    for level, (width, depth) in reversed(list(enumerate(zip(widths, depths, strict=True)))):
        for k in range(3):
            resnet(f"output_blocks.{block}.0", at + skips.pop(), width)
            if depth:
                attention(f"output_blocks.{block}.1", width, depth)
            if level and k == 2:
                out |= linear(f"output_blocks.{block}.{2 if depth else 1}.conv", width, width, 3, 3)
            block, at = block + 1, width
    return {f"model.diffusion_model.{name}": shape for name, shape in out.items()}


def vae(*, widths: tuple[int, int, int, int], quant: bool) -> Shapes:
    """Two residual layers a level on the way down, three on the way up."""
    names = ("norm1", "conv1", "norm2", "conv2")
    out: Shapes = {}

    def middle(at: str, width: int) -> None:
        for n in range(1, 3):
            for part in _resnet(f"{at}.mid.block_{n}", names, width, width, "nin_shortcut"):
                out.update(part)
        out.update(norm(f"{at}.mid.attn_1.norm", width))
        for name in ("q", "k", "v", "proj_out"):
            out.update(linear(f"{at}.mid.attn_1.{name}", width, width, 1, 1))

    out |= linear("encoder.conv_in", widths[0], 3, 3, 3) | linear("decoder.conv_in", widths[3], 4, 3, 3)
    out |= linear("encoder.conv_out", 8, widths[3], 3, 3) | linear("decoder.conv_out", 3, widths[0], 3, 3)
    out |= norm("encoder.norm_out", widths[3]) | norm("decoder.norm_out", widths[0])
    middle("encoder", widths[3])
    middle("decoder", widths[3])
    at = widths[0]
    for level, width in enumerate(widths):
        for k in range(2):
            for part in _resnet(f"encoder.down.{level}.block.{k}", names, at, width, "nin_shortcut"):
                out.update(part)
            at = width
        out |= linear(f"encoder.down.{level}.downsample.conv", at, at, 3, 3) if level < 3 else {}
    for level in range(3, -1, -1):
        for k in range(3):
            for part in _resnet(f"decoder.up.{level}.block.{k}", names, at, widths[level], "nin_shortcut"):
                out.update(part)
            at = widths[level]
        out |= linear(f"decoder.up.{level}.upsample.conv", at, at, 3, 3) if level else {}
    out |= linear("quant_conv", 8, 8, 1, 1) | linear("post_quant_conv", 4, 4, 1, 1) if quant else {}
    return {f"first_stage_model.{name}": shape for name, shape in out.items()}


def hunyuan_video(*, width: int, head: int, double: int, single: int, refined: int, guidance: bool) -> Shapes:
    out = linear("img_in.proj", width, 4, 1, 2, 2) | linear("final_layer.linear", 16, width)
    out |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    out |= linear("vector_in.in_layer", width, 24) | linear("vector_in.out_layer", width, width)
    for name in ("time_in", "txt_in.t_embedder", *(["guidance_in"] if guidance else [])):
        out |= linear(f"{name}.mlp.0", width, 16) | linear(f"{name}.mlp.2", width, width)
    out |= linear("txt_in.input_embedder", width, 20)
    out |= linear("txt_in.c_embedder.linear_1", width, 20) | linear("txt_in.c_embedder.linear_2", width, width)
    for i in range(refined):
        at = f"txt_in.individual_token_refiner.blocks.{i}."
        out |= norm(at + "norm1", width) | norm(at + "norm2", width)
        out |= linear(at + "self_attn_qkv", 3 * width, width) | linear(at + "self_attn_proj", width, width)
        out |= linear(at + "mlp.fc1", 4 * width, width) | linear(at + "mlp.fc2", width, 4 * width)
        out |= linear(at + "adaLN_modulation.1", 2 * width, width)
    for i in range(double):
        for side in ("img", "txt"):
            at = f"double_blocks.{i}.{side}_"
            out |= linear(at + "mod.linear", 6 * width, width) | linear(at + "attn_qkv", 3 * width, width)
            out |= {f"{at}attn_{n}_norm.weight": (head,) for n in "qk"} | linear(at + "attn_proj", width, width)
            out |= linear(at + "mlp.fc1", 4 * width, width) | linear(at + "mlp.fc2", width, 4 * width)
    for i in range(single):
        at = f"single_blocks.{i}."
        out |= linear(at + "linear1", 7 * width, width) | linear(at + "linear2", width, 5 * width)
        out |= linear(at + "modulation.linear", 3 * width, width) | {f"{at}{n}_norm.weight": (head,) for n in "qk"}
    return out


def ltx_video(*, width: int, layers: int) -> Shapes:
    out = linear("patchify_proj", width, 12) | linear("proj_out", 12, width) | {"scale_shift_table": (2, width)}
    out |= linear("adaln_single.linear", 6 * width, width)
    for name, wide in (("adaln_single.emb.timestep_embedder", 16), ("caption_projection", 20)):
        out |= linear(f"{name}.linear_1", width, wide) | linear(f"{name}.linear_2", width, width)
    for i in range(layers):
        at = f"transformer_blocks.{i}."
        out |= {at + "scale_shift_table": (6, width)}
        out |= linear(at + "ff.net.0.proj", 4 * width, width) | linear(at + "ff.net.2", width, 4 * width)
        for n in (1, 2):
            out |= {f"{at}attn{n}.{x}_norm.weight": (width,) for x in "qk"}
            for x in ("to_q", "to_k", "to_v", "to_out.0"):
                out |= linear(f"{at}attn{n}.{x}", width, width)
    return {f"model.diffusion_model.{name}": shape for name, shape in out.items()}


def mochi(*, width: int, text: int, head: int, heads: int, layers: int) -> Shapes:
    inner = head * heads
    out = linear("x_embedder.proj", width, 12, 2, 2) | linear("final_layer.linear", 12, width)
    out |= linear("final_layer.mod", 2 * width, width) | {"pos_frequencies": (3, heads, head // 2)}
    out |= linear("t_embedder.mlp.0", width, 16) | linear("t_embedder.mlp.2", width, width)
    out |= linear("t5_y_embedder.to_kv", 48, 24) | linear("t5_y_embedder.to_q", 24, 24)
    out |= linear("t5_y_embedder.to_out", width, 24) | linear("t5_yproj", text, 24)
    for i in range(layers):
        at, last = f"blocks.{i}.", i == layers - 1
        out |= linear(at + "mod_x", 4 * width, width) | linear(at + "mod_y", (1 if last else 4) * text, width)
        for side, wide in (("x", width), ("y", text)):
            out |= {f"{at}attn.qkv_{side}.weight": (3 * inner, wide)}
            out |= {f"{at}attn.{n}_norm_{side}.weight": (head,) for n in "qk"}
            if side == "x" or not last:
                out |= linear(f"{at}attn.proj_{side}", wide, inner)
                out |= {f"{at}mlp_{side}.w1.weight": (6 * wide, wide), f"{at}mlp_{side}.w2.weight": (wide, 3 * wide)}
    return out


def lumina2(*, width: int, kv: int, head: int, layers: int, refined: int) -> Shapes:
    out = linear("x_embedder", width, 12) | linear("final_layer.linear", 12, width)
    out |= linear("final_layer.adaLN_modulation.1", width, 16) | {
        "cap_embedder.0.weight": (20,),
        "norm_final.weight": (width,),
    }
    out |= linear("cap_embedder.1", width, 20) | linear("t_embedder.mlp.0", 16, 8) | linear("t_embedder.mlp.2", 16, 16)
    parts = (("layers", layers), ("noise_refiner", refined), ("context_refiner", refined))
    for at in [f"{name}.{i}." for name, count in parts for i in range(count)]:
        out |= {at + "attention.qkv.weight": (width + 2 * kv, width), at + "attention.out.weight": (width, width)}
        out |= {f"{at}attention.{n}_norm.weight": (head,) for n in "qk"}
        out |= {
            f"{at}feed_forward.w{n}.weight": (width, 3 * width) if n == 2 else (3 * width, width) for n in (1, 2, 3)
        }
        out |= {f"{at}{name}{n}.weight": (width,) for n in (1, 2) for name in ("attention_norm", "ffn_norm")}
        if not at.startswith("context"):
            out |= linear(at + "adaLN_modulation.1", 4 * width, 16)
    return out
