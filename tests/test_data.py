import copy
import datetime
import os
import random
import subprocess
import sys

import datasets
import models
import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import default_data_collator

from hf_attribution.columns import check_same_columns, used_columns
from hf_attribution.data import Batch, Split
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.seeds import derive_seed, random_state, seeded

WORDS = ["[UNK]", "[PAD]", "[MASK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(40))]


def tokenizer():
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")),
        unk_token="[UNK]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def text_rows(lengths=(3, 9, 5, 9, 1, 7, 4, 5, 9, 2, 6)):
    generator = np.random.default_rng(0)
    ids = [generator.integers(5, 45, length).tolist() for length in lengths]
    return datasets.Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "label": [len(row) % 3 for row in ids]}
    )


def masking(**settings):
    return tf.DataCollatorForLanguageModeling(tokenizer(), mlm=True, mlm_probability=0.3, **settings)


def noisy(rows):
    """An augmentation that rarely does anything: each draw leaves most images as they are."""
    images = [np.asarray(image, dtype=np.float32) for image in rows["pixels"]]
    return {"pixel_values": [image[:, ::-1].copy() if random.random() < 0.05 else image for image in images]}


def image_rows(number=9):
    pixels = np.random.default_rng(0).random((number, 4, 4))
    return datasets.Dataset.from_dict({"pixels": pixels.tolist()})


def by_row(split):
    """What each row became: its inputs without padding."""
    found = {}
    for batch in split.batches():
        assert isinstance(batch, Batch)
        for position, index in enumerate(batch.indices.tolist()):
            assert index not in found
            row = {key: value[position] for key, value in batch.inputs.items()}
            if "attention_mask" in row:
                real = row["attention_mask"].bool()
                row = {key: value[real] if value.shape == real.shape else value for key, value in row.items()}
            found[index] = {key: value.tolist() for key, value in row.items()}
    assert sorted(found) == list(range(len(split)))
    return found


# ---------------------------------------------------------------- passes


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 11, 100])
def test_every_row_once(batch_size):
    split = Split(text_rows(), tf.DataCollatorWithPadding(tokenizer()), batch_size)
    assert len(split) == 11
    sizes = [len(batch.indices) for batch in split.batches()]
    assert sizes == [batch_size] * (11 // batch_size) + ([11 % batch_size] if 11 % batch_size else [])
    rows = by_row(split)
    for index, row in enumerate(text_rows()):
        assert rows[index]["input_ids"] == row["input_ids"]
        assert rows[index]["labels"] == row["label"]


def test_longest_first_and_stable():
    split = Split(text_rows((3, 9, 5, 9)), tf.DataCollatorWithPadding(tokenizer()), 2)
    assert [batch.indices.tolist() for batch in split.batches()] == [[1, 3], [2, 0]]
    assert [batch.inputs["input_ids"].shape[1] for batch in split.batches()] == [9, 5]
    assert [batch.indices.dtype for batch in split.batches()] == [torch.int64] * 2


@pytest.mark.parametrize("layout", ["list", "large_list", "selected", "torch", "fixed"])
def test_lengths_of_any_layout(layout):
    rows = text_rows((3, 9, 5, 9)).select_columns(["input_ids"])
    if layout == "large_list":
        rows = rows.cast(datasets.Features({"input_ids": datasets.LargeList(datasets.Value("int32"))}))
    elif layout == "selected":
        rows = rows.select([3, 2, 1, 0]).select([3, 2, 1, 0])
    elif layout == "torch":
        rows = rows.with_format("torch")
    elif layout == "fixed":
        rows = datasets.Dataset.from_dict(
            {"input_ids": [[1, 2]] * 4},
            features=datasets.Features({"input_ids": datasets.List(datasets.Value("int64"), length=2)}),
        )
    order = [
        i
        for batch in Split(rows, tf.DataCollatorWithPadding(tokenizer()), 2).batches()
        for i in batch.indices.tolist()
    ]
    assert order == ([0, 1, 2, 3] if layout == "fixed" else [1, 3, 2, 0])


def test_a_map_style_dataset_of_torch():
    class Squares(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"x": torch.tensor(float(index**2)), "labels": index % 2}

    split = Split(Squares(), default_data_collator, 2)
    assert by_row(split) == {i: {"x": float(i**2), "labels": i % 2} for i in range(5)}
    assert split.fingerprint == Split(Squares(), default_data_collator, 4).fingerprint
    assert by_row(Split(torch.utils.data.Subset(Squares(), [4, 1]), default_data_collator))[0]["x"] == 16.0


def test_the_collator_sees_what_trainer_would_show_it():
    seen = []

    def collator(rows):
        seen.append(rows)
        return default_data_collator(rows)

    list(Split(text_rows((2, 2, 2)), collator, 2).batches())
    assert all(isinstance(row, dict) for rows in seen for row in rows)
    assert max(len(rows) for rows in seen) == 2


def test_batches_move_to_a_device():
    batch = Batch(torch.tensor([0]), {"x": torch.ones(1), "names": ["a"]}).to("meta")
    assert batch.inputs["x"].device.type == "meta"
    assert batch.indices.device.type == "cpu"
    assert batch.inputs["names"] == ["a"]


@pytest.mark.parametrize("number", [1, 2, 5])
def test_probe_is_a_batch_of_two(number):
    rows = text_rows((4, 5, 6, 7, 8)[:number])
    for collator in (tf.DataCollatorWithPadding(tokenizer()), masking()):
        probe = Split(rows, collator, 4).probe()
        assert len(probe.indices) == len(probe.inputs["input_ids"]) == 2
        assert probe.indices[0] == 0


def test_the_probe_holds_the_rows_it_names():
    for lengths in ((4, 5, 6), (4, 5, 4)):
        split = Split(text_rows(lengths), masking(), 4)
        rows, probe = by_row(split), split.probe()
        for position, index in enumerate(probe.indices.tolist()):
            assert probe.inputs["input_ids"][position].tolist() == rows[index]["input_ids"]


# ---------------------------------------------------------------- random collators


def test_masking_depends_on_the_row_alone():
    rows = text_rows()
    whole = by_row(Split(rows, masking(), 100))
    for batch_size in (1, 2, 3):
        assert by_row(Split(rows, masking(), batch_size)) == whole
    split = Split(rows, masking(), 3)
    assert by_row(split) == by_row(split)
    assert any(label != -100 for row in whole.values() for label in row["labels"])
    # Rows 1, 3 and 8 are of one length, and each has a mask of its own.
    masks = [[label != -100 for label in whole[index]["labels"]] for index in (1, 3, 8)]
    assert masks[0] != masks[1] or masks[1] != masks[2]
    assert by_row(Split(rows, masking(), 3, seed=1)) != whole


def test_rows_of_one_shape_share_a_batch():
    sizes = [len(batch.indices) for batch in Split(text_rows((5, 5, 5, 3, 3)), masking(), 2).batches()]
    assert sizes == [2, 1, 2]


def test_augmentation_depends_on_the_row_alone():
    rows = image_rows()
    rows.set_transform(noisy)
    whole = by_row(Split(rows, default_data_collator, 100))
    for batch_size in (1, 2, 4):
        assert by_row(Split(rows, default_data_collator, batch_size)) == whole


@pytest.mark.parametrize("seed", range(6))
def test_rare_draws_are_noticed(seed):
    random.seed(seed)
    rows = image_rows()
    assert not Split(rows.with_transform(lambda r: {"x": r["pixels"]}), default_data_collator).draws_random_numbers
    assert Split(rows.with_transform(noisy), default_data_collator).draws_random_numbers
    assert Split(text_rows((1, 1, 1)), masking(), 2).draws_random_numbers


def test_random_state_is_left_alone():
    rows = image_rows()
    rows.set_transform(noisy)
    for split in (Split(rows, default_data_collator, 2), Split(text_rows(), masking(), 2)):
        before = random_state()
        list(split.batches())
        split.probe()
        split.fingerprint  # noqa: B018
        assert random_state() == before


def test_random_state_is_left_alone_between_batches():
    before = random_state()
    for _ in Split(text_rows(), masking(), 2).batches():
        assert random_state() == before


@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_collator_with_a_generator_of_its_own_is_refused(length):
    with pytest.raises(UnsupportedError, match="keeps a generator of its own"):
        list(Split(text_rows((length, length)), masking(seed=0), 2).batches())


def test_seeded_restores_after_an_error():
    before = random_state()

    def fail():
        with seeded(3):
            raise KeyError((torch.rand(1), np.random.rand(), random.random()))  # noqa: NPY002

    with pytest.raises(KeyError):
        fail()
    assert random_state() == before


def test_seeds_are_the_same_everywhere():
    assert derive_seed(0, "classifier.weight") == 1134864133
    assert len({derive_seed(a, b) for a in range(10) for b in range(10)}) == 100
    assert derive_seed(1, 23) != derive_seed(12, 3)


# ---------------------------------------------------------------- fingerprints


def mixed_rows():
    rows = datasets.Dataset.from_dict(
        {
            "text": [f"row {i}" if i % 3 else None for i in range(2500)],
            "input_ids": [list(range(i % 7)) for i in range(2500)],
            "flag": [i % 5 == 0 for i in range(2500)],
            "maybe": [None if i % 4 == 0 else i for i in range(2500)],
            "nested": [{"a": [float(i)], "b": None if i % 2 else str(i)} for i in range(2500)],
            "label": [i % 2 for i in range(2500)],
            "bytes": [bytes([i % 251]) * (i % 3) for i in range(2500)],
            "day": [datetime.date(2020, 1, 1 + i % 28) for i in range(2500)],
            "pixels": [[[i, 1.0], [2.0, 3.0]] for i in range(2500)],
        }
    )
    rows = rows.cast_column("pixels", datasets.Array2D((2, 2), "float32"))
    return rows.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))


def fingerprint(rows):
    return Split(rows, default_data_collator).fingerprint


def test_same_rows_have_one_fingerprint_however_they_are_stored(tmp_path):
    rows = mixed_rows()
    rows.save_to_disk(tmp_path / "rows", num_shards=3)
    odd, even = rows.select(range(1, 2500, 2)), rows.select(range(0, 2500, 2))
    back = [index for pair in zip(range(1250, 2500), range(1250), strict=True) for index in pair]
    same = {
        "concatenated": datasets.concatenate_datasets([rows.select(range(3)), rows.select(range(3, 2500))]),
        "shuffled and put back": rows.select(range(2499, -1, -1)).select(range(2499, -1, -1)),
        "interleaved": datasets.concatenate_datasets([odd, even]).select(back),
        "flattened": rows.select(range(2499, -1, -1)).flatten_indices().select(range(2499, -1, -1)).flatten_indices(),
        "saved": datasets.load_from_disk(tmp_path / "rows"),
        "formatted": rows.with_format("numpy", columns=["label"]),
        "columns reordered": rows.select_columns(sorted(rows.column_names, reverse=True)),
        "part of a longer one": datasets.concatenate_datasets([rows, rows]).select(range(2500, 5000)),
        "filtered": rows.filter(lambda row: True),
        "rebuilt": datasets.Dataset.from_list(rows.to_list(), features=rows.features),
        "in one chunk": datasets.Dataset(rows.data.table.combine_chunks()),
    }
    expected = fingerprint(rows)
    assert len(expected) == 32
    assert {name: fingerprint(other) for name, other in same.items()} == dict.fromkeys(same, expected)


def test_other_rows_have_another_fingerprint():
    rows = mixed_rows()
    changed = {
        "itself": rows,
        "a value": rows.map(lambda row, i: {"maybe": 7 if i == 1999 else row["maybe"]}, with_indices=True),
        "a null": rows.map(lambda row, i: {"maybe": None if i == 1 else row["maybe"]}, with_indices=True),
        "a flag": rows.map(lambda row, i: {"flag": not row["flag"] if i == 2499 else row["flag"]}, with_indices=True),
        "a type": rows.cast_column("maybe", datasets.Value("int32")),
        "names of classes": rows.cast_column("label", datasets.ClassLabel(names=["nein", "ja"])),
        "order": rows.select([1, 0, *range(2, 2500)]),
        "a row less": rows.select(range(2499)),
        "a row more": datasets.concatenate_datasets([rows, rows.select([0])]),
        "a column less": rows.remove_columns("flag"),
        "a column's name": rows.rename_column("flag", "flags"),
    }
    assert len({fingerprint(other) for other in changed.values()}) == len(changed)


def test_list_boundaries_count():
    def rows(ids):
        return datasets.Dataset.from_dict({"input_ids": ids})

    assert fingerprint(rows([[1, 2], [3]])) != fingerprint(rows([[1], [2, 3]]))


def test_transforms_are_hashed_by_what_they_make():
    rows = image_rows(4)
    plain = fingerprint(rows)
    doubled = fingerprint(rows.with_transform(lambda r: {"x": [2 * np.asarray(p) for p in r["pixels"]]}))
    again = fingerprint(rows.with_transform(lambda r: {"x": [np.asarray(p) + np.asarray(p) for p in r["pixels"]]}))
    assert doubled == again != plain
    torch_rows = rows.with_transform(lambda r: {"x": [torch.tensor(p, dtype=torch.bfloat16) for p in r["pixels"]]})
    assert fingerprint(torch_rows) == fingerprint(torch_rows)


def test_fingerprint_in_a_fresh_process():
    rows = {"text": ["a", None, "b"], "input_ids": [[1, 2], [], [3]], "label": [0, 1, 0]}
    program = f"""
from datasets import Dataset
from hf_attribution.data import Split
print(Split(Dataset.from_dict({rows!r}), None).fingerprint)
print(Split(Dataset.from_dict({rows!r}).with_transform(lambda rows: rows), None).fingerprint)
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    here = datasets.Dataset.from_dict(rows)
    assert found.stdout.split() == [fingerprint(here), fingerprint(here.with_transform(lambda rows: rows))]


# ---------------------------------------------------------------- columns and refusals


def test_used_columns():
    model, _ = models.make("bert")
    rows = text_rows((2, 3)).add_column("sentence", ["a", "b"]).add_column("labels", [0, 1])
    assert used_columns(rows, model).column_names == ["input_ids", "attention_mask", "label", "labels"]
    assert rows.column_names[-2:] == ["sentence", "labels"]
    assert used_columns([1, 2], model) == [1, 2]
    transformed = rows.with_transform(lambda r: r)
    assert used_columns(transformed, model) is transformed
    with pytest.raises(ValueError, match=r"None of the columns text.*BertForSequenceClassification.*tokenize"):
        used_columns(datasets.Dataset.from_dict({"text": ["a"]}), model)


def test_labels_alone_are_no_inputs():
    model, _ = models.make("bert")
    with pytest.raises(ValueError, match="preprocess the dataset first"):
        used_columns(datasets.Dataset.from_dict({"text": ["a"], "label": [0]}), model)


def test_query_columns():
    rows = text_rows((2, 3))
    check_same_columns(rows, rows.add_column("more", [0, 1]))
    check_same_columns(rows, [1])
    with pytest.raises(MismatchError, match="no column label"):
        check_same_columns(rows, rows.remove_columns("label"))


def test_datasets_that_cannot_be_indexed():
    with pytest.raises(UnsupportedError, match=r"query dataset is a IterableDataset.*Dataset.from_generator"):
        Split(text_rows().to_iterable_dataset(), default_data_collator, name="query")
    with pytest.raises(ValueError, match="The train dataset is empty"):
        Split(text_rows().select([]), default_data_collator)
    with pytest.raises(ValueError, match="batch_size"):
        Split(text_rows(), default_data_collator, 0)


def test_a_split_can_be_copied():
    split = Split(text_rows(), masking(), 3)
    assert by_row(copy.deepcopy(split)) == by_row(split)


# ---------------------------------------------------------------- budgets of tokens, and of memory


def texts_of_lengths(lengths):
    return datasets.Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})


def pad(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    return {"input_ids": torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])}


def test_a_budget_of_tokens_makes_many_short_rows_or_few_long_ones():
    lengths = [3, 50, 1, 7, 7, 2, 120, 0, 1, 5]
    split = Split(texts_of_lengths(lengths), pad, batch_tokens=24)
    batches = list(split.batches())
    assert sorted(index for batch in batches for index in batch.indices.tolist()) == list(range(10))
    for batch in batches:
        assert len(batch.indices) == 1 or batch.inputs["input_ids"].numel() <= 24
    assert [len(batch.indices) for batch in batches] == [1, 1, 3, 5]
    only = np.array(lengths) < 7
    assert [len(batch.indices) for batch in split.batches(only=only)] == [4, 2]


def test_a_budget_of_tokens_holds_for_collators_that_draw():
    def draw(rows):
        inputs = pad(rows)
        return {**inputs, "noise": torch.rand(len(rows))}

    split = Split(texts_of_lengths([4] * 7 + [2]), draw, batch_tokens=12)
    assert [len(batch.indices) for batch in split.batches()] == [3, 3, 1, 1]


def test_a_budget_of_tokens_needs_tokens():
    with pytest.raises(ValueError, match="input_ids"):
        Split(datasets.Dataset.from_dict({"x": [1.0]}), default_data_collator, batch_tokens=5)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1"):
        Split(texts_of_lengths([1]), pad, batch_tokens=0)


class Memory:
    """Computes on batches of at most `rows` rows, and counts its calls."""

    def __init__(self, rows, message="CUDA out of memory. Tried to allocate 2 GiB"):
        self.rows, self.message, self.calls = rows, message, []

    def __call__(self, batch):
        self.calls.append(len(batch.indices))
        if len(batch.indices) > self.rows:
            raise RuntimeError(self.message)
        return batch.inputs["x"] * 2


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried", "[enforce] DefaultCPUAllocator: can't allocate memory"]
)
def test_batches_are_halved_where_memory_runs_out(message):
    split = Split(
        datasets.Dataset.from_dict({"x": [float(i) for i in range(21)]}), default_data_collator, batch_size=10
    )
    memory = Memory(3, message)
    found = [torch.cat(split.in_parts(memory, batch)) for batch in split.batches()]
    assert torch.cat(found).tolist() == [2.0 * i for i in range(21)]
    # What fits is remembered, and nothing that was finished is done again.
    assert memory.calls == [10, 5, 3, 3, 3, 1, 3, 3, 3, 1, 1]


def test_a_row_that_does_not_fit_is_named_and_other_errors_are_not_hidden():
    split = Split(datasets.Dataset.from_dict({"x": [0.0, 1.0, 2.0]}), default_data_collator)
    (batch,) = split.batches()
    with pytest.raises(RuntimeError, match="train row 0 alone does not fit"):
        split.in_parts(Memory(0), batch)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        Split(split.dataset, default_data_collator).in_parts(Memory(1, "shape mismatch"), batch)
