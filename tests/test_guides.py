"""README, guides and CONTRIBUTING: their code runs as it stands, their commands parse, their links lead somewhere."""

import dataclasses
import functools
import re
import runpy
import shlex
import sys
import types
from pathlib import Path

import folders
import hub_server
import models
import numpy as np
import pytest
import tiny
import torch
from accelerate.commands.launch import launch_command_parser
from datasets import DatasetDict
from test_hub import Client
from transformers import HfArgumentParser, default_data_collator

from hf_attribution import AttributionTrainer, attribute, cli
from hf_attribution.methods import METHODS

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "hf_attribution" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md")), *GUIDES]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

ABOUT_TRAINERS = (
    "choosing_a_method", "clusters", "reading_an_lds", "unrolling_and_estimation", "wrong_labels", "your_trainer",
)  # fmt: skip

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, language):
    """The code of a page in a language, each block below as many empty lines as there are above it."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCED.finditer(text):
        if found[1] == language:
            yield "\n" * (text[: found.start()].count("\n") + 1) + found[2]


def execute(page, names):
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


# ---------------------------------------------------------------- code


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """What most guides speak of: a model that is quickly trained, its data, and its trainer."""
    args = tiny.arguments(tmp_path_factory.mktemp("outputs"))
    train, test = (
        tiny.points(rows, seed=seed).add_column("source", ["a", "b", "c"] * (rows // 3))
        for seed, rows in enumerate((24, 6))
    )
    names = {"model_init": lambda: tiny.model(), "args": args, "data_collator": default_data_collator}
    trainer = AttributionTrainer(**names, train_dataset=train, eval_dataset=test)
    trainer.train()
    return {**names, "train": train, "test": test, "trainer": trainer}


@pytest.mark.parametrize("name", ABOUT_TRAINERS)
def test_code_about_a_trainer_runs(name, points, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(guide(name), dict(points))


def test_code_about_images_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_parquet("me/flowers", functools.partial(folders.pictures, label="label"))
    folders.save_image_classifier("google/vit-base-patch16-224-in21k", channels=3)
    execute(guide("vision"), {})
    assert Path("report.html").stat().st_size > 10_000


def test_code_about_language_models_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    save_parquet("me/texts", folders.reviews)
    words = folders.tokenizer()
    words.save_pretrained("HuggingFaceTB/SmolLM2-135M")
    models.llama()[0].save_pretrained("HuggingFaceTB/SmolLM2-135M")
    execute(guide("language_models"), {})


def test_code_about_the_hub_runs(points, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_server, "USER", "me")
    trainer, test = points["trainer"], points["test"]
    for method in ("grad_dot", "trak"):
        trainer.attribute(test, method=method, cache_dir=tmp_path / "stores").save(tmp_path / f"{method}.safetensors")
    trainer.attribute_top(test, k=3).save(tmp_path / "top.safetensors")
    trainer.retrain(test, num_subsets=6, seeds=2).save(tmp_path / "truth.safetensors")
    DatasetDict({"train": points["train"], "test": test}).save_to_disk(str(tmp_path / "data"))
    with hub_server.Hub() as hub:
        client = Client(hub.url, tmp_path)
        client.run(
            """
            scores, more = (Scores.load(f"{name}.safetensors") for name in ("grad_dot", "trak"))
            truth, data = Counterfactuals.load("truth.safetensors"), datasets.load_from_disk("data")
            train, test = data["train"], data["test"]
            import pathlib
            top = TopScores.load("top.safetensors")
            store_folder = min(pathlib.Path("stores").rglob("manifest.json")).parent
            """
        )
        for block in blocks(guide("sharing_on_the_hub"), "python"):
            client.run(block)
        client.close()
        assert {f"datasets/me/sst2-{name}" for name in ("trak", "retrained", "gradients")} <= set(hub.repos)


def test_the_method_that_is_shown_runs_and_passes_its_test(monkeypatch):
    method, test = blocks(guide("adding_a_method"), "python")
    module = types.ModuleType("kernel_similarity")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(method, "kernel_similarity.py", "exec"), module.__dict__)
    kind = module.KernelSimilarity
    names = {"attribute": attribute, "KernelSimilarity": kind, "np": np}
    exec(compile(test, "test_kernel_similarity.py", "exec"), names)
    trained, train = tiny.model(), tiny.points().with_format("torch")
    queries = tiny.points(5, seed=1).with_format("torch")
    names["test_kernel_similarity_is_its_closed_form"](trained, train, queries)
    # Named in METHODS, it is known by its name, and says what it chose.
    monkeypatch.setitem(METHODS, kind.name, kind)
    scores = attribute(trained, train, queries, method="kernel_similarity")
    distances = torch.cdist(torch.stack(list(queries["points"])).double(), torch.stack(list(train["points"])).double())
    assert np.isclose(scores.provenance["choices"]["width"][0], float(distances.median()))
    assert [field.name for field in dataclasses.fields(kind)] == ["width"]


@each_page
def test_every_block_is_code_that_is_tested(page):
    languages = {found[1] for found in _FENCED.finditer(page.read_text(encoding="utf-8"))}
    assert languages <= {"python", "bash"}
    tested = {*ABOUT_TRAINERS, "README", "vision", "language_models", "sharing_on_the_hub", "adding_a_method"}
    assert page.stem in tested or "python" not in languages


# ---------------------------------------------------------------- commands


@each_page
def test_commands_have_options_that_there_are(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                check(words, monkeypatch)


def check(words, monkeypatch):
    if words[0] == "hf-attribution":
        cli._parse(words[1], cli._command(words[1]), words[2:])
    elif words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        check_script(launched.training_script, launched.training_script_args, monkeypatch)
    elif words[0] == "python":
        check_script(words[1], words[2:], monkeypatch)
    elif words[0].startswith("scripts/"):
        assert Path(words[0]).is_file()
    else:
        assert words == ["hf", "auth", "login"]


class Parsed(Exception):
    pass


def check_script(script, options, monkeypatch):
    """Run a script until it has parsed its options."""
    parse = HfArgumentParser.parse_args_into_dataclasses

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", parse_and_stop)
        patch.setattr(sys, "argv", [script, *options])
        with pytest.raises(Parsed):
            runpy.run_path(script, run_name="__main__")


def test_a_command_with_an_option_that_there_is_not_would_be_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="no option --metod"):
        check(["hf-attribution", "attribute", "--model_name_or_path", "m", "--metod", "trak"], monkeypatch)
    with pytest.raises(ValueError, match="--metod"):
        check(["python", "scripts/attribute.py", "--model_name_or_path", "m", "--metod", "trak"], monkeypatch)


# ---------------------------------------------------------------- links


@each_page
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", prose):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def test_readme_links_every_guide():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [each.name for each in GUIDES if f"(hf_attribution/guides/{each.name})" not in readme]
    assert not missing


def guide(name):
    return ROOT / "hf_attribution" / "guides" / f"{name}.md"


def save_parquet(folder, make):
    Path(folder).mkdir(parents=True)
    for split, size in (("train", 12), ("test", 6)):
        make(size).to_parquet(f"{folder}/{split}.parquet")
