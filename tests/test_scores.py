"""Scores: predictions against the plain sum, rankings against a full sort, joins, ensembles, round trips."""

import datasets
import numpy as np
import PIL.Image
import pytest

from hf_attribution.counterfactuals import Counterfactuals, Subsets
from hf_attribution.errors import ArtefactError, MismatchError, NonFiniteError
from hf_attribution.scores import Scores

DATA = {"fingerprints": {"model": "m", "train": "t", "query": "q", "task": "k"}, "seconds": 2.0}


def make_scores(shape=(3, 7), seed=0, provenance=DATA):
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return Scores(values, "trak", {"dim": 2048, "seed": seed}, provenance)


class TestConstruction:
    def test_takes_float32_without_a_copy_and_cannot_be_changed(self):
        values = np.ones((2, 3), dtype=np.float32)
        scores = Scores(values, "x")
        assert np.shares_memory(values, scores.values)
        with pytest.raises(ValueError, match="read-only"):
            scores.values[0, 0] = 2
        with pytest.raises(AttributeError):
            scores.method = "y"

    def test_converts_other_real_numbers(self):
        for dtype in (np.float64, np.float16, np.int64):
            assert Scores(np.ones((2, 3), dtype=dtype), "x").values.dtype == np.float32

    def test_refuses_what_is_no_matrix_of_numbers(self):
        for values in (np.ones(3), np.ones((1, 2, 3)), np.ones((0, 3)), np.ones((3, 0))):
            with pytest.raises(ValueError, match=r"\[queries, training examples\]"):
                Scores(values, "x")
        for values in (np.ones((2, 3), dtype=bool), np.array([["a"]]), np.ones((1, 2), dtype=complex)):
            with pytest.raises(TypeError, match="real numbers"):
                Scores(values, "x")

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
    def test_names_the_row_and_column_that_is_not_finite(self, bad):
        values = np.zeros((4, 5))
        values[2, 3] = bad
        with pytest.raises(NonFiniteError, match="query row 2 and train column 3"):
            Scores(values, "x")

    def test_settings_must_be_json(self):
        with pytest.raises(TypeError, match=r"Scores\.settings must be JSON"):
            Scores(np.ones((1, 2)), "x", {"device": object()})

    def test_later_changes_of_the_callers_dict_do_not_matter(self):
        settings = {"dims": (1, 2)}
        scores = Scores(np.ones((1, 2)), "x", settings)
        settings["dims"] = None
        assert scores.settings == {"dims": [1, 2]}

    def test_repr(self):
        assert repr(make_scores()) == "Scores(trak, 3 queries x 7 training examples)"


class TestPredict:
    # The second crosses every block boundary.
    @pytest.mark.parametrize("shape", [(3, 7, 5), (1030, 4100, 1027)])
    def test_is_the_sum_over_the_subset(self, shape):
        num_queries, num_examples, num_subsets = shape
        scores = make_scores((num_queries, num_examples))
        subsets = Subsets.random(num_examples, num_subsets)
        predictions = scores.predict(subsets)
        assert predictions.shape == (num_queries, num_subsets)
        assert predictions.dtype == np.float64
        for query, subset in [(0, 0), (num_queries - 1, num_subsets - 1), (num_queries // 2, 1)]:
            expected = scores.values[query, subsets.indices(subset)].astype(np.float64).sum()
            assert predictions[query, subset] == pytest.approx(expected, rel=1e-12)
        whole = scores.values.astype(np.float64) @ subsets.masks.T.astype(np.float64)
        np.testing.assert_allclose(predictions, whole, rtol=0, atol=1e-9)

    def test_sums_in_float64(self):
        # In float32 the ones would be lost beside the large score.
        scores = Scores(np.array([[2.0**26, 1, 1, 1, 0]]), "x")
        subsets = Subsets(np.array([[True, True, True, True, False]]))
        assert scores.predict(subsets)[0, 0] == 2.0**26 + 3

    def test_refuses_subsets_of_another_training_set(self):
        with pytest.raises(MismatchError, match=r"7 training examples .* subsets are of 8"):
            make_scores().predict(Subsets.random(8, 2))


class TestExtremes:
    @pytest.mark.parametrize("k", [1, 2, 5, 20, 99])
    def test_are_those_of_a_full_sort_with_ties_by_index(self, k):
        values = np.random.default_rng(0).integers(0, 6, size=(30, 20))  # few values: many ties
        scores = Scores(values, "x")
        for rows, sign in ((scores.top(k), 1), (scores.bottom(k), -1)):
            expected = np.argsort(-sign * values, axis=1, kind="stable")[:, :k]
            length = min(k, 20)
            assert rows["train_index"][:] == expected.reshape(-1).tolist()
            assert rows["score"][:] == np.take_along_axis(values, expected, axis=1).reshape(-1).tolist()
            assert rows["query"][:] == np.repeat(np.arange(30), length).tolist()
            assert rows["rank"][:] == list(range(1, length + 1)) * 30

    def test_the_types_of_the_columns(self):
        features = make_scores().top(2).features
        assert {name: feature.dtype for name, feature in features.items()} == {
            "query": "int64",
            "rank": "int64",
            "train_index": "int64",
            "score": "float32",
        }

    def test_join_the_training_rows(self):
        train = datasets.Dataset.from_dict({"text": list("abcdefg"), "score": range(7), "train_score": range(10, 17)})
        scores = make_scores()
        rows = scores.top(2, train.with_format("numpy"))
        assert rows.column_names[:4] == ["query", "rank", "train_index", "score"]
        assert rows.column_names[4:] == ["text", "train_train_score", "train_score"]
        for row in rows:
            index = row["train_index"]
            assert row["text"] == "abcdefg"[index]
            assert row["train_train_score"] == index
            assert row["train_score"] == index + 10
            assert row["score"] == scores.values[row["query"], index]

    def test_join_a_selected_dataset_and_keep_images(self):
        images = [PIL.Image.new("L", (4, 4), color=shade) for shade in range(10)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        train = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 5}, features=features)
        rows = make_scores().bottom(3, train.select([9, 8, 7, 6, 5, 4, 3]))
        assert rows.features["image"] == datasets.Image()
        assert rows.features["label"].names == ["a", "b"]
        for row in rows:
            assert row["image"].getpixel((0, 0)) == 9 - row["train_index"]

    def test_refuse_another_dataset_and_a_silly_k(self):
        with pytest.raises(MismatchError, match=r"7 training examples .* has 2"):
            make_scores().top(2, datasets.Dataset.from_dict({"x": [1, 2]}))
        with pytest.raises(ValueError, match="k=0"):
            make_scores().top(0)


class TestMean:
    def test_averages_values_and_records_the_members(self):
        one = make_scores(seed=1, provenance={**DATA, "used_subsets": ["a", "b"]})
        two = make_scores(seed=2, provenance={**DATA, "used_subsets": ["b", "c"], "choices": {"damping": 1.0}})
        mean = Scores.mean([one, two])
        np.testing.assert_allclose(mean.values, (one.values + two.values) / 2, rtol=1e-6)
        assert mean.method == "trak"
        assert [member["settings"]["seed"] for member in mean.settings["mean_of"]] == [1, 2]
        assert mean.settings["mean_of"][0]["fingerprint"] == one.fingerprint
        assert mean.provenance == {
            "fingerprints": DATA["fingerprints"],
            "seconds": 4.0,
            "used_subsets": ["a", "b", "c"],
            "choices": [{"damping": 1.0}],
        }
        assert Scores.mean([one, Scores(two.values, "tracin", {}, DATA)]).method == "mean"

    def test_adds_in_float64(self):
        members = [Scores(np.array([[value]]), "x") for value in (2.0**26, 1.0, 1.0, -(2.0**26))]
        assert Scores.mean(members).values[0, 0] == 0.5

    def test_of_other_data_is_refused(self):
        with pytest.raises(MismatchError, match=r"\[3, 7\] and scores 1 are \[3, 8\]"):
            Scores.mean([make_scores(), make_scores((3, 8))])
        for part in ("train", "query", "task"):
            other = {"fingerprints": {**DATA["fingerprints"], part: "other"}}
            with pytest.raises(MismatchError, match=f"'{part}'"):
                Scores.mean([make_scores(), make_scores(provenance=other)])
        with pytest.raises(ValueError, match="no scores"):
            Scores.mean([])

    def test_of_other_models_is_what_it_is_for(self):
        other = {"fingerprints": {**DATA["fingerprints"], "model": "other"}}
        mean = Scores.mean([make_scores(), make_scores(provenance=other)])
        assert mean.provenance["fingerprints"]["model"] not in ("m", "other")


class TestStorage:
    def test_save_and_load(self, tmp_path):
        scores = make_scores()
        scores.save(tmp_path / "scores.safetensors")
        loaded = Scores.load(tmp_path / "scores.safetensors")
        np.testing.assert_array_equal(loaded.values, scores.values)
        assert (loaded.method, loaded.settings, loaded.provenance) == ("trak", {"dim": 2048, "seed": 0}, DATA)
        assert loaded.fingerprint == scores.fingerprint
        assert not loaded.values.flags.writeable

    def test_refuses_another_artefact(self, tmp_path):
        subsets = Subsets.random(7, 3)
        subsets.save(tmp_path / "a")
        with pytest.raises(ArtefactError, match="holds subsets, not scores"):
            Scores.load(tmp_path / "a")
        Counterfactuals(subsets, np.ones((3, 1, 2))).save(tmp_path / "a")
        with pytest.raises(ArtefactError, match="holds counterfactuals, not scores"):
            Scores.load(tmp_path / "a")

    def test_as_a_dataset(self, tmp_path):
        scores = make_scores()
        dataset = scores.to_dataset()
        assert dataset.column_names == ["query", "scores", "metadata"]
        assert dataset[1]["scores"] == scores.values[1].tolist()
        dataset.save_to_disk(tmp_path / "folder")
        dataset.to_parquet(tmp_path / "a.parquet")
        parquet = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path))
        for restored in (dataset, datasets.load_from_disk(tmp_path / "folder"), parquet):
            assert Scores.from_dataset(restored).fingerprint == scores.fingerprint

    def test_fingerprint_is_of_all_but_the_seconds(self):
        scores = make_scores()
        values = scores.values.copy()
        values[0, 0] += 1
        same = Scores(scores.values, scores.method, scores.settings, {**DATA, "seconds": 99})
        assert same.fingerprint == scores.fingerprint
        others = [
            Scores(values, scores.method, scores.settings, DATA),
            Scores(scores.values, "other", scores.settings, DATA),
            Scores(scores.values, scores.method, {}, DATA),
            Scores(scores.values, scores.method, scores.settings, {}),
        ]
        assert len({each.fingerprint for each in [scores, *others]}) == 5
