"""Streams as training data: the same scores as for the same rows in a dataset, and refusals where that cannot be."""

import doctest
import itertools

import datasets
import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import IterableDataset as TorchStream
from transformers import Trainer, default_data_collator

from hf_attribution import AttributionMixin, attribute, attribute_top, self_influence, streams
from hf_attribution.data import Split
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.methods import GradCos, GradDot, Trak
from hf_attribution.seeds import seeded
from hf_attribution.store import FeatureStore
from hf_attribution.streams import StreamSplit

N = 21


class Counting(TorchStream):
    """Rows of a dataset, one after the other, and how often they were all asked for."""

    def __init__(self, rows, stop_after=None):
        self.rows, self.passes, self.stop_after = rows, 0, stop_after

    def __iter__(self):
        for number, row in enumerate(self.rows):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield row
        self.passes += 1


@pytest.fixture(scope="module")
def model():
    return tiny.model(hidden=4)


@pytest.fixture(scope="module")
def train():
    return tiny.points(N)


@pytest.fixture(scope="module")
def query():
    return tiny.points(rows=6, seed=1)


def stream_of(rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


def scores(model, train, query, method, **setup):
    return attribute(model, train, query, method=method, batch_size=4, progress=False, **setup).values


@pytest.mark.parametrize(
    "method",
    [Trak(dim=8), Trak(dim=64), GradDot(dim=8), "grad_dot", "grad_cos", "influence", "logra", "trackstar", "ekfac",
     "representation_similarity", "random"],
    ids=str,
)  # fmt: skip
def test_scores_equal_those_of_a_dataset(method, model, train, query):
    found = scores(model, stream_of(train), query, method)
    np.testing.assert_array_equal(found, scores(model, train, query, method))


@pytest.mark.parametrize("make", [datasets.Dataset.to_iterable_dataset, Counting])
def test_kinds_of_streams(make, model, train, query):
    np.testing.assert_array_equal(
        scores(model, make(train), query, "grad_dot"), scores(model, train, query, "grad_dot")
    )


def test_top_and_self_influence_equal_those_of_a_dataset(model, train, query):
    setup = {"method": Trak(dim=8), "progress": False}
    top = attribute_top(model, stream_of(train), query, k=5, **setup)
    assert top.num_examples == N
    np.testing.assert_array_equal(top.indices, attribute_top(model, train, query, k=5, **setup).indices)
    own = self_influence(model, stream_of(train), **setup)
    np.testing.assert_array_equal(own, self_influence(model, train, **setup))


def test_features_are_written_in_one_pass_and_found_again(model, train, query, tmp_path):
    stream = Counting(train)
    first = scores(model, stream, query, Trak(dim=8), cache_dir=tmp_path)
    assert stream.passes == 1
    again = Counting(train)
    np.testing.assert_array_equal(scores(model, again, query, Trak(dim=8), cache_dir=tmp_path), first)
    assert again.passes == 1  # to see that it is the same
    store = FeatureStore(next((tmp_path / "features").glob("train-*[!k]")))
    assert len(store) == N
    labels = [*train["labels"][: N - 1], 1 - train["labels"][N - 1]]
    other = train.remove_columns("labels").add_column("labels", labels)
    with pytest.raises(MismatchError, match="data: "):
        scores(model, Counting(other), query, Trak(dim=8), cache_dir=tmp_path)


def test_an_interrupted_stream_is_resumed(model, train, query, tmp_path):
    expected = scores(model, train, query, GradCos(dim=8))
    with pytest.raises(KeyboardInterrupt):
        scores(model, Counting(train, stop_after=17), query, GradCos(dim=8), cache_dir=tmp_path)
    assert list((tmp_path / "features").glob("train*.part"))
    calls = []

    def noting(rows):
        calls.append(len(rows))
        return default_data_collator(rows)

    found = scores(model, Counting(train), query, GradCos(dim=8), cache_dir=tmp_path, data_collator=noting)
    np.testing.assert_array_equal(found, expected)
    # A batch of 4 rows was missing, and one of a single row; the other batch of 4 is of queries.
    assert calls.count(4) == 2


def test_a_stream_that_changes_is_refused(model, train, query):
    class Shuffled(TorchStream):
        draws = itertools.count()

        def __iter__(self):
            return iter(train.shuffle(seed=next(self.draws)))

    with pytest.raises(MismatchError, match=r"differs from pass to pass .*21 rows, now 21.*fixed seed"):
        scores(model, Shuffled(), query, "grad_dot")

    class Shrinking(TorchStream):
        rows = itertools.chain([N, N, N], itertools.repeat(N - 1))

        def __iter__(self):
            return iter(train.select(range(next(self.rows))))

    with pytest.raises(MismatchError, match=r"21 rows, now 20"):
        scores(model, Shrinking(), query, "grad_dot")


def test_what_needs_random_access_is_refused(model, train, query):
    for method in ("label_match", "bm25", "representer", "knn_shapley"):
        with pytest.raises(UnsupportedError, match=r"reads columns of the train dataset.*Dataset.from_generator"):
            scores(model, stream_of(train), query, method)
    with pytest.raises(UnsupportedError, match=r"query dataset is a IterableDataset.*Dataset.from_generator"):
        scores(model, train, stream_of(query), "grad_dot")
    with pytest.raises(UnsupportedError, match="can be read once only"):
        scores(model, iter(train), query, "grad_dot")
    with pytest.raises(ValueError, match="train dataset is empty"):
        scores(model, stream_of([]), query, "grad_dot")
    split = StreamSplit(stream_of(train), default_data_collator, 4)
    with pytest.raises(UnsupportedError, match=r"Reading rows by their positions needs random access"):
        split.rows([15])
    with pytest.raises(UnsupportedError, match=r"Choosing rows needs random access"):
        next(split.batches(only=np.ones(N, dtype=bool)))


def test_random_collators_draw_for_a_row_what_they_draw_in_a_dataset(train):
    def noisy(rows):
        batch = default_data_collator(rows)
        return {**batch, "points": batch["points"] + torch.randn_like(batch["points"])}

    with seeded(0):
        from_stream = list(StreamSplit(stream_of(train), noisy, 4).batches())
        from_rows = list(Split(train, noisy, 4).batches())
    assert [batch.indices.tolist() for batch in from_stream] == [batch.indices.tolist() for batch in from_rows]
    for one, other in zip(from_stream, from_rows, strict=True):
        assert torch.equal(one.inputs["points"], other.inputs["points"])


def test_a_trainer_takes_a_stream(tmp_path, train):
    class MyTrainer(AttributionMixin, Trainer):
        pass

    stream = train.to_iterable_dataset()
    trainer = tiny.make_trainer(MyTrainer, tmp_path, trainer_settings={"train_dataset": stream}, max_steps=2)
    trainer.train()
    found = trainer.attribute(method=Trak(dim=8)).values
    np.testing.assert_array_equal(found, trainer.attribute(method=Trak(dim=8), train_dataset=train).values)


def test_examples_in_docstrings():
    assert doctest.testmod(streams).failed == 0
