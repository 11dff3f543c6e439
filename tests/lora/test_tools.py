"""Adapters extracted, merged, resized, added, checked, inspected; key maps and stand-alone converters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from lineage.checkpoint import open_checkpoint
from lineage.errors import InputError
from lineage.layout.axes import Shape
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.layout.operations import Concat, Rearrange, Split, Take
from lineage.lora.checking import check
from lineage.lora.converting import convert
from lineage.lora.emit import script
from lineage.lora.extraction import extract
from lineage.lora.inspection import inspect
from lineage.lora.keymap import key_map
from lineage.lora.merging import merge
from lineage.lora.shrink import from_matrix
from lineage.lora.sums import add, resize
from tests.lora.builders import Arrays, base, kohya_dense, mapping, peft, random, read, renaming, save


def _kohya(
    path: Path, seed: int = 0, rank: int = 4, alpha: float = 2.0, metadata: dict[str, str] | None = None
) -> Path:
    arrays: Arrays = {"lora_unet_q.lora_down.weight": random(seed, rank, 6)}
    arrays |= {
        "lora_unet_q.lora_up.weight": random(seed + 1, 8, rank),
        "lora_unet_q.alpha": np.array(alpha, np.float32),
    }
    return save(path, arrays, metadata)


def test_extracting_what_was_merged_gives_the_adapter_back(tmp_path: Path) -> None:
    model = base(tmp_path, "a", {"q.weight": (8, 6), "norm.weight": (6,)})
    merge(model, _kohya(tmp_path / "l.safetensors"), tmp_path / "m.safetensors")
    done = extract(model, open_checkpoint(tmp_path / "m.safetensors"), tmp_path / "e.safetensors", rank=4, to="kohya")
    assert done.lost < 1e-12
    assert done.equal == 1
    wanted = kohya_dense(tmp_path / "l.safetensors", "lora_unet_q")
    np.testing.assert_allclose(kohya_dense(tmp_path / "e.safetensors", "lora_unet_q"), wanted, atol=1e-5)


def test_extracting_through_a_mapping_names_the_base(tmp_path: Path) -> None:
    rules = mapping((("k.weight", "v.weight"), ("kv.weight",), (Split(0, 2),)))
    model = base(tmp_path, "a", {"kv.weight": (8, 6)})
    tuned = model.tensor("kv.weight") + random(5, 8, 2) @ random(6, 2, 6)
    save(tmp_path / "b.safetensors", {"k.weight": tuned[:4], "v.weight": tuned[4:]})
    done = extract(model, open_checkpoint(tmp_path / "b.safetensors"), tmp_path / "e", mapping=rules, rank=2)
    assert [c.tensor for c in done.tensors] == ["kv.weight"]
    assert done.lost < 1e-10


def test_a_large_matrix_is_projected_and_its_loss_measured() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((600, 4)) @ rng.standard_normal((4, 700)) + 0.01 * rng.standard_normal((600, 700))
    values = np.linalg.svd(matrix, compute_uv=False)
    _, kept, lost = from_matrix(matrix, rank=4)
    assert kept == 4
    assert lost == pytest.approx(float((values[4:] ** 2).sum() / (values**2).sum()), rel=1e-3)


@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_resizing_keeps_the_asked_share_with_the_fewest_ranks(tmp_path: Path, energy: float) -> None:
    path = _kohya(tmp_path / "l.safetensors")
    done = resize(path, tmp_path / "o.safetensors", energy=energy)
    before, after = (kohya_dense(p, "lora_unet_q") for p in (path, tmp_path / "o.safetensors"))
    (change,) = done.tensors
    lost = float(((before - after) ** 2).sum() / (before**2).sum())
    assert lost == pytest.approx(change.lost, rel=1e-4)
    assert lost <= 1 - energy
    values = np.linalg.svd(before, compute_uv=False)
    assert (values[: change.rank - 1] ** 2).sum() < energy * (values**2).sum()


def test_adding_stacks_pairs_without_loss(tmp_path: Path) -> None:
    one, two = _kohya(tmp_path / "1.safetensors"), _kohya(tmp_path / "2.safetensors", 5, 3, 1.0)
    add([one, two], tmp_path / "o.safetensors", weights=[0.5, -2.0])
    wanted = 0.5 * kohya_dense(one, "lora_unet_q") - 2 * kohya_dense(two, "lora_unet_q")
    np.testing.assert_allclose(kohya_dense(tmp_path / "o.safetensors", "lora_unet_q"), wanted, atol=1e-5)
    assert len(read(tmp_path / "o.safetensors")["lora_unet_q.lora_down.weight"]) == 7


def test_adapters_of_several_formats_add_up_on_their_base(tmp_path: Path) -> None:
    folder = peft(tmp_path / "p", {"q.lora_A.weight": random(0, 2, 6), "q.lora_B.weight": random(1, 8, 2)})
    with pytest.raises(InputError, match="formats kohya and peft; give the base with --base"):
        add([_kohya(tmp_path / "l.safetensors"), folder], tmp_path / "o.safetensors")
    add(
        [_kohya(tmp_path / "l.safetensors"), folder],
        tmp_path / "o.safetensors",
        base=base(tmp_path, "a", {"q.weight": (8, 6)}),
    )
    wanted = kohya_dense(tmp_path / "l.safetensors", "lora_unet_q") + random(1, 8, 2) @ random(0, 2, 6)
    np.testing.assert_allclose(kohya_dense(tmp_path / "o.safetensors", "lora_unet_q"), wanted, atol=1e-5)


def test_check_tells_modules_that_carry_over_from_those_that_do_not(tmp_path: Path) -> None:
    shapes: dict[str, Shape] = {"q.weight": (32, 24), "k.weight": (32, 24)}
    model = base(tmp_path, "a", shapes)
    save(
        tmp_path / "b.safetensors",
        {"q.weight": model.tensor("q.weight") * np.float32(1.01), "k.weight": random(77, 32, 24)},
    )
    arrays: Arrays = {}
    for k, n in enumerate("qk"):
        arrays |= {f"{n}.lora_A.weight": random(k, 2, 24), f"{n}.lora_B.weight": random(k + 4, 32, 2)}
    same = renaming({n: n for n in shapes})
    found = check(peft(tmp_path / "l", arrays), model, open_checkpoint(tmp_path / "b.safetensors"), same)
    answers = {m.tensor: m for m in found.modules}
    assert answers["q.weight"].answer == "carries over"
    assert answers["q.weight"].reads == pytest.approx(0.01, rel=1e-3)
    assert answers["k.weight"].answer == "does not"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {k: v * 0 for k, v in a.items()}, "every difference is zero"),
        (lambda a: {k: v for k, v in a.items() if "up" not in k}, "none of its 2 keys could be read.*missing"),
        (lambda a: a | {"lora_unet_q.alpha": np.zeros((), np.float32)}, "1 alphas are 0"),
        (lambda a: a | {"foo": np.ones(3, np.float32)}, "1 keys of no known format, such as foo"),
        (lambda a: a | {"lora_unet_k.lora_down.weight": random(3, 2, 4)}, "1 keys lack their other half"),
    ],
)
def test_inspect_names_what_ails_an_adapter(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = _kohya(tmp_path / "l.safetensors")
    save(path, change(read(path)))
    try:
        told = " ".join(inspect(path).ailments)
    except InputError as exc:
        told = str(exc)
    import re

    assert re.search(message, told)


def test_inspect_finds_the_base_that_fits_by_keys_shapes_and_hash(tmp_path: Path) -> None:
    import hashlib

    right, wrong = base(tmp_path, "a", {"q.weight": (8, 6)}), base(tmp_path, "b", {"q.weight": (8, 7)})
    digest = hashlib.sha256(Path(right.path).read_bytes()).hexdigest()
    path = _kohya(
        tmp_path / "l.safetensors", metadata={"ss_new_sd_model_hash": digest, "ss_sd_model_name": "base.ckpt"}
    )
    found = inspect(path, [right, wrong])
    assert [(f.fitting, f.hash) for f in found.fits] == [(3, True), (0, False)]
    assert "do not fit a tensor of [8, 7]" in found.fits[1].reason
    assert found.claims["ss_sd_model_name"] == "base.ckpt"
    assert found.ranks == {4: 1}
    assert inspect(path, [wrong]).ailments[0].startswith("wrong base: none of its keys fits")


def test_a_key_map_lists_keys_of_both_sides_and_the_action(tmp_path: Path) -> None:
    rules = mapping((("h.0.qk.weight",), ("layers.0.q.weight", "layers.0.k.weight"), (Concat(0),)),
                    (("h.0.o.weight",), ("layers.0.o.weight",), (Rearrange("i o -> o i"),)))  # fmt: skip
    a = base(tmp_path, "a", {f"layers.0.{n}.weight": (4, 4) for n in "qko"})
    b = base(tmp_path, "b", {"h.0.qk.weight": (8, 4), "h.0.o.weight": (4, 4)})
    found = yaml.safe_load(key_map(rules, a, b, source_format="kohya", target_format="peft", each=True).to_yaml())
    assert found["grade"] == "reshape"
    assert found["keys"][0]["from"] == ["lora_unet_layers_0_q", "lora_unet_layers_0_k"]
    assert found["keys"][0]["to"] == ["base_model.model.h.0.qk"]
    assert "block-diagonal" in found["keys"][0]["how"]
    assert found["keys"][1]["how"] == "down and up change places"


def test_the_stand_alone_script_does_what_convert_does(tmp_path: Path) -> None:
    rules = mapping(
        (("qk.weight",), ("q.weight", "k.weight"), (Concat(0), Take(0, [(8, 16, 1), (0, 8, 1)]))),
        (("o.weight",), ("out.weight",), (Rearrange("i o -> o i"),)),
    )
    shapes: dict[str, Shape] = {"q.weight": (8, 6), "k.weight": (8, 6), "out.weight": (5, 4)}
    model = base(tmp_path, "a", shapes)
    adapter = _kohya(tmp_path / "l.safetensors")
    more = {"lora_unet_out.lora_down.weight": random(7, 2, 4), "lora_unet_out.lora_up.weight": random(8, 5, 2)}
    save(adapter, read(adapter) | more)
    convert(adapter, rules, "kohya", tmp_path / "ours.safetensors", base=model)
    text = script(rules, shapes, {"qk.weight": (16, 6), "o.weight": (4, 5)}, source="kohya", to="kohya")
    (tmp_path / "convert.py").write_text(text)
    command = [sys.executable, str(tmp_path / "convert.py"), str(adapter), str(tmp_path / "theirs.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("lora_unet_qk", "lora_unet_o"):
        ours, theirs = (kohya_dense(tmp_path / f"{n}.safetensors", word) for n in ("ours", "theirs"))
        np.testing.assert_allclose(theirs, ours, atol=1e-6)


def test_a_script_is_written_only_where_one_is_possible() -> None:
    with pytest.raises(InputError, match="no format that a script can be written for"):
        script(LayoutMapping(), {}, {}, source="gguf")
    with pytest.raises(InputError, match="no matrix of B"):
        script(LayoutMapping(), {"q.weight": (2, 2)}, {}, source="kohya")


def test_merging_through_a_mapping_changes_the_other_model(tmp_path: Path) -> None:
    rules = mapping((("r.weight",), ("q.weight",), (Take(0, [(4, 8, 1), (0, 4, 1)]),)))
    other = base(tmp_path, "b", {"r.weight": (8, 6), "norm.weight": (6,)}, seed=9)
    adapter = _kohya(tmp_path / "l.safetensors")
    done = merge(other, adapter, tmp_path / "m.safetensors", mapping=rules, weight=2.0)
    change = 2 * np.roll(kohya_dense(adapter, "lora_unet_q"), 4, axis=0)
    np.testing.assert_allclose(
        read(tmp_path / "m.safetensors")["r.weight"], other.tensor("r.weight") + change, rtol=1e-4, atol=1e-4
    )
    assert (done.changed, done.tensors) == (1, 2)


def test_peft_patterns_mean_the_modules_that_peft_means(tmp_path: Path) -> None:
    arrays: Arrays = {}
    for n in ("a.q", "b.a.q"):
        arrays |= {f"{n}.lora_A.weight": random(0, 2, 6), f"{n}.lora_B.weight": random(1, 8, 2)}
    adapter = peft(tmp_path / "l", arrays, alpha_pattern={"^a.q": 6})
    names = {"a.q.weight": "a.q.weight", "b.a.q.weight": "b.a.q.weight"}
    model = base(tmp_path, "a", dict.fromkeys(names, (8, 6)))
    convert(adapter, renaming(names), "peft", tmp_path / "o", base=model)
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    scales = {m.tensor: m.scale for m in inspect(tmp_path / "o", [model]).modules}
    assert scales == {"a.q.weight": 3.0, "b.a.q.weight": 1.0}
    assert any(k.startswith(("^a", "b")) for k in config["alpha_pattern"])
