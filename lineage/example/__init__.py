"""Small models that were really trained, made in seconds from nothing but the package: `write_example`.

The text is at hand wherever Python is: the source of its standard library.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import decode, encode
from lineage.checkpoint.files import reason
from lineage.checkpoint.write import write_safetensors
from lineage.errors import InputError

__all__ = ["WRITTEN", "write_example"]

#: what stands in the folder afterwards
WRITTEN = {
    "base": "a decoder trained from scratch",
    "suspect": "the base after more training, with other names, q/k/v and gate/up fused",
    "stranger": "the base's recipe with another seed; its card claims the base all the same",
    "lora": "a LoRA trained on the base",
}
#: matrices that the LoRA changes, its rank and alpha
_LORA, _RANK, _ALPHA = ("q_proj.weight", "v_proj.weight", "up_proj.weight", "down_proj.weight"), 4, 8
#: bytes of source that one model sees: what 200 steps can use, and a moment to read
_TEXT_BYTES = 400_000

Arrays = Mapping[str, NDArray[Any]]


def write_example(
    folder: str | Path, *, threads: int = 2, seed: int = 0, progress: Callable[[str], None] | None = None
) -> Path:
    """Trains and writes `base`, `suspect`, `stranger` and `lora` below `folder`, which must be new or empty.

    Parameters
    ----------
    threads : networks that are trained at the same time
    seed : of all the networks; the same seed gives the same weights on the same kind of machine
    progress : called with the name of each step

    Raises
    ------
    InputError : the folder holds something already or cannot be written, or Python came without its library's source
    """
    out = Path(folder)
    told = progress or (lambda step: None)
    with _new_folder(out) as part:
        library = Path(sysconfig.get_path("stdlib"))
        lessons = _text(library, "*.py"), _text(library, "email/*.py"), _text(library, "encodings/*.py")
        with _one_torch_thread(), ThreadPoolExecutor(min(threads, 2)) as pool:
            told("training base and stranger")
            base, stranger = pool.map(lambda n: _trained(lessons[0], seed=seed + n), (0, 10_000))
            told("training suspect and LoRA")
            suspect = pool.submit(_trained, lessons[1], seed=seed + 1, start=base)
            lora = pool.submit(_lora, base, lessons[2], seed=seed + 2)
            told("writing")
            _write_model(part / "base", base, "A small decoder, trained on Python's own library.")
            _write_model(part / "stranger", stranger, _CARD.format("A small decoder of its own."))
            _write_model(part / "suspect", _laid_out_anew(suspect.result()), _CARD.format("Tuned to write mail."))
            _write_lora(part / "lora", lora.result())
    return out


_CARD = "---\nbase_model: example/base\n---\n\n{}"


def _trained(text: bytes, *, seed: int, start: Arrays | None = None) -> Arrays:
    """Tensors of a network trained on the text, from scratch or from other tensors; values that BF16 holds."""
    import torch

    from lineage.example.network import Sizes, new_network, train

    network = new_network(Sizes(), seed=seed)
    if start is not None:
        with torch.no_grad():
            network.flat.copy_(torch.cat([torch.from_numpy(value).reshape(-1) for value in start.values()]))
    steps, rate = (200, 1e-2) if start is None else (60, 1e-3)
    train(Sizes(), network, text, steps=steps, rate=rate, seed=seed)
    return {name: _rounded(value.detach().numpy()) for name, value in network.tensors().items()}


def _lora(base: Arrays, text: bytes, *, seed: int) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Down and up factors by name of the matrix that they change."""
    import torch

    from lineage.example.network import Sizes, new_adapter, new_network, train

    network = new_network(Sizes(), seed=0)
    with torch.no_grad():
        network.flat.copy_(torch.cat([torch.from_numpy(value).reshape(-1) for value in base.values()]))
    adapter = new_adapter(network, _LORA, rank=_RANK, alpha=_ALPHA, seed=seed)
    train(Sizes(), network, text, steps=60, rate=5e-3, seed=seed, adapter=adapter)
    return {name: (d.detach().numpy().copy(), u.detach().numpy().copy()) for name, (d, u) in adapter.factors().items()}


def _rounded(value: NDArray[Any]) -> NDArray[Any]:
    """Values as BF16 holds them, which is what is written."""
    return decode(encode(value.reshape(-1), "BF16"), "BF16").reshape(value.shape)


def _laid_out_anew(tensors: Arrays) -> Arrays:
    """The same network under other names, with fused projections, as other libraries store it."""
    out = {"transformer.wte.weight": tensors["model.embed_tokens.weight"]}
    for i in range(sum(name.endswith("q_proj.weight") for name in tensors)):
        old, new = f"model.layers.{i}.", f"transformer.blocks.{i}."
        for name, sources in (
            ("norm_1", ["input_layernorm"]),
            ("attn.qkv_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
            ("attn.out_proj", ["self_attn.o_proj"]),
            ("norm_2", ["post_attention_layernorm"]),
            ("ffn.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
            ("ffn.down_proj", ["mlp.down_proj"]),
        ):
            out[f"{new}{name}.weight"] = np.concatenate([tensors[f"{old}{source}.weight"] for source in sources])
    out["transformer.ln_f.weight"] = tensors["model.norm.weight"]
    out["output.weight"] = tensors["lm_head.weight"]
    return out


def _write_model(folder: Path, tensors: Arrays, card: str) -> None:
    """Weights, configuration and model card."""
    from lineage.example.network import Sizes

    folder.mkdir()
    entries = [(name, "BF16", value.shape) for name, value in tensors.items()]
    write_safetensors(folder / "model.safetensors", entries, lambda name: encode(tensors[name].reshape(-1), "BF16"))
    config = {"model_type": "decoder", "dtype": "bfloat16", **Sizes()._asdict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card + "\n", encoding="utf-8")


def _write_lora(folder: Path, factors: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]) -> None:
    """The adapter as PEFT 0.18 writes it."""
    folder.mkdir()
    arrays: dict[str, NDArray[Any]] = {}
    for name, (down, up) in factors.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        arrays[f"{module}.lora_A.weight"], arrays[f"{module}.lora_B.weight"] = down, up
    entries = [(name, "F32", value.shape) for name, value in arrays.items()]
    write_safetensors(folder / "adapter_model.safetensors", entries, lambda name: arrays[name].reshape(-1))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "example/base", "bias": "none",
        "r": _RANK, "lora_alpha": _ALPHA, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "target_modules": [name.removesuffix(".weight") for name in _LORA],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _text(library: Path, pattern: str) -> bytes:
    """Source files in name order, up to `_TEXT_BYTES`."""
    held = bytearray()
    for path in sorted(library.glob(pattern)):
        held += path.read_bytes()
        if len(held) >= _TEXT_BYTES:
            break
    if len(held) < 10_000:
        raise InputError(library, "Python's library is here without its source, which the example learns from")
    return bytes(held[:_TEXT_BYTES])


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads than on one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well."""
    part = None
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(out, "is there already and not empty", "name a new folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        part.chmod(0o755)
        yield part
        part.rename(out)
    except OSError as exc:
        raise InputError(out, *reason(exc)) from exc
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
