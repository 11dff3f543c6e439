"""A stored layout is tried first, kept where the weights show it, and never makes a result worse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lineage import api
from lineage.checkpoint import open_checkpoint
from lineage.filling import apply
from lineage.layout.mapping import Mapping
from lineage.match import find_mapping
from lineage.match.pairs import Pair, pairs
from lineage.match.stored import Stored, map_headers, stored
from lineage.match.values import Values
from tests.conftest import Lineage
from tests.match.models import Tensors, noisy, save
from tests.match.test_layouts import differing

#: separate q, k and v with pairs of rotated rows side by side, to fused ones with halves; gains under other names
TOY = """
lineage-mapping: 1
sizes: {two: 2}
rules:
  - {to: "net.{i}.out", from: "layers.{i}.o"}
  - {to: "net.{i}.qk", from: ["layers.{i}.q", "layers.{i}.k"], ops: [OPS{concat: 0}]}
  - {to: "net.{i}.gain", from: "layers.{i}.norm"}
  - {to: "net.{i}.experts", from: "layers.{i}.expert.{e}", ops: [{stack: {axis: 0, over: e}}]}
  - {to: head, from: top}
"""
ROTARY = '{each: {0: "(h d two) k -> (h two d) k", 1: "(h d two) k -> (h two d) k"}}, '


def toy(path: Path, ops: str = ROTARY, change: Sequence[tuple[str, str]] = ()) -> Pair:
    """The toy layout as a stored file."""
    text = TOY.replace("OPS", ops)
    for old, new in change:
        text = text.replace(old, new)
    path.write_text(text)
    return pairs([path])[0]


def separate(seed: int = 0, *, layers: int = 2, heads: int = 6, width: int = 8, rows: int = 48) -> Tensors:
    """A model in the source's layout; two heads of keys."""
    rng = np.random.default_rng(seed)
    out: Tensors = {"top": rng.standard_normal((32, rows)).astype(np.float32)}
    for i in range(layers):
        shapes = {"q": (heads * width, rows), "k": (2 * width, rows), "o": (rows, heads * width), "norm": (rows,)}
        shapes |= {f"expert.{e}": (24, rows) for e in range(3)}
        out |= {f"layers.{i}.{n}": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return out


def fused(a: Tensors, *, width: int = 8) -> Tensors:
    """The same model in the target's layout."""

    def halves(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, width // 2, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)

    out: Tensors = {"head": a["top"]}
    for i in range(sum(n.endswith(".q") for n in a)):
        at = f"layers.{i}."
        out[f"net.{i}.out"], out[f"net.{i}.gain"] = a[at + "o"], a[at + "norm"]
        out[f"net.{i}.qk"] = np.concatenate([halves(a[at + "q"]), halves(a[at + "k"])])
        out[f"net.{i}.experts"] = np.stack([a[f"{at}expert.{e}"] for e in range(3)])
    return out


def tried(tmp_path: Path, a: Tensors, b: Tensors, *known: Pair) -> Stored | None:
    """What the stored layouts give for two sets of tensors."""
    one, two = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    return stored(Values(open_checkpoint(one)), Values(open_checkpoint(two)), threads=1, known=known)


def targets(found: Stored | None) -> set[str]:
    return set() if found is None else {str(t) for c in found.certified for t in c.match.targets}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """The toy layout in the place of the installed ones."""
    pair = toy(tmp_path / "toy.yaml")
    monkeypatch.setattr("lineage.match.pairs.mapping_files", lambda folder: [pair.file])
    return pair


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("heads", "width", "layers"), [(6, 8, 2), (4, 16, 3)])
def test_one_file_serves_every_size_in_both_directions(
    tmp_path: Path, installed: Pair, turned: bool, heads: int, width: int, layers: int
) -> None:
    a = separate(layers=layers, heads=heads, width=width)
    a, b = a, fused(a, width=width)
    if turned:
        a, b = b, a
    one, two = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    mapping: Mapping = find_mapping(open_checkpoint(one), open_checkpoint(two))
    assert mapping.pair == ("toy",)
    assert all(rule.evidence and rule.evidence.certified for rule in mapping.rules)
    apply(mapping, open_checkpoint(one), str(tmp_path / "forth.safetensors"))
    apply(mapping, open_checkpoint(two), str(tmp_path / "back.safetensors"), inverse=True)
    assert differing(tmp_path / "forth.safetensors", b) == []
    assert differing(tmp_path / "back.safetensors", a) == []


@pytest.mark.parametrize("noise", [0.05, 0.5, 1.0])
def test_a_tuned_copy_is_certified_by_its_values(tmp_path: Path, noise: float) -> None:
    b = noisy(fused(separate()), noise, 1)
    matrices = {n for n, x in b.items() if x.ndim > 1}
    assert targets(tried(tmp_path, separate(), b, toy(tmp_path / "toy.yaml"))) >= matrices


def test_independent_weights_in_fitting_layouts_do_not_use_the_file(tmp_path: Path) -> None:
    assert tried(tmp_path, separate(0), fused(separate(1)), toy(tmp_path / "toy.yaml")) is None


@pytest.mark.usefixtures("installed")
def test_models_that_share_no_values_are_mapped_by_the_file_and_nothing_is_certified(tmp_path: Path) -> None:
    one = save(tmp_path / "a.safetensors", separate(0))
    two = save(tmp_path / "b.safetensors", fused(separate(1)))
    mapping = find_mapping(open_checkpoint(one), open_checkpoint(two))
    assert mapping.pair == ("toy",)
    told = {to: set(rule.source) for rule in mapping.rules for to in rule.to}
    assert told["net.{i}.experts"] == {"layers.{i}.expert.{e}"}
    assert told["head"] == {"top"}
    assert not any(rule.evidence and rule.evidence.certified for rule in mapping.rules)
    assert {rule.how for rule in mapping.rules if rule.to[0] != "net.{i}.qk"} == {"name"}


@pytest.mark.usefixtures("installed")
def test_a_file_that_speaks_of_the_lesser_part_of_a_stranger_is_not_used(tmp_path: Path) -> None:
    b = fused(separate(1)) | {"other.table": np.random.default_rng(2).standard_normal((256, 256)).astype(np.float32)}
    one, two = save(tmp_path / "a.safetensors", separate(0)), save(tmp_path / "b.safetensors", b)
    assert find_mapping(open_checkpoint(one), open_checkpoint(two)).pair == ()


def test_equal_gains_and_heads_of_strangers_do_not_bring_the_file_in(tmp_path: Path) -> None:
    a, b = separate(0), separate(1)
    b |= {n: a[n] for n in a if n.endswith("norm") or n == "top"}
    assert tried(tmp_path, a, fused(b), toy(tmp_path / "toy.yaml")) is None


def test_a_rule_that_the_values_contradict_is_left_to_the_search(tmp_path: Path, installed: Pair) -> None:
    a = separate()
    b = fused(a)
    b["net.0.out"], b["net.1.out"] = b["net.1.out"], b["net.0.out"]
    found = tried(tmp_path, a, b, installed)
    assert targets(found) == set(b) - {"net.0.out", "net.1.out"}
    mapping: Mapping = find_mapping(
        open_checkpoint(tmp_path / "a.safetensors"), open_checkpoint(tmp_path / "b.safetensors")
    )
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), str(tmp_path / "forth.safetensors"))
    assert differing(tmp_path / "forth.safetensors", b) == []


def test_a_tensor_with_half_of_its_rows_elsewhere_is_left_to_the_search(tmp_path: Path) -> None:
    a = separate()
    b = fused(a)
    b["net.0.out"] = np.concatenate([b["net.0.out"][:28], b["net.0.out"][28:][::-1]])
    assert targets(tried(tmp_path, a, b, toy(tmp_path / "toy.yaml"))) == set(b) - {"net.0.out"}


def test_gains_of_ones_follow_the_file_without_being_called_certified(tmp_path: Path, installed: Pair) -> None:
    a = separate()
    a |= {n: np.ones_like(x) for n, x in a.items() if n.endswith("norm")}
    found = tried(tmp_path, a, fused(a), installed)
    assert found is not None
    said = {c.match.targets[0]: (c.match.how, c.match.certified) for c in found.certified}
    assert said["net.0.gain"] == ("name", False)
    assert said["net.0.out"] == ("values", True)


def test_rows_that_stay_where_they_are_are_a_plain_renaming(tmp_path: Path) -> None:
    a = separate()
    b = fused(a, width=2)
    found = tried(tmp_path, a, b, toy(tmp_path / "toy.yaml"))
    assert found is not None
    assert {len(c.match.ops) for c in found.certified if c.match.targets[0] == "net.0.qk"} == {1}


def test_of_two_fitting_files_the_one_that_the_weights_show_is_used(tmp_path: Path) -> None:
    files = (toy(tmp_path / "plain.yaml", ops=""), toy(tmp_path / "rotary.yaml"))
    a = separate()
    found = tried(tmp_path, a, fused(a), *files)
    assert found is not None
    assert found.name == "rotary"


def test_of_two_files_that_hold_alike_only_what_both_say_is_used(tmp_path: Path) -> None:
    a = separate()
    a["layers.1.o"] = a["layers.0.o"]
    swapped = [('"net.{i}.out", from: "layers.{i}.o"', '"net.{i}.out", from: "layers.{1-i}.o"')]
    files = (toy(tmp_path / "one.yaml"), toy(tmp_path / "two.yaml", change=swapped))
    b = fused(a)
    assert targets(tried(tmp_path, a, b, *files)) == set(b) - {"net.0.out", "net.1.out"}


def test_names_may_stand_behind_a_prefix(tmp_path: Path) -> None:
    a = separate()
    b = {f"model.inner.{n}": x for n, x in fused(a).items()}
    assert targets(tried(tmp_path, a, b, toy(tmp_path / "toy.yaml"))) == set(b)


# -- names and shapes alone


def headers(path: Path, tensors: Tensors, tail: bytes = b"") -> Path:
    """A file that holds its header and the first bytes of its data only."""
    raw = save(path, tensors).read_bytes()
    path.write_bytes(raw[: 8 + int.from_bytes(raw[:8], "little")] + tail)
    return path


def test_headers_alone_leave_out_what_shapes_do_not_tell_and_name_the_size(tmp_path: Path) -> None:
    one, two = (save(tmp_path / f"{n}.safetensors", x) for n, x in (("a", separate()), ("b", fused(separate()))))
    found = map_headers(open_checkpoint(one), open_checkpoint(two), sizes={}, known=[toy(tmp_path / "toy.yaml")])
    assert found is not None
    assert found.open == ("d", "h")
    assert found.mapping.unmatched_target == ("net.0.qk", "net.1.qk")
    assert all(rule.how == "name" and rule.evidence and not rule.evidence.certified for rule in found.mapping.rules)


@pytest.mark.parametrize("turned", [False, True])
def test_a_map_from_headers_with_the_size_said_is_exact_on_the_weights(tmp_path: Path, turned: bool) -> None:
    a, b = separate(), fused(separate())
    if turned:
        a, b = b, a
    one, two = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    known = [toy(tmp_path / "toy.yaml")]
    found = map_headers(open_checkpoint(one), open_checkpoint(two), sizes={"d": 4}, known=known)
    assert found is not None
    assert (found.open, found.mapping.pair) == ((), ("toy",))
    apply(found.mapping, open_checkpoint(one), str(tmp_path / "forth.safetensors"))
    assert differing(tmp_path / "forth.safetensors", b) == []


def test_headers_that_a_file_fits_in_part_only_get_no_map(tmp_path: Path) -> None:
    a, b = separate(layers=3), fused(separate(layers=2))
    one, two = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    assert map_headers(open_checkpoint(one), open_checkpoint(two), sizes={}, known=[toy(tmp_path / "toy.yaml")]) is None


def test_two_files_that_fit_alike_give_only_what_both_say(tmp_path: Path) -> None:
    swapped = [('"net.{i}.out", from: "layers.{i}.o"', '"net.{i}.out", from: "layers.{1-i}.o"')]
    files = [toy(tmp_path / "one.yaml"), toy(tmp_path / "two.yaml", change=swapped)]
    one, two = (save(tmp_path / f"{n}.safetensors", x) for n, x in (("a", separate()), ("b", fused(separate()))))
    found = map_headers(open_checkpoint(one), open_checkpoint(two), sizes={"d": 4}, known=files)
    assert found is not None
    assert found.mapping.unmatched_target == ("net.0.out", "net.1.out")


def test_two_ways_to_one_tensor_that_shapes_do_not_tell_apart_give_neither(tmp_path: Path) -> None:
    plain = "  - {to: head, from: top}"
    doubled = [(plain, f'{plain}\n  - {{to: head, from: top, ops: ["(two c) k -> (c two) k"]}}')]
    known = [toy(tmp_path / "toy.yaml", change=doubled)]
    one, two = (save(tmp_path / f"{n}.safetensors", x) for n, x in (("a", separate()), ("b", fused(separate()))))
    found = map_headers(open_checkpoint(one), open_checkpoint(two), sizes={"d": 4}, known=known)
    assert found is not None
    assert found.mapping.unmatched_target == ("head",)


# -- the command


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("tail", [b"", b"\0" * 100])
def test_the_command_maps_header_only_files_and_says_that_nothing_is_verified(
    tmp_path: Path, lineage: Lineage, tail: bytes
) -> None:
    one = headers(tmp_path / "a.safetensors", separate(), tail)
    two = headers(tmp_path / "b.safetensors", fused(separate()), tail)
    ran = lineage("map", "--headers", "--size", "d=4", one, two, "-o", tmp_path / "map.yaml")
    assert ran.code == 0
    assert "from the stored layout toy alone, by names and shapes; no weight was read, nothing is verified" in ran.err
    assert "B: 9 of 9 tensors matched" in ran.err
    assert api.check_mapping(
        tmp_path / "map.yaml", save(tmp_path / "a.safetensors", separate()),
        save(tmp_path / "b.safetensors", fused(separate())),
    )  # fmt: skip


@pytest.mark.usefixtures("installed")
def test_the_command_asks_for_the_size_that_it_lacks(tmp_path: Path, lineage: Lineage) -> None:
    one, two = headers(tmp_path / "a.safetensors", separate()), headers(tmp_path / "b.safetensors", fused(separate()))
    ran = lineage("map", "--headers", one, two)
    assert ran.code == 0
    assert "shapes do not tell d or h: what needs it is left out; say it with --size d=N" in ran.err


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--headers", "--size", "dd=4"), 'the stored layout toy has no size "dd"; did you mean "d"?'),
        (("--headers", "--size", "d"), "d is no name and number such as d=128"),
        (("--size", "d=4"), "--size goes with --headers"),
        (("--headers", "--check", "map.yaml"), "--check reads weights"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_reason(
    tmp_path: Path, lineage: Lineage, words: tuple[str, ...], reason: str
) -> None:
    one, two = headers(tmp_path / "a.safetensors", separate()), headers(tmp_path / "b.safetensors", fused(separate()))
    ran = lineage("map", *words, one, two)
    assert ran.code == 2
    assert reason in " ".join(ran.err.split())


@pytest.mark.parametrize("words", [("map",), ("inspect",), ("diff",), ("investigate",)])
def test_other_commands_refuse_a_header_only_file_and_name_the_way(
    tmp_path: Path, lineage: Lineage, words: tuple[str, ...]
) -> None:
    one = headers(tmp_path / "a.safetensors", separate())
    ran = lineage(*words, *([one] if words == ("inspect",) else [one, one]))
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "it was cut short (lineage map --headers needs no more than the header)" in ran.err


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("command", ["map", "investigate"])
def test_the_commands_say_which_stored_layout_they_used(tmp_path: Path, lineage: Lineage, command: str) -> None:
    one, two = save(tmp_path / "a.safetensors", separate()), save(tmp_path / "b.safetensors", fused(separate()))
    out = tmp_path / "out"
    ran = lineage(command, one, two, "-o", out)
    assert "used the stored layout toy, certified by the weights" in ran.err
    assert "\npair: toy\n" in (out / "mapping.yaml" if command == "investigate" else out).read_text()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("command", ["map", "investigate"])
def test_the_commands_say_that_the_weights_do_not_bear_a_stored_layout_out(
    tmp_path: Path, lineage: Lineage, command: str
) -> None:
    one, two = save(tmp_path / "a.safetensors", separate(0)), save(tmp_path / "b.safetensors", fused(separate(1)))
    ran = lineage(command, one, two)
    assert "used the stored layout toy, by names and shapes; the weights share no values" in ran.err


def test_headers_that_no_stored_layout_fits_are_no_error_but_no_map(tmp_path: Path, lineage: Lineage) -> None:
    one = headers(tmp_path / "a.safetensors", separate())
    ran = lineage("map", "--headers", one, one)
    assert ran.code == 1
    assert "no stored layout fits" in ran.err


def test_a_verdict_is_the_same_with_and_without_the_stored_layout(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = api.investigate(models / "base", models / "suspect")
    rules = [r for r in plain.mapping.rules if not r.ops and len(r.to) == len(r.source) == 1]
    lines = [f'  - {{to: "{r.to[0]}", from: "{r.source[0]}"}}' for r in rules]
    file = tmp_path / "stored.yaml"
    file.write_text("\n".join(["lineage-mapping: 1", "rules:", *lines]) + "\n")
    monkeypatch.setattr("lineage.match.pairs.mapping_files", lambda folder: [file])
    again = api.investigate(models / "base", models / "suspect")
    assert (plain.mapping.pair, again.mapping.pair) == ((), ("stored",))
    assert again.verdict == plain.verdict
