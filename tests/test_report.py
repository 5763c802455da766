"""The page of an attribution: what is in it, what is refused, and that nothing of the data becomes markup."""

import base64
import io
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_attribution import Counterfactuals, PartScores, Scores, Subsets, write_report
from hf_attribution.data import Split
from hf_attribution.demo.models import train_tokenizer
from hf_attribution.errors import MismatchError
from hf_attribution.report.content import cut, read_items, share_of, shown_columns
from hf_attribution.report.page import script_json
from hf_attribution.report.page_data import agreement, check_datasets, page_data

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("jinja2")

FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
ATTACK = "</script><script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>&amp;\u2028"


def tiny_tokenizer():
    return train_tokenizer(["the cat sat on the mat", "a dog ran"], vocab_size=280, max_length=32)


def texts(number: int, name: str = "text") -> Dataset:
    rows = {"text": [f"{name} number {row}" for row in range(number)], "label": [row % 2 for row in range(number)]}
    return Dataset.from_dict(rows, features=FEATURES)


def random_scores(num_queries: int = 3, num_examples: int = 40) -> Scores:
    values = np.random.default_rng(0).normal(size=(num_queries, num_examples))
    return Scores(values, method="oracle", provenance={"seconds": 2.0})


def truth_of(scores: Scores, num_subsets: int = 20) -> Counterfactuals:
    subsets = Subsets.random(scores.values.shape[1], num_subsets)
    outputs = (subsets.masks @ scores.values.T)[:, None].repeat(2, axis=1)
    protocol = {"name": "resampled", "measurement": "margin"}
    return Counterfactuals(subsets, outputs, protocol, {"seconds": 40.0})


def embedded(path: Path) -> dict:
    """The data of a page, as its script reads them."""
    (text,) = re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


class TestPage:
    def test_it_holds_the_ends_of_each_query_and_the_rows_that_are_named(self, tmp_path):
        scores, train, query = random_scores(), texts(40), texts(3, "query")
        data = embedded(scores.report(tmp_path / "page.html", train, query, k=4))
        order = np.argsort(scores.values[1])
        assert [row for row, _ in data["queries"][1]["helpful"]] == order[::-1][:4].tolist()
        assert [row for row, _ in data["queries"][1]["harmful"]] == order[:4].tolist()
        assert data["queries"][1]["helpful"][0][1] == pytest.approx(float(scores.values[1].max()), rel=1e-4)
        assert data["queries"][2]["fields"] == [{"text": "query number 2"}]
        row = int(order[-1])
        assert data["examples"][str(row)] == {
            "fields": [{"text": f"text number {row}"}],
            "group": ["bad", "good"][row % 2],
        }
        assert "truth" not in data

    def test_it_says_what_retrained_models_say_or_that_there_are_none(self, tmp_path):
        pytest.importorskip("vl_convert")
        scores, train, query = random_scores(), texts(40), texts(3)
        bare = scores.report(tmp_path / "bare.html", train, query).read_text()
        assert "Not verified" in bare
        assert "vegaEmbed=" not in bare
        path = scores.report(
            tmp_path / "judged.html", train, query, counterfactuals=truth_of(scores), others={"noise": random_scores()}
        )
        data, page = embedded(path), path.read_text()
        assert "Not verified" not in page
        assert data["truth"]["lds"] == [1.0, 1.0, 1.0]
        assert np.shape(data["truth"]["predicted"]) == np.shape(data["truth"]["true"]) == (3, 20)
        assert np.allclose(data["truth"]["predicted"], data["truth"]["true"], rtol=1e-3, atol=1e-3)
        assert "oracle" in page
        assert "noise ceiling" in page

    def test_what_others_are_compared_by_is_asked_for(self, tmp_path):
        with pytest.raises(ValueError, match="counterfactuals="):
            random_scores().report(tmp_path / "p.html", texts(40), texts(3), others={"a": random_scores()})

    def test_self_influence_ranks_first(self, tmp_path):
        own = np.arange(40.0)
        path = random_scores().report(tmp_path / "p.html", texts(40), texts(3), self_influence=own)
        ranking = embedded(path)["rankings"][0]
        assert ranking["title"] == "Self-influence"
        assert [row for row, _ in ranking["rows"][:3]] == [39, 38, 37]
        with pytest.raises(MismatchError, match="self_influence has 5 values"):
            random_scores().report(tmp_path / "p.html", texts(40), texts(3), self_influence=own[:5])

    def test_many_queries_are_cut_and_it_is_said(self, tmp_path):
        path = random_scores(6).report(tmp_path / "p.html", texts(40), texts(6), max_queries=4)
        assert len(embedded(path)["queries"]) == 4
        assert "the first 4 are shown" in path.read_text()

    def test_the_same_page_is_the_same_file(self, tmp_path):
        one, two = (random_scores().report(tmp_path / name, texts(40), texts(3)) for name in ("1.html", "2.html"))
        assert one.read_bytes() == two.read_bytes()

    def test_a_failed_page_leaves_the_old_one(self, tmp_path):
        path = random_scores().report(tmp_path / "p.html", texts(40), texts(3))
        before = path.read_bytes()
        with pytest.raises(MismatchError):
            random_scores().report(path, texts(39), texts(3))
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["p.html"]
        with pytest.raises(IsADirectoryError):
            random_scores().report(tmp_path, texts(40), texts(3))

    def test_fifty_thousand_examples(self, tmp_path):
        words = " ".join(f"word{i}" for i in range(150))
        rng = np.random.default_rng(0)
        train = Dataset.from_dict({"text": [f"{row} {words}" for row in range(50_000)]})
        scores = Scores(rng.standard_normal((200, 50_000), dtype=np.float32), method="random")
        started = time.process_time()
        path = scores.report(tmp_path / "p.html", train, train.select(range(200)))
        assert time.process_time() - started < 30
        assert path.stat().st_size < 10e6
        assert len(embedded(path)["queries"]) == 200


class TestRefusals:
    def test_datasets_of_another_length(self):
        with pytest.raises(MismatchError, match="40 train rows and the train dataset has 39"):
            check_datasets(random_scores(), texts(39), texts(3))
        with pytest.raises(MismatchError, match="3 query rows"):
            check_datasets(random_scores(), texts(40), texts(4))

    def test_datasets_with_other_rows(self):
        train, query = (Dataset.from_dict({"x": list(range(n)), "text": ["a"] * n}) for n in (40, 3))
        prints = {
            name: Split(dataset.select_columns(["x"]), lambda rows: {}, name=name).fingerprint
            for name, dataset in (("train", train), ("query", query))
        }
        provenance = {"fingerprints": prints, "columns": {"train": ["x"], "query": ["x"]}}
        scores = Scores(random_scores().values, "oracle", provenance=provenance)
        assert check_datasets(scores, train, query).checked == {"train": True, "query": True}
        with pytest.raises(MismatchError, match="not the one that was attributed"):
            check_datasets(scores, train.select(range(39, -1, -1)), query)
        # A dataset of the texts alone: its length is all that can be compared, and the page says so.
        assert not check_datasets(scores, train.remove_columns("x"), query).checked["train"]

    def test_what_is_no_dataset_or_column(self):
        with pytest.raises(TypeError, match="shows a datasets"):
            check_datasets(random_scores(), [{}] * 40, texts(3))
        with pytest.raises(ValueError, match="no column 'body'"):
            check_datasets(random_scores(), texts(40), texts(3), columns=["body"])
        with pytest.raises(ValueError, match="no column 'author'"):
            check_datasets(random_scores(), texts(40), texts(3), group_column="author")
        with pytest.raises(ValueError, match="at least one"):
            write_report(random_scores(), "p.html", texts(40), texts(3), k=0)

    def test_other_scores_of_another_shape(self, tmp_path):
        scores = random_scores()
        with pytest.raises(MismatchError, match="others"):
            scores.report(tmp_path / "p.html", texts(40), texts(3), counterfactuals=truth_of(scores),
                          others={"few": random_scores(2)})  # fmt: skip


class TestEscaping:
    def test_script_json_can_be_read_and_holds_no_markup(self):
        data = {"text": ATTACK, ATTACK: "\u2029 \ud800 \x00"}
        text = script_json(data)
        assert not set("<>&\u2028\u2029") & set(text)
        assert json.loads(text) == {"text": ATTACK, ATTACK: "\u2029 \ufffd \x00"}

    def test_hostile_data_stays_data(self, tmp_path):
        features = Features({ATTACK: Value("string"), "label": ClassLabel(names=[ATTACK, "b"])})
        rows = {ATTACK: [ATTACK] * 40, "label": [0, 1] * 20}
        train = Dataset.from_dict(rows, features=features)
        scores = Scores(random_scores().values, ATTACK, {ATTACK: ATTACK}, {ATTACK: [ATTACK]})
        path = scores.report(tmp_path / "p.html", train, train.select(range(3)), title=ATTACK, columns=[ATTACK])
        page = path.read_text()
        assert len(re.findall(r"<script", page)) == 2  # the data and our own
        assert "<img src" not in page.split("<script")[0]
        assert embedded(path)["queries"][0]["fields"][0]["text"] == ATTACK

    def test_the_policy_lets_our_scripts_and_nothing_else_run(self, tmp_path):
        import hashlib

        page = random_scores().report(tmp_path / "p.html", texts(40), texts(3)).read_text()
        (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
        policy = policy.replace("&#39;", "'").replace("&#43;", "+")
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}';" in policy
        assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)


class TestContent:
    def test_long_text_is_cut_and_says_so(self):
        dataset = Dataset.from_dict({"text": ["x" * 10_000_000, "short", "", None]})
        items = dict(read_items(dataset, range(4), ["text"], None, share_of(10)))
        assert items[0]["fields"] == [{"text": "x" * 20_000, "cut": 10_000_000}]
        assert items[1]["fields"] == [{"text": "short"}]
        assert [items[row]["fields"][0]["note"] for row in (2, 3)] == ["empty text", "empty"]

    @pytest.mark.parametrize("text", ["é" * 500, "漢字" * 300, "👩‍👩‍👧" * 100, "\u202eabc" * 200, "\x00\x1b" * 400])
    def test_odd_unicode_is_cut_between_characters(self, text):
        field = cut(text, 301)
        assert text.startswith(field["text"])
        assert 290 < len(field["text"].encode()) <= 301
        assert field["cut"] == len(text)

    def test_images(self):
        def encoded(image, kind="PNG"):
            buffer = io.BytesIO()
            image.save(buffer, kind)
            return {"bytes": buffer.getvalue(), "path": None}

        pictures = [
            encoded(PIL.fromarray(np.zeros((28, 28), np.uint8))),
            encoded(PIL.fromarray(np.zeros((600, 300, 3), np.uint8)), "JPEG"),
            encoded(PIL.fromarray(np.linspace(0, 60_000, 100).reshape(10, 10).astype(np.uint16))),
            encoded(PIL.new("CMYK", (100, 100)), "JPEG"),
            None,
            {"bytes": b"no image", "path": None},
            {"bytes": None, "path": "/nowhere/a.png"},
        ]
        dataset = Dataset.from_dict({"image": pictures}, features=Features({"image": Image()}))
        assert shown_columns(dataset, None, None) == ["image"]
        items = dict(read_items(dataset, range(7), ["image"], None, share_of(10)))
        fields = [items[row]["fields"][0] for row in range(7)]
        assert fields[0]["image"].startswith("data:image/png;base64,")
        assert (fields[0]["width"], fields[0]["height"]) == (28, 28)
        assert fields[1]["image"].startswith("data:image/webp;base64,")
        assert max(fields[1]["width"], fields[1]["height"]) <= 256
        decoded = PIL.open(io.BytesIO(base64.b64decode(fields[2]["image"].split(",")[1])))
        assert decoded.getextrema() == (0, 255)
        assert "image" in fields[3]
        assert fields[4] == {"note": "no image"}
        assert all("cannot be read" in field["note"] for field in fields[5:])

    def test_columns_are_chosen(self):
        rows = {"id": ["a"], "premise": ["b"], "hypothesis": ["c"], "label": [0]}
        assert shown_columns(Dataset.from_dict(rows), None, "label") == ["premise", "hypothesis"]
        assert shown_columns(Dataset.from_dict({"x": [0.5], "label": [0], "ids": [[1]]}), None, "label") == ["x"]
        assert shown_columns(Dataset.from_dict(rows), ["id"], "label") == ["id"]

    def test_rows_without_anything_to_show_say_so(self, tmp_path):
        train = Dataset.from_dict({"input_ids": [[1]] * 40})
        path = random_scores().report(tmp_path / "p.html", train, train.select(range(3)))
        assert "columns=" in embedded(path)["queries"][0]["fields"][0]["note"]

    def test_agreement(self):
        train, query = texts(40), texts(2)
        values = np.where(np.array(train["label"])[None] == np.array(query["label"])[:, None], 1.0, -1.0)
        scores = Scores(values, "label_match")
        found = agreement(scores, check_datasets(scores, train, query), k=5)
        assert found == {"helpful": 1.0, "harmful": 0.0, "chance": 0.5}


class TestTokens:
    def rows(self, sentences):
        tokenizer = tiny_tokenizer()
        dataset = Dataset.from_dict({"text": sentences})
        return tokenizer, dataset.map(lambda row: dict(tokenizer(row["text"])))

    def test_pieces_make_up_the_text_and_have_their_tokens_scores(self):
        tokenizer, train = self.rows(["the cat sat", "a dog  ran!"] * 2)
        lengths = [len(ids) for ids in train["input_ids"]]
        examples = np.repeat(np.arange(4), [length + 1 for length in lengths])
        positions = np.concatenate([[-1, *range(length)] for length in lengths])
        values = np.random.default_rng(0).normal(size=(2, len(examples)))
        parts = PartScores(values, examples, positions, "token")
        scores = parts.sum()
        data = page_data(scores, check_datasets(scores, train, train.select(range(2)), ["text"]), k=4, max_queries=9,
                         tokens=parts, tokenizer=tokenizer)  # fmt: skip
        for row, sentence in enumerate(train["text"]):
            (field,) = data["examples"][row]["fields"]
            assert "".join(field["pieces"]) == sentence
            named = [position for position in field["tokens"] if position >= 0]
            assert named == sorted(set(named))
            colours = data["queries"][1]["colours"][row]
            levels = np.frombuffer(base64.b64decode(colours["values"]), np.int8)
            of = parts.of(1, row)
            expected = [of[position] for position in range(lengths[row])]
            assert np.allclose(levels / 127 * colours["scale"], expected, atol=colours["scale"] / 200)
            assert colours["rest"] == pytest.approx(of[-1], rel=1e-3)

    def test_what_the_tokenizer_would_not_make_is_shown_as_tokens(self):
        tokenizer, train = self.rows(["the cat sat"] * 2)
        joined = Dataset.from_dict({"text": ["something else"] * 2, "input_ids": train["input_ids"][:]})
        parts = PartScores(np.ones((2, 2)), np.arange(2), np.zeros(2, int), "token")
        scores = parts.sum()
        data = page_data(scores, check_datasets(scores, joined, joined, ["text"]), k=1, max_queries=2, tokens=parts,
                         tokenizer=tokenizer)  # fmt: skip
        shown = "".join(data["examples"][0]["fields"][0]["pieces"]).split()
        assert shown == tokenizer.convert_ids_to_tokens(train["input_ids"][0])

    def test_what_does_not_fit_is_refused(self, tmp_path):
        scores, train, query = random_scores(), texts(40), texts(3)
        modules = PartScores(scores.values, np.arange(40), np.zeros(40, int), "module", ("a",))
        with pytest.raises(ValueError, match="scores of modules"):
            scores.report(tmp_path / "p.html", train, query, tokens=modules, tokenizer=tiny_tokenizer())
        tokens = PartScores(scores.values[:2], np.arange(40), np.zeros(40, int), "token")
        with pytest.raises(ValueError, match="tokenizer="):
            scores.report(tmp_path / "p.html", train, query, tokens=tokens)
        with pytest.raises(MismatchError, match="tokens="):
            scores.report(tmp_path / "p.html", train, query, tokens=tokens, tokenizer=tiny_tokenizer())
