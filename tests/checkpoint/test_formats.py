"""What every reader promises, checked on a file that the format's own library wrote."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.checkpoint.dtypes import STORAGE, decode
from lineage.checkpoint.formats import FORMATS
from lineage.errors import InputError
from tests.checkpoint.samples import WRITERS, Sample, read_everything

KINDS = [(name, writer) for name, writers in WRITERS.items() for writer in writers]


def test_every_format_of_the_table_has_a_sample() -> None:
    assert set(WRITERS) == {f.name for f in FORMATS}


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind[1].__name__)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Sample]:
    name, writer = request.param
    return name, writer(tmp_path_factory.mktemp(writer.__name__))


@pytest.fixture(scope="module")
def sample(case: tuple[str, Sample]) -> Sample:
    return case[1]


@pytest.fixture(scope="module")
def opened(sample: Sample) -> Iterator[Checkpoint]:
    with open_checkpoint(sample.path) as checkpoint:
        yield checkpoint


class TestReader:
    def test_it_says_its_format(self, case: tuple[str, Sample], opened: Checkpoint) -> None:
        assert opened.format == case[0]

    def test_it_lists_every_tensor_with_shape_and_dtype(self, sample: Sample, opened: Checkpoint) -> None:
        listed = {s.name: (s.dtype, s.shape) for s in opened}
        assert listed == {name: (sample.words[name], values.shape) for name, values in sample.values.items()}

    def test_it_reads_every_tensor_as_it_was_written(self, sample: Sample, opened: Checkpoint) -> None:
        for name, values in sample.values.items():
            np.testing.assert_array_equal(opened.tensor(name), values, err_msg=name)

    @settings(max_examples=30, deadline=None)
    @given(data=st.data())
    def test_a_range_equals_the_slice(self, sample: Sample, opened: Checkpoint, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(sample.values)))
        values = sample.values[name].reshape(-1)
        start = data.draw(st.integers(0, values.size))
        stop = data.draw(st.integers(start, values.size))
        np.testing.assert_array_equal(opened.read(name, start, stop), values[start:stop])

    def test_rows_equal_the_rows_of_the_tensor(self, sample: Sample, opened: Checkpoint) -> None:
        for name, values in sample.values.items():
            if values.ndim and len(values) > 1:
                np.testing.assert_array_equal(opened.rows(name, 1, len(values)), values[1:], err_msg=name)

    def test_codes_fill_the_buffer_that_is_given(self, sample: Sample, opened: Checkpoint) -> None:
        for spec in opened:
            if spec.plain and spec.size > 2:
                buffer = np.zeros(spec.size, STORAGE[spec.dtype])
                codes = opened.read_codes(spec.name, 1, spec.size, out=buffer)
                assert np.shares_memory(codes, buffer)
                expected = sample.values[spec.name].reshape(-1)[1:]
                np.testing.assert_array_equal(decode(codes, spec.dtype), expected, err_msg=spec.name)

    def test_values_have_the_dtype_that_the_spec_promises(self, opened: Checkpoint) -> None:
        for spec in opened:
            assert opened.read(spec.name).dtype == spec.value_dtype

    def test_threads_read_the_same(self, sample: Sample, opened: Checkpoint) -> None:
        names = sorted(sample.values) * 4
        with ThreadPoolExecutor(4) as pool:
            for name, values in zip(names, pool.map(opened.tensor, names), strict=True):
                np.testing.assert_array_equal(values, sample.values[name], err_msg=name)

    def test_a_range_outside_the_tensor_is_a_mistake_of_the_caller(self, opened: Checkpoint) -> None:
        spec = next(iter(opened))
        with pytest.raises(ValueError, match="elements"):
            opened.read(spec.name, 0, spec.size + 1)

    def test_an_unknown_name_is_a_key_error(self, opened: Checkpoint) -> None:
        with pytest.raises(KeyError):
            opened.read("nowhere")

    @pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.95, 0.999])
    def test_a_file_cut_short_is_refused_on_one_line_that_names_it(
        self, sample: Sample, tmp_path: Path, share: float
    ) -> None:
        data = sample.path.read_bytes()
        cut = tmp_path / f"cut{sample.path.suffix}"
        cut.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(InputError, match="cut") as caught:
            read_everything(cut)
        assert str(cut) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_it_is_recognised_under_another_suffix(self, sample: Sample, tmp_path: Path) -> None:
        other = tmp_path / "renamed.weights"
        shutil.copy(sample.path, other)
        assert set(open_checkpoint(other).specs) == set(sample.values)

    def test_a_file_that_shrinks_while_it_is_read_is_named(self, sample: Sample, tmp_path: Path) -> None:
        copy = tmp_path / sample.path.name
        shutil.copy(sample.path, copy)
        with open_checkpoint(copy) as checkpoint:
            with copy.open("r+b") as file:
                file.truncate(40)
            with pytest.raises(InputError, match="shrank"):
                [checkpoint.read(spec.name) for spec in checkpoint]
