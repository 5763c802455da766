"""Files, fingerprints and dataset rows: what is written is what is read, or an error says why not."""

import doctest
import errno
import importlib
import json
import os
import resource
import subprocess
import sys

import datasets
import numpy as np
import pytest
import safetensors.numpy

from hf_attribution import artefacts, seals
from hf_attribution.artefacts import fingerprint, first_non_finite, freeze, read_artefact, write_artefact
from hf_attribution.errors import ArtefactError, MismatchError
from hf_attribution.provenance import merge_provenance
from hf_attribution.rows import from_rows, to_rows
from hf_attribution.seals import plain_json

ARRAYS = {
    "mask": np.array([[True, False, True]]),
    "values": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "exact": np.array([1 / 3, -0.0]),
    "index": np.array([2**40, -1]),
}
METADATA = {"name": "é", "nested": {"list": [1, 2.5, None, True]}, "tiny": 1e-300}


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "result.safetensors"
    write_artefact(target, "example", ARRAYS, METADATA)
    return target


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        assert array.shape == expected[name].shape
        assert array.tobytes() == expected[name].tobytes()


@pytest.mark.parametrize(
    "module",
    ["artefacts", "counterfactuals", "provenance", "reliability", "rows", "scores", "seals", "subsets"],
)
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"hf_attribution.{module}")).failed == 0


def test_nothing_heavy_is_imported():
    code = (
        "import sys, hf_attribution.scores, hf_attribution.counterfactuals\n"
        "print([m for m in ('torch', 'datasets', 'scipy', 'pyarrow', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


class TestFingerprint:
    def test_is_the_same_in_other_processes_and_versions(self):
        # Pinned: when these change, every artefact that users have is refused.
        of_json = fingerprint("train", b"\x00", 1, {"b": 1, "a": [None, 0.5]})
        assert of_json == "8f7701a9d88369cdf4d0e266be803e9b"
        of_array = fingerprint(np.arange(6, dtype=np.float32).reshape(2, 3))
        assert of_array == "6eb3672cf84cc3d0f194968116b67bd4"

    def test_tells_different_things_apart(self):
        numbers = [(1,), (1.5,), (True,), (None,), ("1",), (b"1",), ("",), ()]
        strings = [("ab", "c"), ("a", "bc"), ("abc",), (["ab", "c"],)]
        arrays = [
            np.array(1),
            np.array([1]),
            np.array([1], dtype=np.int32),
            np.array([True]),
            np.array(["1"]),
        ]
        zeros = [np.zeros((2, 3)), np.zeros((3, 2)), np.zeros((2, 3), dtype=np.int64)]
        parts = numbers + strings + [(array,) for array in arrays + zeros]
        assert len({fingerprint(*each) for each in parts}) == len(parts)

    def test_sees_values_not_memory(self):
        array = np.arange(12.0).reshape(3, 4)
        assert fingerprint(array) == fingerprint(np.asfortranarray(array))
        assert fingerprint(array.T) == fingerprint(array.T.copy())
        assert fingerprint(array) == fingerprint(array.astype(">f8"))
        assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})

    def test_refuses_objects(self):
        with pytest.raises(TypeError, match="no fingerprint"):
            fingerprint(np.array([None]))
        with pytest.raises(TypeError, match="not JSON"):
            fingerprint(object())


class TestFile:
    def test_round_trip(self, path):
        arrays, metadata = read_artefact(path, "example")
        assert_same(arrays, ARRAYS)
        assert metadata == METADATA

    def test_is_an_ordinary_safetensors_file(self, path):
        assert_same(safetensors.numpy.load_file(path), ARRAYS)
        with safetensors.safe_open(path, framework="numpy") as file:
            header = json.loads(file.metadata()["hf_attribution"])
        assert (header["kind"], header["schema_version"]) == ("example", 1)

    def test_others_in_a_shared_folder_may_read_it(self, tmp_path):
        old = os.umask(0o022)
        try:
            write_artefact(tmp_path / "a", "example", ARRAYS, {})
        finally:
            os.umask(old)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644

    def test_transposed_and_big_endian_arrays(self, tmp_path):
        array = np.arange(6.0).reshape(2, 3).T.astype(">f8")
        write_artefact(tmp_path / "a", "example", {"x": array}, {})
        np.testing.assert_array_equal(read_artefact(tmp_path / "a", "example")[0]["x"], array)

    def test_makes_missing_parents(self, tmp_path):
        write_artefact(tmp_path / "new" / "deep" / "a", "example", ARRAYS, {})
        assert (tmp_path / "new" / "deep" / "a").is_file()

    def test_every_flipped_bit_is_noticed(self, path):
        good = path.read_bytes()
        harmless = 0
        for position in range(len(good)):
            for bit in (0, 5):
                path.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
                try:
                    arrays, metadata = read_artefact(path, "example")
                except ArtefactError:
                    continue
                assert_same(arrays, ARRAYS)  # such as \u00e9 and \u00E9: the content is the same
                assert metadata == METADATA
                harmless += 1
        assert harmless < 20

    def test_every_truncation_is_noticed(self, path):
        good = path.read_bytes()
        for length in range(len(good)):
            path.write_bytes(good[:length])
            with pytest.raises(ArtefactError, match="truncated"):
                read_artefact(path, "example")

    def test_foreign_files(self, tmp_path):
        foreign = tmp_path / "model.safetensors"
        safetensors.numpy.save_file({"x": np.zeros(2)}, foreign)
        with pytest.raises(ArtefactError, match="is no scores of hf_attribution"):
            read_artefact(foreign, "scores")
        foreign.write_text("query,train,score\n")
        with pytest.raises(ArtefactError, match="no safetensors file"):
            read_artefact(foreign, "scores")

    def test_another_kind(self, path):
        with pytest.raises(ArtefactError, match="holds example, not scores"):
            read_artefact(path, "scores")

    def test_a_newer_schema(self, tmp_path, monkeypatch):
        monkeypatch.setattr(seals, "SCHEMA_VERSION", 2)
        write_artefact(tmp_path / "a", "example", ARRAYS, {})
        monkeypatch.undo()
        with pytest.raises(ArtefactError, match=r"schema version 2 .* reads up to 1: pip install -U"):
            read_artefact(tmp_path / "a", "example")

    def test_no_file_and_a_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no scores file at"):
            read_artefact(tmp_path / "nothing", "scores")
        with pytest.raises(ArtefactError, match="is a folder"):
            read_artefact(tmp_path, "scores")
        with pytest.raises(IsADirectoryError, match="give the name of a file"):
            write_artefact(tmp_path, "scores", ARRAYS, {})


class TestFailedWrite:
    """Nothing is lost and nothing is left behind."""

    def check(self, path, expected_errno):
        before = path.read_bytes()
        with pytest.raises(OSError, match="an older file is unchanged") as caught:
            write_artefact(path, "example", {"x": np.ones(100_000)}, {})
        assert caught.value.errno == expected_errno
        assert str(path) in str(caught.value)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_the_disk_is_full(self, path):
        # A real refusal by the kernel in the middle of the file; Python ignores SIGXFSZ.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            self.check(path, errno.EFBIG)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_the_disk_is_full_at_the_end(self, path, monkeypatch):
        def no_space(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(artefacts.os, "fsync", no_space)
        self.check(path, errno.ENOSPC)

    def test_an_interrupt(self, path, monkeypatch):
        def interrupt(descriptor):
            raise KeyboardInterrupt

        monkeypatch.setattr(artefacts.os, "fsync", interrupt)
        before = path.read_bytes()
        with pytest.raises(KeyboardInterrupt):
            write_artefact(path, "example", {"x": np.ones(10)}, {})
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_the_parent_is_a_file(self, path):
        with pytest.raises(OSError, match="choose a folder that you can write to"):
            write_artefact(path / "a", "example", ARRAYS, {})

    def test_no_permission(self, path, monkeypatch):
        def refuse(self, mode):
            raise PermissionError(errno.EACCES, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr(artefacts.Path, "open", refuse)
            with pytest.raises(PermissionError, match="choose a folder that you can write to"):
                write_artefact(path, "example", ARRAYS, {})
        read_artefact(path, "example")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_an_unwritable_folder(self, path):
        path.parent.chmod(0o555)
        try:
            self.check(path, errno.EACCES)
        finally:
            path.parent.chmod(0o755)

    def test_an_unknown_dtype(self, tmp_path):
        with pytest.raises(TypeError, match="'x' is complex128"):
            write_artefact(tmp_path / "a", "example", {"x": np.zeros(2, dtype=complex)}, {})
        assert not list(tmp_path.iterdir())


class TestRows:
    COLUMNS = {  # noqa: RUF012
        "row": np.arange(5),
        "values": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32),
        "mask": np.random.default_rng(1).random((5, 9)) < 0.5,
    }

    @pytest.fixture
    def dataset(self):
        return to_rows("example", self.COLUMNS, METADATA, title="Five rows")

    def check(self, dataset):
        columns, metadata = from_rows(dataset, "example")
        assert_same(columns, self.COLUMNS)
        assert metadata == METADATA

    def test_is_what_it_looks_like(self, dataset):
        assert dataset.features["values"] == datasets.List(datasets.Value("float32"), length=3)
        assert dataset.info.description == "Five rows"
        assert dataset[2]["mask"] == self.COLUMNS["mask"][2].tolist()
        assert dataset["metadata"][1:] == [None] * 4

    def test_round_trips(self, dataset, tmp_path):
        self.check(dataset)
        dataset.save_to_disk(tmp_path / "folder", num_shards=2)
        self.check(datasets.load_from_disk(tmp_path / "folder"))
        dataset.to_parquet(tmp_path / "a.parquet", batch_size=2)
        self.check(datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path)))
        self.check(datasets.concatenate_datasets([dataset.select(range(2)), dataset.select(range(2, 5))]))

    def test_the_same_content_has_the_same_dataset_fingerprint(self, dataset):
        assert dataset._fingerprint == to_rows("example", self.COLUMNS, METADATA, "")._fingerprint

    @pytest.mark.parametrize(
        "change",
        [
            lambda dataset: dataset.select([0, 2, 1, 3, 4]),
            lambda dataset: dataset.select(range(4)),
            lambda dataset: dataset.map(lambda row: {"values": [2 * value for value in row["values"]]}),
            lambda dataset: dataset.remove_columns("mask"),
        ],
    )
    def test_changed_rows_are_refused(self, dataset, change):
        with pytest.raises(ArtefactError, match="not what was written"):
            from_rows(change(dataset), "example")

    def test_foreign_datasets_are_refused(self, dataset):
        for foreign in (dataset.remove_columns("metadata"), dataset.select(range(1, 5)), dataset.select([])):
            with pytest.raises(ArtefactError, match="metadata"):
                from_rows(foreign, "example")
        with pytest.raises(ArtefactError, match="holds example, not scores"):
            from_rows(dataset, "scores")
        with pytest.raises(TypeError, match="one split"):
            from_rows(datasets.DatasetDict(train=dataset), "example")


class TestHelpers:
    def test_freeze_copies_only_where_it_must(self):
        array = np.ones((2, 3), dtype=np.float32)
        frozen = freeze(array, np.float32)
        assert np.shares_memory(array, frozen)
        assert array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            frozen[0, 0] = 2
        assert freeze(array.T, np.float32).flags.c_contiguous
        assert freeze(np.ones(2), np.float32).dtype == np.float32

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_first_non_finite(self, bad):
        array = np.zeros((3, 4, 5), dtype=np.float32)
        assert first_non_finite(array) is None
        array[2, 1, 0] = array[1, 3, 2] = bad
        assert first_non_finite(array) == (1, 3, 2)

    def test_plain_json(self):
        value = {"a": (1, 2), "b": np.float32(0.5), 3: np.int64(4), "c": np.bool_(True)}
        assert plain_json(value, "x") == {"a": [1, 2], "b": 0.5, "3": 4, "c": True}
        for bad in ({"a": np.nan}, {"a": object()}, {"a": np.ones(2)}):
            with pytest.raises(TypeError, match=r"Scores\.settings must be JSON"):
                plain_json(bad, "Scores.settings")

    def test_merge_provenance(self):
        one = {"fingerprints": {"model": "m1", "train": "t"}, "seconds": 1.5, "used_subsets": ["a", "b"]}
        two = {"fingerprints": {"model": "m2", "train": "t"}, "seconds": 2, "used_subsets": ["b", "c"]}
        merged = merge_provenance([one, two], shared=("train",))
        assert merged["seconds"] == 3.5
        assert merged["used_subsets"] == ["a", "b", "c"]
        assert merged["fingerprints"] == {"model": fingerprint(["m1", "m2"]), "train": "t"}
        assert merge_provenance([one, one], shared=("train",))["fingerprints"] == one["fingerprints"]
        assert merge_provenance([{}, {}], shared=("train",)) == {}
        with pytest.raises(MismatchError, match="'model' is m1 in one and m2 in the other"):
            merge_provenance([one, two], shared=("model", "train"))
        with pytest.raises(MismatchError, match="'train' is t in one and None in the other"):
            merge_provenance([one, {}], shared=("train",))
