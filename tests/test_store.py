"""The feature store: what is written comes back, whatever happens to the writer and to the disk."""

import doctest
import errno
import importlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from hf_attribution.errors import ArtefactError, MismatchError, NonFiniteError, UnsupportedError
from hf_attribution.store import FeatureStore, FeatureWriter, Manifest, shards
from hf_attribution.store.precision import STORED

DIM, N = 5, 103
SETTINGS = {"model": "m", "data": "d"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 7 * 24)


def made(rows=N, dim=DIM, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator), torch.randn(rows, generator=generator)


def begin(path, num_rows=N, dtype="float32", settings=SETTINGS, base=None, dim=DIM):
    return FeatureWriter(path, Manifest(dim, dtype, settings, num_rows), base, shard_bytes=20 * 24)


def feed(writer, features, values, order=None, step=10):
    order = np.arange(len(features)) if order is None else order
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        writer.write(rows, features[rows], values[rows])
    return writer


def write(path, features, values, order=None, **settings):
    return feed(begin(path, **settings), features, values, order).finish()


def flip_a_bit(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("module", ["reader", "writer", "shards", "precision", "manifest"])
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"hf_attribution.store.{module}")).failed == 0


class TestRoundTrip:
    @pytest.mark.parametrize("num_rows", [N, None], ids=["known length", "unknown length"])
    @pytest.mark.parametrize("dtype", STORED)
    def test_in_any_order(self, tmp_path, dtype, num_rows):
        features, values = made()
        store = write(
            tmp_path / "s", features, values, np.random.default_rng(0).permutation(N), num_rows=num_rows, dtype=dtype
        )
        assert len(store) == N
        assert len(store.manifest.shards) > 2
        np.testing.assert_array_equal(store.values, values)
        exact = {
            "float32": features,
            "float16": features.half().float(),
            "bfloat16": features.bfloat16().float(),
            "int8": features,
        }[dtype]
        atol = features.abs().amax(1, keepdim=True) / 254 * 1.001 if dtype == "int8" else torch.zeros(N, 1)
        assert ((store.read(0, N) - exact).abs() <= atol).all()
        assert not list(tmp_path.glob("s/*journal*"))

    @pytest.mark.parametrize("rows", [1, 7, 50, 1000])
    def test_blocks_take_no_notice_of_shards(self, tmp_path, rows):
        features, values = made()
        store = write(tmp_path / "s", features, values)
        blocks = list(store.blocks(rows))
        assert [len(block) for _, block in blocks[:-1]] == [rows] * (len(blocks) - 1)
        assert torch.equal(torch.cat([block for _, block in blocks]), features)
        assert all(torch.equal(block, features[where]) for where, block in blocks)

    def test_files_do_not_depend_on_the_order(self, tmp_path):
        features, values = made()
        one = write(tmp_path / "one", features, values)
        other = write(tmp_path / "other", features, values, np.random.default_rng(1).permutation(N))
        assert [file.name for file in sorted(one.path.iterdir())] == [f.name for f in sorted(other.path.iterdir())]
        for file in one.path.iterdir():
            assert file.read_bytes() == (other.path / file.name).read_bytes(), file.name

    @pytest.mark.parametrize("dtype", STORED)
    def test_is_a_memory_mapped_dataset(self, tmp_path, dtype):
        features, values = made()
        store = write(tmp_path / "s", features, values, dtype=dtype)
        rows = store.to_dataset()
        assert len(rows.cache_files) == len(store.manifest.shards)
        assert rows.features["features"] == datasets.List(datasets.Value(np.dtype(STORED[dtype]).name), length=DIM)
        found = torch.tensor(np.array(rows.with_format("numpy")["features"][:]).astype(STORED[dtype]))
        if dtype == "bfloat16":
            found = found.view(torch.bfloat16)
        if dtype == "int8":
            found = found * torch.tensor(rows["scale"][:])[:, None]
        assert torch.equal(found.float(), store.read(0, N))
        np.testing.assert_array_equal(rows["value"][:], values)
        # Nothing of ours is needed to read the folder.
        assert datasets.load_from_disk(str(store.path))[5] == rows[5]

    def test_zero_rows_and_one_column(self, tmp_path):
        store = write(tmp_path / "s", torch.zeros(3, 1), torch.zeros(3), num_rows=3, dtype="int8", dim=1)
        assert store.read(1, 3).tolist() == [[0.0], [0.0]]


class TestRange:
    def test_what_does_not_fit_is_named(self, tmp_path):
        features, values = made(4)
        features[2, 1] = 1e5
        with pytest.raises(UnsupportedError, match=r"row 2 is too large to be stored as float16: .*bfloat16"):
            write(tmp_path / "s", features, values, np.array([3, 2, 1, 0]), num_rows=4, dtype="float16")
        features[2] = 1e-9
        with pytest.raises(UnsupportedError, match=r"row 2 has entries too small to be stored as float16: .*bfloat16"):
            write(tmp_path / "t", features, values, num_rows=4, dtype="float16")
        for dtype in ("bfloat16", "int8", "float32"):
            kept = write(tmp_path / dtype, features, values, num_rows=4, dtype=dtype).read(0, 4)
            assert torch.allclose(kept[2], features[2], rtol=0.01, atol=1e-11)
        with pytest.raises(UnsupportedError, match="row 0 is too large to be stored as float32"):
            write(tmp_path / "u", features.double() * 1e300, values, num_rows=4)

    def test_nan_is_named(self, tmp_path):
        features, values = made(4)
        features[3, 0] = torch.nan
        with pytest.raises(NonFiniteError, match="row 3"):
            write(tmp_path / "s", features, values, num_rows=4)


class TestDamage:
    @pytest.mark.parametrize("shard", [0, 2])
    def test_one_flipped_bit_is_found_when_it_is_read(self, tmp_path, shard):
        features, values = made()
        store = write(tmp_path / "s", features, values)
        first, last = shard * 20, min(shard * 20 + 19, N - 1)
        file = store.path / store.manifest.shards[shard].file
        flip_a_bit(file, len(file.read_bytes()) - 100)
        store = FeatureStore(store.path)
        told = rf"damaged: {file.name} \(rows {first} to {last}\) has the checksum"
        with pytest.raises(ArtefactError, match=told):
            store.read(first, first + 1)
        with pytest.raises(ArtefactError, match=told):
            store.verify()
        with pytest.raises(ArtefactError, match=told):
            store.to_dataset()
        with pytest.raises(ArtefactError, match=told):
            list(store.blocks(10))
        other = 40 if shard == 0 else 0
        assert torch.equal(store.read(other, other + 20), features[other : other + 20])

    def test_missing_and_cut_files_are_found_at_once(self, tmp_path):
        store = write(tmp_path / "s", *made())
        file = store.path / "features-00001.arrow"
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(ArtefactError, match=rf"features-00001.arrow has {len(content) - 1} bytes"):
            FeatureStore(store.path)
        file.unlink()
        with pytest.raises(ArtefactError, match=r"features-00001.arrow is missing"):
            FeatureStore(store.path)

    def test_an_edited_manifest_is_refused(self, tmp_path):
        store = write(tmp_path / "s", *made())
        manifest = store.path / "manifest.json"
        text = manifest.read_text()
        manifest.write_text(text.replace('"num_rows": 103', '"num_rows": 102'))
        with pytest.raises(ArtefactError, match="does not match its fingerprint"):
            FeatureStore(store.path)
        manifest.write_text(text.replace('"schema_version": 1', '"schema_version": 2'))
        with pytest.raises(ArtefactError, match="schema version 2"):
            FeatureStore(store.path)
        manifest.unlink()
        with pytest.raises(ArtefactError, match="not a feature store"):
            FeatureStore(store.path)


class TestResume:
    @pytest.mark.parametrize("num_rows", [N, None], ids=["known length", "unknown length"])
    def test_from_where_it_was_left(self, tmp_path, num_rows):
        features, values = made()
        order = np.random.default_rng(0).permutation(N)
        expected = write(tmp_path / "expected", features, values, order, num_rows=num_rows)
        feed(begin(tmp_path / "s", num_rows), features, values, order[:50])
        second = begin(tmp_path / "s", num_rows)
        assert set(np.flatnonzero(second.done)) == set(order[:50])
        feed(second, features, values, order[50:])
        store = second.finish()
        for file in expected.path.iterdir():
            assert file.read_bytes() == (store.path / file.name).read_bytes(), file.name

    def test_rows_that_the_disk_lost_are_written_again(self, tmp_path):
        features, values = made()
        feed(begin(tmp_path / "s"), features, values, np.arange(15))
        # What a power failure leaves: the journal is there, some data are not, and the journal's end is torn.
        flip_a_bit(tmp_path / "s.part" / "features-00000.arrow", shards.ShardFile(
            tmp_path / "s.part" / "features-00000.arrow", DIM, "float32")._chunks[0].offsets["features"])  # fmt: skip
        with (tmp_path / "s.part" / "journal").open("ab") as file:
            file.write(b"torn")
        second = begin(tmp_path / "s")
        assert np.flatnonzero(second.done).tolist() == list(range(10, 15))
        assert torch.equal(feed(second, features, values).finish().read(0, N), features)

    def test_a_sealed_shard_that_the_disk_lost_is_written_again(self, tmp_path):
        features, values = made()
        feed(begin(tmp_path / "s"), features, values, np.arange(70))
        flip_a_bit(tmp_path / "s.part" / "features-00001.arrow", -100)
        second = begin(tmp_path / "s")
        assert 0 < np.count_nonzero(~second.done[:70]) <= 20
        assert torch.equal(feed(second, features, values).finish().read(0, N), features)

    def test_a_foreign_part_is_refused(self, tmp_path):
        feed(begin(tmp_path / "s"), *made(), np.arange(15))
        with pytest.raises(MismatchError, match="model: m there, other now"):
            begin(tmp_path / "s", settings={**SETTINGS, "model": "other"})
        with pytest.raises(MismatchError, match="dtype: float32 there, int8 now"):
            begin(tmp_path / "s", dtype="int8")

    def test_missing_rows_are_named(self, tmp_path):
        writer = feed(begin(tmp_path / "s"), *made(), np.delete(np.arange(N), 17))
        with pytest.raises(ArtefactError, match=r"1 of the 103 rows .* the first is row 17"):
            writer.finish()
        with pytest.raises(ArtefactError, match="not complete"):
            FeatureStore(tmp_path / "s.part")

    @pytest.mark.parametrize("seed", range(2))
    def test_a_killed_writer_leaves_a_store_that_resumes(self, tmp_path, seed):
        features, values = made(2000)
        expected = write(tmp_path / "expected", features, values, num_rows=2000)
        script = textwrap.dedent(
            f"""
            import sys, time
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import test_store
            from hf_attribution.store import shards
            shards.CHUNK_BYTES = 7 * 24
            features, values = test_store.made(2000)
            writer = test_store.begin(test_store.Path({str(tmp_path / "s")!r}), 2000)
            print("ready", flush=True)
            order = test_store.np.random.default_rng({seed}).permutation(2000)
            test_store.feed(writer, features, values, order, step=3)
            writer.finish()
            """
        )
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.05 + 0.1 * np.random.default_rng(seed).random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        writer = begin(tmp_path / "s", 2000)
        assert 0 < writer.done.sum() < 2000
        store = feed(writer, features, values).finish()
        for file in expected.path.iterdir():
            assert file.read_bytes() == (store.path / file.name).read_bytes(), file.name


class TestAppend:
    def test_equals_one_pass(self, tmp_path):
        features, values = made()
        base = write(tmp_path / "base", features[:60], values[:60], num_rows=60)
        before = {file.name: file.read_bytes() for file in base.path.iterdir()}
        writer = begin(tmp_path / "s", settings={**SETTINGS, "data": "more"}, base=base)
        assert np.flatnonzero(~writer.done).tolist() == list(range(60, N))
        # Rows that are there are left alone, also where a batch brings them once more with other rounding.
        store = feed(writer, features + 1e-3 * (torch.arange(N) < 60)[:, None], values).finish()
        assert torch.equal(store.read(0, N), features)
        assert all(torch.equal(block, features[where]) for where, block in store.blocks(25))
        np.testing.assert_array_equal(store.values, values)
        assert before == {file.name: file.read_bytes() for file in base.path.iterdir()}
        shared = store.path / store.manifest.shards[0].file
        assert shared.stat().st_ino == (base.path / shared.name).stat().st_ino

    def test_without_links(self, tmp_path, monkeypatch):
        def refuse(*args):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        features, values = made()
        base = write(tmp_path / "base", features[:60], values[:60], num_rows=60)
        monkeypatch.setattr(os, "link", refuse)
        assert torch.equal(feed(begin(tmp_path / "s", base=base), features, values).finish().read(0, N), features)


class TestDisk:
    def test_a_disk_that_fills_up_leaves_a_store_that_resumes(self, tmp_path, monkeypatch):
        features, values = made()
        writer = begin(tmp_path / "s")
        original, calls = shards._write_all, []

        def full(file, content):
            calls.append(len(content))
            if len(calls) > 20:
                file.write(content[:1])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(file, content)

        monkeypatch.setattr(shards, "_write_all", full)
        with pytest.raises(OSError, match=r"No space left.*Make room.*goes on from there") as caught:
            feed(writer, features, values)
        assert caught.value.errno == errno.ENOSPC
        monkeypatch.undo()
        second = begin(tmp_path / "s")
        assert 0 < second.done.sum() < N
        assert torch.equal(feed(second, features, values).finish().read(0, N), features)

    def test_a_small_disk_is_found_before_any_work(self, small_disk):
        with pytest.raises(OSError, match=r"No space left.*take 4004 bytes a row, 4.00 GB in all"):
            FeatureWriter(small_disk / "s", Manifest(1000, "float32", SETTINGS, 10**6))
        assert not list(small_disk.iterdir())
        # Where the length is not known, the disk fills up on the way.
        features, values = made(100, 1000)
        writer = FeatureWriter(small_disk / "s", Manifest(1000, "float32", SETTINGS), shard_bytes=100_000)
        with pytest.raises(OSError, match=r"No space left.*goes on from there"):
            feed(writer, features.repeat(30, 1), values.repeat(30), step=100)
        remount(small_disk, "size=32m")
        second = FeatureWriter(small_disk / "s", Manifest(1000, "float32", SETTINGS), shard_bytes=100_000)
        assert 100 <= second.done.sum() < 3000
        store = feed(second, features.repeat(30, 1), values.repeat(30), step=100).finish()
        assert torch.equal(store.read(2900, 3000), features)

    def test_a_read_only_folder(self, small_disk):
        features, values = made()
        write(small_disk / "s", features, values)
        remount(small_disk, "ro")
        store = FeatureStore(small_disk / "s")
        assert torch.equal(store.read(0, N), features)
        assert len(store.to_dataset()) == N
        with pytest.raises(OSError, match=r"Read-only file system.*another cache_dir"):
            begin(small_disk / "t")


def remount(folder, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MiB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
