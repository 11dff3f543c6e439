"""What is found in the pickles of trainers, whatever they wrap the weights in."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.errors import InputError


def _weights() -> dict[str, torch.Tensor]:
    return {"layer.w": torch.arange(6.0).reshape(2, 3), "layer.b": torch.ones(3)}


def _open(folder: Path, value: Any, *, zipped: bool = True) -> Checkpoint:
    torch.save(value, folder / "model.pt", _use_new_zipfile_serialization=zipped)
    return open_checkpoint(folder / "model.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["state_dict", "model", "module", "ema", "params"])
def test_a_wrapped_state_dictionary_is_unwrapped_and_said_so(tmp_path: Path, key: str, zipped: bool) -> None:
    state = {key: _weights(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 3, "lr": 0.1}
    checkpoint = _open(tmp_path, state, zipped=zipped)
    assert set(checkpoint.specs) == {"layer.w", "layer.b"}
    assert checkpoint.notes == (f"the tensors stand under {key}",)
    np.testing.assert_array_equal(checkpoint.tensor("layer.w"), _weights()["layer.w"].numpy())


def test_averaged_weights_beside_the_model_are_mentioned(tmp_path: Path) -> None:
    checkpoint = _open(tmp_path, {"ema": {"w": torch.zeros(2)}, "model": {"w": torch.ones(2)}})
    assert checkpoint.tensor("w").tolist() == [1, 1]
    assert "ema in the same file holds tensors too and is not read" in checkpoint.notes


def test_nested_wrappers_and_common_prefixes_are_left_out(tmp_path: Path) -> None:
    state = {"model": {"state_dict": {f"_orig_mod.module.{k}": v for k, v in _weights().items()}}}
    checkpoint = _open(tmp_path, state)
    assert set(checkpoint.specs) == {"layer.w", "layer.b"}
    assert checkpoint.notes[0] == "the tensors stand under model.state_dict"
    assert any("_orig_mod." in note for note in checkpoint.notes)


def test_a_prefix_of_some_names_stays(tmp_path: Path) -> None:
    assert set(_open(tmp_path, {"module.w": torch.ones(1), "v": torch.ones(1)}).specs) == {"module.w", "v"}


def test_dictionaries_in_dictionaries_become_dotted_names(tmp_path: Path) -> None:
    checkpoint = _open(tmp_path, {"encoder": {"layers": [_weights(), _weights()]}, "head": {"w": torch.ones(1)}})
    assert set(checkpoint.specs) == {
        *(f"encoder.layers.{i}.layer.{k}" for i in range(2) for k in "wb"),
        "head.w",
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_pickled_module_is_read_without_its_class(tmp_path: Path, zipped: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    checkpoint = _open(tmp_path, module, zipped=zipped)
    assert set(checkpoint.specs) == set(module.state_dict())
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(checkpoint.tensor(name), value.numpy())


def test_harmless_objects_beside_the_weights_are_ignored(tmp_path: Path) -> None:
    extras = {
        "args": argparse.Namespace(rate=1, path=pathlib.PurePosixPath("/x"), at=datetime.datetime(2026, 1, 1)),
        "metric": np.float64(0.5),
        "rng": np.random.default_rng(0).bit_generator.state,
        "array": np.arange(3),
        "counts": collections.Counter("aab"),
        "shape": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "kind": torch.float16,
        "set": {1, 2},
        "complex": 1 + 2j,
        "frozen": frozenset("ab"),
        "bytes": b"abc",
        "queue": collections.deque([1]),
        "default": collections.defaultdict(list, a=[1]),
    }
    assert set(_open(tmp_path, {"state_dict": _weights(), **extras}).specs) == {"layer.w", "layer.b"}


def test_parameters_and_bare_tensors_are_read(tmp_path: Path) -> None:
    assert _open(tmp_path, {"w": torch.nn.Parameter(torch.ones(2))}).tensor("w").tolist() == [1, 1]
    assert list(_open(tmp_path, torch.ones(2)).specs) == ["tensor"]


def test_complex_numbers_are_read_as_pairs(tmp_path: Path) -> None:
    assert _open(tmp_path, {"w": torch.tensor([1 + 2j])}).tensor("w").tolist() == [[1, 2]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: torch.eye(3).to_sparse(), '"w" is a sparse tensor, which is not read'),
        (lambda: torch.eye(3).to_sparse_csr(), '"w" is a sparse tensor'),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), '"w" is a quantised tensor of torch'),
        (lambda: torch.empty(3, device="meta"), '"w" is a tensor without data'),
    ],
)
def test_a_tensor_that_is_not_plain_is_named(tmp_path: Path, make: Any, cause: str, zipped: bool) -> None:
    with pytest.raises(InputError, match=cause):
        _open(tmp_path, {"w": make()}, zipped=zipped)


def test_a_pickle_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no tensors"):
        _open(tmp_path, {"epoch": 3})


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"w": [1.0]}, 2))
    with pytest.raises(InputError, match="not one that torch wrote"):
        open_checkpoint(tmp_path / "model.pkl")


def test_dictionaries_that_hold_themselves_end(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.ones(1)}
    state["again"] = state
    with pytest.raises(InputError, match="nested too deep"):
        _open(tmp_path, state)


def test_shared_dictionaries_do_not_multiply(tmp_path: Path) -> None:
    inner: dict[str, Any] = {}
    for _ in range(39):
        inner = {"a": inner, "b": inner}
    with pytest.raises(InputError, match="nested too deep"):
        _open(tmp_path, inner)


def test_numbers_in_big_endian_order_are_refused(tmp_path: Path) -> None:
    torch.save(_weights(), tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as old, zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    with pytest.raises(InputError, match="big-endian"):
        open_checkpoint(tmp_path / "big.pt")


def test_compressed_storages_are_refused_with_a_remedy(tmp_path: Path) -> None:
    torch.save(_weights(), tmp_path / "model.pt")
    packed = zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "model.pt") as old, packed as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InputError, match="load and save it with torch"):
        open_checkpoint(tmp_path / "packed.pt")


def test_names_in_text_pickles_are_read(tmp_path: Path) -> None:
    torch.save(_weights(), tmp_path / "model.pt", pickle_protocol=4)
    assert set(open_checkpoint(tmp_path / "model.pt").specs) == {"layer.w", "layer.b"}


def test_reading_pickles_does_not_load_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    torch.save(_weights(), tmp_path / "model.pt")
    code = (
        "import sys; from lineage.checkpoint import open_checkpoint as o; "
        f"o({str(tmp_path / 'model.pt')!r}).tensor('layer.w'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
