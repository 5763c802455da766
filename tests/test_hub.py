"""The Hub, over HTTP: pushing, pushing again, failures on the way, cards, and reading back.

`HF_ENDPOINT` is read when `huggingface_hub` is imported, so that everything here runs in processes of its own.
"""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import yaml
from hub_server import Hub, environment

from hf_attribution import Scores

WORKER = """
import contextlib, io, json, sys, traceback
from hf_attribution import *
from hf_attribution.subsets import Subsets
import datasets, numpy as np
datasets.disable_progress_bars()
names = dict(globals())
for line in sys.stdin:
    printed, answer = io.StringIO(), {}
    try:
        with contextlib.redirect_stdout(printed):
            exec(json.loads(line), names)
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    print(json.dumps({**answer, "printed": printed.getvalue()}), flush=True)
"""


class Client:
    """A process in which code runs, with the Hub of the tests as its Hub."""

    def __init__(self, url, folder, token="hf_writer"):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], env=environment(url, folder, token), cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, code):
        self.process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else None  # None: it died

    def run(self, code):
        """What the code prints."""
        answer = self.ask(code)
        assert "error" not in answer, answer["traceback"]
        return answer["printed"].strip()

    def fails(self, code):
        """The error of code that fails."""
        answer = self.ask(code)
        assert "error" in answer, f"nothing failed; it printed {answer['printed']!r}"
        return answer["error"]

    def close(self):
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    each = Client(hub.url, tmp_path_factory.mktemp("client"))
    each.run(
        """
        def make_scores(seed=0, num_queries=6, num_examples=40):
            rng = np.random.default_rng(seed)
            provenance = {"fingerprints": {"train": "t", "query": "q"}, "measurement": "margin", "seconds": 1.5}
            return Scores(rng.normal(size=(num_queries, num_examples)), "trak", {"dim": 8}, provenance)

        def make_truth(scores, num_subsets=30, seeds=2):
            subsets = Subsets.random(scores.values.shape[1], num_subsets)
            noise = np.random.default_rng(1).normal(size=(num_subsets, seeds, len(scores.values)))
            protocol = {"name": "resampled", "measurement": "margin", "order": "fresh", "initial_weights": "fresh"}
            return Counterfactuals(subsets, scores.predict(subsets).T[:, None] + noise, protocol)

        label = datasets.ClassLabel(names=["bad", "good"])
        train = datasets.Dataset.from_dict({"text": [f"naïve Ω {i} 🤗" for i in range(40)], "label": [0, 1] * 20})
        train = train.cast_column("label", label)
        """
    )
    yield each
    each.close()


def card(hub, name):
    return hub.repos[name].files["README.md"].content.decode()


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_scores_go_and_come_back(hub, client):
    scores = Scores(np.random.default_rng(0).normal(size=(6, 40)), "trak", {"dim": 8})
    url = client.run("print(make_scores().push_to_hub('ada/first', train_dataset=train, top_k=3))")
    assert url.startswith(f"{hub.url}/datasets/ada/first/commit/")
    repo = hub.repos["datasets/ada/first"]
    assert len(repo.titles) == 2  # all of it in one commit, after that which made the repository
    assert set(repo.files) == {
        ".gitattributes", "README.md", "bottom/train-00000-of-00001.parquet", "scores/train-00000-of-00001.parquet",
        "top/train-00000-of-00001.parquet",
    }  # fmt: skip
    client.run("back = Scores.from_hub('ada/first'); assert back.fingerprint == make_scores().fingerprint")
    assert json.loads(client.run("print(back.values.tolist())")) == scores.values.tolist()


def test_pushing_the_same_again_commits_nothing(hub, client):
    first = client.run("print(make_scores().push_to_hub('ada/again', train_dataset=train))")
    sent = len(hub.asked("PUT /objects/"))
    assert client.run("print(make_scores().push_to_hub('ada/again', train_dataset=train))") == first
    assert len(hub.repos["datasets/ada/again"].titles) == 2
    assert len(hub.asked("PUT /objects/")) == sent
    client.run("make_scores(seed=1).push_to_hub('ada/again', train_dataset=train)")
    assert len(hub.repos["datasets/ada/again"].titles) == 3
    client.run("assert Scores.from_hub('ada/again').fingerprint == make_scores(seed=1).fingerprint")
    revision = first.rsplit("/", 1)[1]
    client.run(f"old = Scores.from_hub('ada/again', revision='{revision}')")
    client.run("assert old.fingerprint == make_scores().fingerprint")


def test_a_stranger_reads_it_with_datasets_alone(hub, client, tmp_path):
    client.run("make_scores().push_to_hub('ada/plain', train_dataset=train, query_dataset=train.select(range(6)))")
    script = """
        import sys
        from datasets import load_dataset
        top = load_dataset("ada/plain", split="train")  # the default configuration
        assert top.column_names == [
            "query", "rank", "train_index", "score", "text", "label", "query_text", "query_label"
        ], top.column_names
        assert len(top) == 60 and top[0]["rank"] == 1
        assert top.features["label"].names == ["bad", "good"]
        assert top[0]["text"] == f"naïve Ω {top[0]['train_index']} 🤗" and top[59]["query_text"] == "naïve Ω 5 🤗"
        assert top[0]["score"] >= top[1]["score"]
        dense = load_dataset("ada/plain", "scores", split="train")
        assert dense.features["scores"].length == 40
        assert dense[3]["scores"][top[30]["train_index"]] == top[30]["score"]
        stream = load_dataset("ada/plain", "scores", split="train", streaming=True)
        assert next(iter(stream))["scores"] == dense[0]["scores"]
        assert not [name for name in sys.modules if name.startswith("hf_attribution")]
        print("read")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment(hub.url, tmp_path, token=None),
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "read"


def test_the_card_tells_what_it_is_and_how_well_it_does(hub, client):
    client.run(
        """
        said = AttributionCardData(
            model_id="ada/bert", model_revision="0123456789abcdef", dataset_id="nyu-mll/glue", license="cc-by-4.0",
            language="en", tags=["sentiment"], citation="@misc{ada}",
        )
        scores = make_scores()
        scores.push_to_hub("ada/card", train_dataset=train, counterfactuals=make_truth(scores), card_data=said)
        print(evaluate_lds(scores, make_truth(scores), train).lds)
        """
    )
    text = card(hub, "datasets/ada/card")
    metadata = front_matter(text)
    assert metadata["license"] == "cc-by-4.0"
    assert metadata["language"] == "en"
    assert metadata["source_datasets"] == ["nyu-mll/glue"]
    assert {"hf_attribution", "training-data-attribution", "trak", "sentiment"} <= set(metadata["tags"])
    assert [config["config_name"] for config in metadata["configs"]] == ["top", "bottom", "scores"]
    assert [config.get("default") for config in metadata["configs"]] == [True, None, None]
    (result,) = metadata["model-index"][0]["results"]
    plain, partial = result["metrics"]
    lds = float(client.run("print(evaluate_lds(scores, make_truth(scores), train).lds)"))
    assert plain["type"] == "lds"
    assert plain["value"] == pytest.approx(lds, abs=1e-4)
    assert plain["args"]["name"] == "resampled"
    assert plain["args"]["num_subsets"] == 30
    assert plain["args"]["seeds"] == 2
    assert plain["args"]["confidence_interval"][0] < lds < plain["args"]["confidence_interval"][1]
    assert lds < plain["args"]["noise_ceiling"] + 0.2
    assert partial["type"] == "partial_lds"
    for line in (
        "| model | [ada/bert](https://huggingface.co/ada/bert/tree/0123456789abcdef) at `0123456789ab` |",
        "| training data | [nyu-mll/glue](https://huggingface.co/datasets/nyu-mll/glue) |",
        "| measured output | margin |",
        f"| LDS | {lds:.3f} | ",
        "| order | fresh |",
        'scores = Scores.from_hub("ada/card")',
        'load_dataset("ada/card", "top", split="train")',
        "@misc{ada}",
    ):
        assert line in text, text


def test_the_code_in_a_card_runs_as_it_stands(hub, client):
    client.run("scores = make_scores(); make_truth(scores).push_to_hub('ada/shown-truth')")
    client.run("scores.push_to_hub('ada/shown')")
    for name in ("shown", "shown-truth"):
        code = card(hub, f"datasets/ada/{name}").split("```python\n")[1].split("```")[0]
        assert "from_hub" in code
        client.run(code)
    assert client.run("print(first.values.shape)") == "(6, 40)"


def test_a_card_edited_by_hand_is_kept(hub, client):
    name = "datasets/ada/edited"
    client.run("make_scores().push_to_hub('ada/edited')")
    text = card(hub, name)
    edited = text.replace("pretty_name:", "license: mit\nannotations_creators: [ada]\npretty_name:")
    edited = edited.replace(
        "<!-- hf_attribution: begin -->", "Mine, above: naïve 🤗\n\n<!-- hf_attribution: begin -->"
    )
    edited = edited.replace("- trak", "- trak\n- mine") + "\nMine, below.\n"
    hub.add(name, "README.md", edited.encode())
    client.run("make_scores(seed=1).push_to_hub('ada/edited')")
    after = card(hub, name)
    assert "Mine, above: naïve 🤗\n\n<!-- hf_attribution: begin -->" in after
    assert after.endswith("<!-- hf_attribution: end -->\n\nMine, below.\n")
    metadata = front_matter(after)
    assert metadata["license"] == "mit"
    assert metadata["annotations_creators"] == ["ada"]
    assert "mine" in metadata["tags"]
    assert after.count("## Load it") == 1
    assert text.split("fingerprint | ")[1][:32] not in after  # that part is written anew
    titles = len(hub.repos[name].titles)
    client.run("make_scores(seed=1).push_to_hub('ada/edited')")
    assert len(hub.repos[name].titles) == titles


def test_a_card_written_before_the_first_push_is_kept(hub, client):
    hub.create("datasets/ada/early")
    hub.add("datasets/ada/early", "README.md", b"# My scores\n\nNotes without metadata.\n")
    client.run("make_scores().push_to_hub('ada/early')")
    text = card(hub, "datasets/ada/early")
    assert text.split("---\n")[2].startswith("# My scores\n\nNotes without metadata.\n\n<!-- hf_attribution: begin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\ntags: [a\n---\n# Mine\n", "metadata between the --- lines"),
        ("---\n- a\n---\n# Mine\n", "metadata between the --- lines"),
        ("# Mine <!-- hf_attribution: begin -->\n", "should have one of each"),
        ("<!-- hf_attribution: end --> <!-- hf_attribution: begin -->\n", "should have one of each"),
    ],
)
def test_a_card_that_cannot_be_merged_is_refused_before_anything_is_sent(hub, client, text, message):
    hub.create("datasets/ada/broken")
    hub.add("datasets/ada/broken", "README.md", text.encode())
    sent = len(hub.asked("^(PUT|POST .*commit)"))
    error = client.fails("make_scores().push_to_hub('ada/broken')")
    assert error.startswith("ArtefactError: ")
    assert message in error
    assert "ada/broken" in error
    assert card(hub, "datasets/ada/broken") == text
    assert len(hub.asked("^(PUT|POST .*commit)")) == sent


def test_text_that_is_html_or_markdown_or_half_a_character_stays_text(hub, client):
    client.run(
        r"""
        odd = {"note": "<script>alert(1)</script> | ``` <!-- hf_attribution: end --> \ud83d", "emoji": "🤗 Ω"}
        scores = Scores(np.eye(3), "my | <b>method</b>\n# big", odd, {"measurement": "a|b <i>"})
        rows = datasets.Dataset.from_dict({"te|xt. 🤗": ["\u202eabc\u0000", "<img src=x>", "e\u0301"]})
        scores.push_to_hub("ada/odd", train_dataset=rows)
        scores.push_to_hub("ada/odd", train_dataset=rows)
        back = Scores.from_hub("ada/odd")
        assert back.settings == odd and back.method == scores.method
        top = datasets.load_dataset("ada/odd", split="train")
        assert top[0]["te|xt. 🤗"] == "\u202eabc\u0000"
        """
    )
    text = card(hub, "datasets/ada/odd")
    assert len(hub.repos["datasets/ada/odd"].titles) == 2
    assert "<script>" not in text
    assert "<b>" not in text.split("---\n")[2]
    assert "<i>" not in text
    assert "\n# big" not in text
    assert text.count("<!-- hf_attribution: end -->") == 1


def test_images_in_files_are_taken_along(hub, client, tmp_path):
    client.run(
        f"""
        from pathlib import Path
        from PIL import Image
        paths = [str(Path({str(tmp_path)!r}) / f"{{i}}.png") for i in range(3)]
        for i, path in enumerate(paths):
            Image.new("L", (4, 4), 50 * i).save(path)
        pictures = datasets.Dataset.from_dict({{"image": paths}}).cast_column("image", datasets.Image())
        Scores(np.eye(3), "trak").push_to_hub("ada/images", train_dataset=pictures, top_k=1)
        for path in paths:
            Path(path).unlink()
        top = datasets.load_dataset("ada/images", split="train")
        print([row["image"].getpixel((0, 0)) for row in top])
        """
    )
    assert client.run("print([row['image'].getpixel((0, 0)) for row in top])") == "[0, 50, 100]"


# Who may


def test_without_a_token_nothing_is_asked(hub, client):
    asked = len(hub.requests)
    error = client.fails("make_scores().push_to_hub('ada/tokenless', token=False)")
    assert error.startswith("HubError: ")
    assert "hf auth login" in error
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("hf_reader", "ada/readonly", "write access to 'ada'"),
        ("hf_revoked", "ada/revoked", "the token is not valid"),
        ("hf_writer", "bob/theirs", "write access to 'bob'"),
    ],
)
def test_a_token_that_may_not_is_explained(hub, client, token, name, message):
    error = client.fails(f"make_scores().push_to_hub('{name}', token='{token}')")
    assert error.startswith(f"HubError: Cannot push to {name}: ")
    assert message in error
    assert f"datasets/{name}" not in hub.repos


def test_a_private_repository_is_not_for_everybody(hub, client):
    client.run("make_scores().push_to_hub('ada/secret', private=True)")
    assert hub.repos["datasets/ada/secret"].private
    error = client.fails("Scores.from_hub('ada/secret', token=False)")
    assert error.startswith("HubError: Cannot read ada/secret: ")
    assert "if it is private, log in" in error
    assert "Check the name" in client.fails("Scores.from_hub('ada/nothing')")
    assert "it is private" in client.fails("Scores.from_hub('ada/secret', token=False, queries=slice(2))")
    client.run("assert Scores.from_hub('ada/secret').fingerprint == make_scores().fingerprint")


@pytest.mark.parametrize("existing", [True, False])
def test_what_should_be_private_is_never_published(hub, client, existing):
    name = f"datasets/ada/visible{existing}"
    hub.create(name, private=existing)
    error = client.fails(f"make_scores().push_to_hub('ada/visible{existing}', private={not existing})")
    assert "nothing was pushed" in error
    assert "update_repo_settings" in error
    assert len(hub.repos[name].titles) == 1
    client.run(f"make_scores().push_to_hub('ada/visible{existing}')")
    assert hub.repos[name].private == existing


def test_a_name_that_is_taken_is_not_overwritten(hub, client):
    hub.create("datasets/ada/taken")
    hub.add("datasets/ada/taken", "data/train.csv", b"a,b\n1,2\n")
    error = client.fails("make_scores().push_to_hub('ada/taken')")
    assert "holds something else than scores of hf_attribution (data/train.csv)" in error
    client.run("train.push_to_hub('ada/same-paths', 'scores', data_dir='scores')")  # paths like ours, and not ours
    assert "holds something else than scores" in client.fails("make_scores().push_to_hub('ada/same-paths')")
    client.run("make_truth(make_scores()).push_to_hub('ada/truth-there')")
    error = client.fails("make_scores().push_to_hub('ada/truth-there')")
    assert "holds something else than scores" in error
    error = client.fails("Scores.from_hub('ada/truth-there')")
    assert error.startswith("ArtefactError: ada/truth-there holds no scores; it holds counterfactuals")


def test_a_short_name_is_ones_own(hub, client):
    url = client.run("print(make_scores().push_to_hub('short'))")
    assert "/datasets/ada/short/" in url


# What goes wrong on the way


@pytest.fixture
def small_shards(client):
    client.run("import hf_attribution.hub.tables as tables; tables.SHARD_BYTES = 400; tables.GROUP_BYTES = 200")
    yield
    client.run("tables.SHARD_BYTES, tables.GROUP_BYTES = 128 * 2**20, 4 * 2**20")


def test_an_upload_cut_in_the_middle_leaves_nothing_and_goes_on(hub, client, small_shards, tmp_path):
    push = """
        import hf_attribution.hub.tables as tables
        tables.SHARD_BYTES, tables.GROUP_BYTES = 400, 200
        import numpy as np
        from hf_attribution import Scores
        Scores(np.random.default_rng(5).normal(size=(6, 40)), "trak").push_to_hub("ada/cut", top_k=2)
    """
    client.run("make_scores().push_to_hub('ada/cut', top_k=2)")
    before = hub.repos["datasets/ada/cut"].files
    sent = len(hub.asked("PUT /objects/"))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(push)], env=environment(hub.url, tmp_path), stderr=subprocess.DEVNULL
    )
    hub.on("PUT /objects/", lambda: None, times=3)
    hub.on("PUT /objects/", process.kill)  # in the fourth file
    assert process.wait() < 0
    assert hub.repos["datasets/ada/cut"].files == before
    client.run("assert Scores.from_hub('ada/cut').fingerprint == make_scores().fingerprint")
    arrived = len(set(hub.asked("PUT /objects/")[sent:]))
    assert arrived == 4
    client.run(textwrap.dedent(push))
    again = hub.asked("PUT /objects/")[sent:]
    assert len(again) == len(set(again)), "a file was sent twice"
    assert len(again) > arrived
    client.run("back = Scores.from_hub('ada/cut')")
    assert json.loads(client.run("print(back.values.tolist())")) == (
        np.random.default_rng(5).normal(size=(6, 40)).astype(np.float32).tolist()
    )


def test_files_that_are_no_longer_needed_go(hub, client, small_shards):
    client.run("make_scores().push_to_hub('ada/shrinks')")
    many = scores_files(hub, "datasets/ada/shrinks")
    assert len(many) > 2
    hub.add("datasets/ada/shrinks", "scores/notes.txt", b"mine")
    client.run("make_scores(num_queries=1).push_to_hub('ada/shrinks', top_k=1)")
    few = set(hub.repos["datasets/ada/shrinks"].files)
    assert "scores/train-00000-of-00001.parquet" in few
    assert "scores/notes.txt" in few
    assert not few & set(many)
    client.run("assert Scores.from_hub('ada/shrinks').fingerprint == make_scores(num_queries=1).fingerprint")


def test_somebody_elses_commit_in_between_is_not_undone(hub, client):
    name = "datasets/ada/busy"
    client.run("make_scores().push_to_hub('ada/busy')")

    def edit():
        hub.add(name, "README.md", f"{card(hub, name)}\nWritten meanwhile.\n".encode())

    hub.on("POST /api/datasets/ada/busy/commit", edit)
    client.run("make_scores(seed=1).push_to_hub('ada/busy')")
    assert "Written meanwhile." in card(hub, name)
    client.run("assert Scores.from_hub('ada/busy').fingerprint == make_scores(seed=1).fingerprint")
    hub.on("POST /api/datasets/ada/busy/commit", lambda: 409)
    client.run("make_scores(seed=2).push_to_hub('ada/busy')")
    client.run("assert Scores.from_hub('ada/busy').fingerprint == make_scores(seed=2).fingerprint")


def test_a_refused_commit_changes_nothing(hub, client):
    hub.on("POST /api/datasets/ada/refused/commit", lambda: 403)
    error = client.fails("make_scores().push_to_hub('ada/refused')")
    assert "the token may not do that" in error
    assert set(hub.repos["datasets/ada/refused"].files) == {".gitattributes"}


def test_branches(hub, client):
    client.run("make_scores().push_to_hub('ada/branches')")
    client.run("make_scores(seed=1).push_to_hub('ada/branches', revision='seed-1')")
    client.run("assert Scores.from_hub('ada/branches').fingerprint == make_scores().fingerprint")
    client.run("other = Scores.from_hub('ada/branches', revision='seed-1')")
    client.run("assert other.fingerprint == make_scores(seed=1).fingerprint")
    error = client.fails("Scores.from_hub('ada/branches', revision='v9')")
    assert "it has no branch, tag or commit 'v9'" in error


# Other artefacts, and parts


def test_counterfactuals_from_the_hub_make_an_lds(hub, client):
    client.run("scores = make_scores(); truth = make_truth(scores); truth.push_to_hub('ada/truth')")
    client.run("back = Counterfactuals.from_hub('ada/truth'); assert back.fingerprint == truth.fingerprint")
    client.run("assert evaluate_lds(scores, back).lds == evaluate_lds(scores, truth).lds")
    text = card(hub, "datasets/ada/truth")
    for line in ("| subsets | 30 |", "| seeds for each | 2 |", "| name | resampled |", "| noise ceiling | 0."):
        assert line in text, text
    client.run(
        """
        rows = datasets.load_dataset("ada/truth", split="train")
        assert rows.column_names == ["query", "mean", "std", "reliability"]
        assert np.allclose(rows["mean"], truth.mean().mean(axis=1))
        assert np.allclose(rows["reliability"], truth.reliability())
        """
    )


def test_subsets_are_shared(hub, client):
    client.run("subsets = Subsets.random(100, 20); subsets.push_to_hub('ada/subsets')")
    client.run("assert Subsets.from_hub('ada/subsets').fingerprint == subsets.fingerprint")


def test_the_largest_scores_alone_are_shared(hub, client):
    client.run(
        """
        scores = make_scores()
        indices = np.argsort(-scores.values, axis=1)[:, :12]
        top = TopScores(indices, np.take_along_axis(scores.values, indices, axis=1), 40, "trak", {"dim": 8})
        top.push_to_hub("ada/top", train_dataset=train, query_dataset=train.select(range(6)), top_k=5)
        back = TopScores.from_hub("ada/top")
        assert back.fingerprint == top.fingerprint
        rows = datasets.load_dataset("ada/top", split="train")
        """
    )
    assert client.run("print(rows.num_rows, rows[0]['train_index'] == int(indices[0, 0]), rows[0]['query_text'])") == (
        "30 True naïve Ω 0 🤗"
    )
    assert client.run("print(datasets.load_dataset('ada/top', 'top_scores', split='train').num_rows)") == "6"
    assert "the top 12 of 40 training examples" in card(hub, "datasets/ada/top")
    client.run("top.push_to_hub('ada/top-whole', top_k=50)")  # no more than there are
    assert client.run("print(datasets.load_dataset('ada/top-whole', split='train').num_rows)") == "72"
    assert "has 3" in client.fails("top.push_to_hub('ada/top', query_dataset=train.select(range(3)))")
    assert "holds no scores; it holds top, top_scores" in client.fails("Scores.from_hub('ada/top')")
    assert "holds something else than scores" in client.fails("scores.push_to_hub('ada/top')")


def test_one_seed_has_no_reliability_to_show(hub, client):
    client.run("make_truth(make_scores(), seeds=1).push_to_hub('ada/one-seed')")
    client.run("rows = datasets.load_dataset('ada/one-seed', split='train')")
    assert client.run("print(rows.column_names)") == "['query', 'mean', 'std']"
    assert "noise ceiling" not in card(hub, "datasets/ada/one-seed")


def test_some_queries_are_read_without_the_others(hub, client):
    client.run("import hf_attribution.hub.tables as tables; tables.SHARD_BYTES, tables.GROUP_BYTES = 2**21, 2**20")
    client.run("big = make_scores(num_queries=48, num_examples=50_000); big.push_to_hub('ada/big', top_k=1)")
    client.run("tables.SHARD_BYTES, tables.GROUP_BYTES = 128 * 2**20, 4 * 2**20")
    start = hub.bytes_sent
    client.run("part = Scores.from_hub('ada/big', queries=slice(20, 24))")
    files = hub.repos["datasets/ada/big"].files
    whole = sum(len(files[path].content) for path in scores_files(hub, "datasets/ada/big"))
    assert hub.bytes_sent - start < 0.35 * whole
    client.run(
        """
        assert np.array_equal(part.values, big.values[20:24])
        assert part.provenance["queries"] == [20, 24, 1] and part.provenance["fingerprints"] == {"train": "t"}
        assert part.settings == big.settings
        back = Scores.from_hub("ada/big", queries=slice(None, None, -7))
        assert np.array_equal(back.values, big.values[::-7])
        assert np.array_equal(Scores.from_hub("ada/big", queries=slice(-3, None)).values, big.values[-3:])
        """
    )
    assert "has 48 rows of scores" in client.fails("Scores.from_hub('ada/big', queries=slice(48, 60))")


def scores_files(hub, name):
    return sorted(path for path in hub.repos[name].files if path.startswith("scores/"))


# What is read is what was written


def test_a_newer_schema_is_refused_before_it_is_fetched(hub, client, small_shards):
    client.run(
        """
        import hf_attribution.seals as seals
        seals.SCHEMA_VERSION = 99
        make_scores().push_to_hub("ada/newer")
        seals.SCHEMA_VERSION = 1
        """
    )
    start = len(hub.requests)
    for code in ("Scores.from_hub('ada/newer')", "Scores.from_hub('ada/newer', queries=slice(2))"):
        error = client.fails(code)
        assert error.startswith("ArtefactError: ada/newer has schema version 99")
        assert "pip install -U" in error
    fetched = [line for line in hub.requests[start:] if "/resolve/" in line and "scores/train" in line]
    assert fetched
    assert not [line for line in fetched if "train-00000" not in line]
    assert "schema version 99" in client.fails("make_scores().push_to_hub('ada/newer')")


def test_damage_and_missing_files_are_noticed(hub, client, small_shards):
    client.run("make_scores().push_to_hub('ada/damaged')")
    repo = hub.repos["datasets/ada/damaged"]
    _, path, other, *_ = scores_files(hub, "datasets/ada/damaged")
    hub.add("datasets/ada/damaged", path, repo.files[other].content)
    assert "not what was written" in client.fails("Scores.from_hub('ada/damaged')")
    assert "not in order" in client.fails("Scores.from_hub('ada/damaged', queries=slice(0, 4))")
    files = {each: file for each, file in repo.files.items() if each != path}
    repo.commit(files, "lose one")
    assert "1 files of scores are missing" in client.fails("Scores.from_hub('ada/damaged')")


# What is known of itself


def test_model_and_dataset_from_the_hub_are_named(hub, client):
    hub.create("models/ada/tiny")
    hub.add("models/ada/tiny", "config.json", b'{"model_type": "bert"}')
    client.run(
        """
        import types
        from hf_attribution.provenance import hub_sources
        from transformers import AutoConfig
        train.push_to_hub("ada/rows")
        rows = datasets.load_dataset("ada/rows", split="train").map(lambda row: {"length": len(row["text"])})
        model = types.SimpleNamespace(config=AutoConfig.from_pretrained("ada/tiny"))
        sources = hub_sources(model, rows.select(range(40)))
        scores = Scores(np.eye(40), "trak", {}, {"sources": sources, "paper": "Park et al. 2023"})
        scores.push_to_hub("ada/sourced")
        """
    )
    sources = json.loads(client.run("import json; print(json.dumps(sources))"))
    commit = hub.repos["datasets/ada/rows"].branches["main"]
    assert sources == {"model": {"id": "ada/tiny"}, "dataset": {"id": "ada/rows", "revision": commit}}
    text = card(hub, "datasets/ada/sourced")
    assert f"https://huggingface.co/datasets/ada/rows/tree/{commit}" in text
    assert "| paper | Park et al. 2023 |" in text
    assert front_matter(text)["source_datasets"] == ["ada/rows"]
    assert client.run("print(hub_sources(object(), train))") == "{}"


# The shell


def test_push_and_pull_in_the_shell(hub, client, tmp_path):
    client.run(
        f"""
        from pathlib import Path
        from hf_attribution.cli import main
        folder = Path({str(tmp_path)!r})
        train.to_parquet(str(folder / "train.parquet"))
        scores = make_scores()
        scores.save(folder / "scores.safetensors")
        make_truth(scores).save(folder / "truth.safetensors")

        def shell(line):
            return main(line.replace("FOLDER", str(folder)).split())
        """
    )
    client.run("assert shell('push --artefact FOLDER/truth.safetensors --repo_id ada/shell-truth') == 0")
    options = "--private --top_k 2 --license mit --counterfactuals FOLDER/truth.safetensors"
    rows = "--dataset_name FOLDER/train.parquet --columns text label"
    push = f"push --artefact FOLDER/scores.safetensors --repo_id ada/shell {options} {rows}"
    printed = client.run(f"assert shell('{push}') == 0")
    assert printed.startswith("Scores(trak, 6 queries x 40 training examples): http")
    assert hub.repos["datasets/ada/shell"].private
    metadata = front_matter(card(hub, "datasets/ada/shell"))
    assert metadata["license"] == "mit"
    assert [each["type"] for each in metadata["model-index"][0]["results"][0]["metrics"]] == ["lds", "partial_lds"]
    client.run("assert datasets.load_dataset('ada/shell', split='train').num_rows == 12")
    for name, kind in (("shell", "Scores"), ("shell-truth", "Counterfactuals")):
        client.run(f"assert shell('pull --repo_id ada/{name} --output_file FOLDER/back.safetensors') == 0")
        client.run(f"back = {kind}.load(folder / 'back.safetensors')")
        client.run(
            "assert back.fingerprint == (scores if isinstance(back, Scores) else make_truth(scores)).fingerprint"
        )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("push --artefact FOLDER/none.safetensors --repo_id ada/none", "There is no artefact file at"),
        ("push --artefact FOLDER/text.txt --repo_id ada/none", "is truncated, damaged or no safetensors file"),
        ("push --artefact FOLDER/scores.safetensors --repo_id bob/none", "write access to 'bob'"),
        ("push --artefact FOLDER/scores.safetensors --repo_id ada/none --columns text", "give --dataset_name"),
        ("pull --repo_id ada/none --output_file FOLDER/x.safetensors", "there is no such dataset repository"),
        ("pull --repo_id ada/foreign --output_file FOLDER/x.safetensors", "holds nothing that hf_attribution pushed"),
        ("pull --repo_id ada/none --output_file FOLDER", "is a folder"),
        ("push --artefact FOLDER --repo_id ada/none", "is not a feature store"),
        ("pull --repo_id ../../etc --output_file FOLDER/x.safetensors", "Repo id must"),
    ],
)
def test_errors_in_the_shell_are_one_line(hub, client, tmp_path, line, message):
    hub.create("datasets/ada/foreign")
    client.run(
        f"""
        import contextlib, io
        from pathlib import Path
        from hf_attribution.cli import main
        folder = Path({str(tmp_path)!r})
        make_scores().save(folder / "scores.safetensors")
        (folder / "text.txt").write_text("text")
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            code = main({line!r}.replace("FOLDER", str(folder)).split())
        assert code == 2
        """
    )
    error = client.run("print(told.getvalue())")
    assert error.startswith("hf-attribution: error: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "x.safetensors").exists()


# Feature stores


@pytest.fixture(scope="module")
def make_store(client):
    client.run(
        """
        from pathlib import Path
        import torch
        from hf_attribution.store import FeatureStore, FeatureWriter, Manifest

        def make_store(path, rows=10):
            torch.manual_seed(rows)
            writer = FeatureWriter(Path(path), Manifest(4, "float32", {"model": "m"}, num_rows=rows), shard_bytes=64)
            writer.write(np.arange(rows), torch.randn(rows, 4), torch.randn(rows))
            return writer.finish()
        """
    )


def test_a_store_goes_and_comes_back(hub, client, make_store, tmp_path):
    client.run(f"here = Path({str(tmp_path)!r}); store = make_store(here / 'store'); store.push_to_hub('ada/store')")
    client.run("back = FeatureStore.from_hub('ada/store', here / 'back')")
    client.run("assert torch.equal(back.read(0, 10), store.read(0, 10)) and back.manifest == store.manifest")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "store"]
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(
        path.name for path in (tmp_path / "store").iterdir()
    )
    client.run("rows = datasets.load_dataset('ada/store', split='train')")
    client.run("assert np.array_equal(np.array(rows['features'], dtype=np.float32), store.read(0, 10).numpy())")
    assert front_matter(card(hub, "datasets/ada/store"))["configs"][0]["config_name"] == "features"
    titles = len(hub.repos["datasets/ada/store"].titles)
    client.run("store.push_to_hub('ada/store')")
    assert len(hub.repos["datasets/ada/store"].titles) == titles
    client.run("make_store(here / 'small', rows=2).push_to_hub('ada/store')")
    client.run("assert len(FeatureStore.from_hub('ada/store', here / 'small-back')) == 2")
    assert len([path for path in hub.repos["datasets/ada/store"].files if path.endswith(".arrow")]) == 1
    assert "exists" in client.fails("FeatureStore.from_hub('ada/store', here / 'back')")
    assert "holds something else" in client.fails("make_scores().push_to_hub('ada/store')")
    client.run("Subsets.random(10, 2).push_to_hub('ada/no-store')")
    assert "holds no features" in client.fails("FeatureStore.from_hub('ada/no-store', here / 'none')")


def test_push_and_pull_a_store_in_the_shell(hub, client, make_store, tmp_path):
    client.run(
        f"""
        from hf_attribution.cli import main
        here = Path({str(tmp_path)!r})
        store = make_store(here / "store")
        repo = ["--repo_id", "ada/shell-store"]
        assert main(["push", "--artefact", str(here / "store"), *repo, "--license", "mit"]) == 0
        assert main(["pull", *repo, "--output_file", str(here / "back")]) == 0
        back = FeatureStore(str(here / "back"))
        assert back.manifest == store.manifest and torch.equal(back.read(0, 10), store.read(0, 10))
        """
    )
    assert front_matter(card(hub, "datasets/ada/shell-store"))["license"] == "mit"


def test_a_foreign_store_writes_nothing_outside_of_its_folder(hub, client, make_store, tmp_path):
    client.run(f"here = Path({str(tmp_path)!r}) / 'inside'; here.mkdir(); store = make_store(here / 'store')")
    client.run("store.push_to_hub('ada/evil')")
    client.run(
        """
        import dataclasses
        shards = store.manifest.shards
        evil = dataclasses.replace(store.manifest, shards=(dataclasses.replace(shards[0], file="../../stolen"),))
        (here / "evil").mkdir()
        evil.save(here / "evil")
        """
    )
    manifest = (tmp_path / "inside" / "evil" / "manifest.json").read_bytes()
    hub.add("datasets/ada/evil", "features/manifest.json", manifest)
    hub.add("datasets/ada/evil", "features/../../stolen", b"x")
    error = client.fails("FeatureStore.from_hub('ada/evil', here / 'back')")
    assert "names '../../stolen'" in error
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert not (tmp_path / "inside" / "back").exists()
    client.run("make_store(here / 'other').push_to_hub('ada/hurt')")
    path = next(path for path in hub.repos["datasets/ada/hurt"].files if path.endswith("1.arrow"))
    content = bytearray(hub.repos["datasets/ada/hurt"].files[path].content)
    content[-40] ^= 1
    hub.add("datasets/ada/hurt", path, bytes(content))
    assert "damaged" in client.fails("FeatureStore.from_hub('ada/hurt', here / 'hurt')")
    assert not (tmp_path / "inside" / "hurt").exists()
