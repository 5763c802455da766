"""The command line from end to end, on tiny models and datasets in folders."""

import dataclasses
import json
import runpy
import subprocess
import sys
import types
from pathlib import Path

import datasets
import folders
import numpy as np
import pytest
from transformers import HfArgumentParser, Trainer, TrainingArguments

import hf_attribution
from hf_attribution import Counterfactuals, Scores, attribute, evaluate_lds
from hf_attribution.arguments import DataArguments, ModelArguments, RetrainArguments
from hf_attribution.cli import main
from hf_attribution.counterfactuals import Subsets
from hf_attribution.estimation import estimate
from hf_attribution.methods import METHODS, Trak
from hf_attribution.workspace import load_workspace

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Options that name a model and its data, by what the model does."""
    folder = tmp_path_factory.mktemp("cases")
    reviews = folders.save_splits(folder / "reviews", folders.reviews)
    csv = folder / "csv"
    csv.mkdir()
    for split, size in (("train", 12), ("test", 3)):
        rows = folders.reviews(size)
        names = [rows.features["label"].int2str(label) for label in rows["label"]]
        rows.remove_columns("label").add_column("label", names).to_csv(str(csv / f"{split}.csv"))
    pictures = folders.save_splits(folder / "pictures", folders.pictures)
    classifier = folders.save_classifier(folder / "classifier")
    return {
        "text": options(classifier, reviews),
        "csv": options(classifier, csv),
        "causal": options(folders.save_causal_lm(folder / "causal"), reviews),
        "image": options(folders.save_image_classifier(folder / "image"), pictures),
        "new head": options(folders.save_headless(folder / "headless"), reviews, "--task", "text-classification"),
    }


def options(model, data, *more):
    return ["--model_name_or_path", str(model), "--dataset_name", str(data), *more]


def run(*argv):
    assert main([str(each) for each in argv]) == 0


def error(capsys, *argv):
    """The message of a command that fails."""
    capsys.readouterr()
    assert main([str(each) for each in argv]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.count("hf-attribution: error: ") == 1
    message = printed.partition("hf-attribution: error: ")[2]
    assert message.count("\n") == 1  # one line, the last
    return message


def training(folder, *more):
    return ["--output_dir", folder, "--num_train_epochs", 1, "--report_to", "none", "--use_cpu", *more]


@pytest.mark.parametrize("case", ["text", "csv", "causal", "image"])
def test_attribute_is_the_library_s_attribute(cases, case, tmp_path):
    file = tmp_path / "new" / "scores.safetensors"
    settings = '{"dim": 16, "seed": 3}'
    run("attribute", *cases[case], "--method", "trak", "--method_settings", settings, "--output_file", file)
    scores = Scores.load(file)
    assert scores.values.shape == (3, 12)
    assert (scores.settings["dim"], scores.settings["seed"]) == (16, 3)

    workspace = load_workspace(ModelArguments(cases[case][1]), DataArguments(cases[case][3]))
    model, train, query = workspace.trained_model(), workspace.train, workspace.query
    expected = attribute(model, train, query, method=Trak(16, seed=3), data_collator=workspace.data_collator)
    np.testing.assert_array_equal(scores.values, expected.values)
    top = scores.top(k=1, train_dataset=train)
    column = "image" if case == "image" else "text"
    assert top[0][column] == train[int(scores.values[0].argmax())][column]


def test_options_of_model_and_method_arrive(cases, tmp_path):
    file = tmp_path / "scores.safetensors"
    more = ["--measurement", "loss", "--max_train_examples", 5, "--cache_dir", tmp_path / "cache"]
    run("attribute", *cases["text"], *more, "--method_settings", '{"dim": 8}', "--output_file", file)
    scores = Scores.load(file)
    assert scores.values.shape == (3, 5)
    assert scores.provenance["measurement"] == "loss"
    assert any((tmp_path / "cache").rglob("*"))


def test_checkpoints_are_averaged_and_those_of_a_trainer_weighted(cases, tmp_path):
    folder, file = tmp_path / "run", tmp_path / "scores.safetensors"
    workspace = load_workspace(ModelArguments(cases["text"][1]), DataArguments(cases["text"][3]))
    args = TrainingArguments(
        str(folder), num_train_epochs=2, save_strategy="epoch", report_to="none", disable_tqdm=True, use_cpu=True
    )
    Trainer(workspace.model, args, workspace.data_collator, workspace.train).train()
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    run("attribute", *cases["text"], "--method", "tracin", "--checkpoints", folder, "--output_file", file)
    tracin = Scores.load(file)
    rates = tracin.provenance["choices"]["learning_rates"]
    singles = []
    for checkpoint in checkpoints:
        run("attribute", *options(checkpoint, cases["text"][3]), "--method", "grad_dot", "--output_file", file)
        singles.append(Scores.load(file).values)
    assert len(rates) == len(singles) == 2
    expected = sum(rate * single for rate, single in zip(rates, singles, strict=True))
    np.testing.assert_allclose(tracin.values, expected, rtol=1e-4, atol=1e-9)

    run("attribute", *cases["text"], "--method", "grad_dot", "--checkpoints", *checkpoints, "--output_file", file)
    np.testing.assert_allclose(Scores.load(file).values, np.mean(singles, axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "more", "weights"),
    [
        ("text", ["--protocol", "fixed"], "shared"),
        ("new head", [], "fresh"),
        ("causal", ["--from_scratch"], "fresh"),
        ("image", ["--label_smoothing_factor", "0.1"], "shared"),
    ],
)
def test_retrain_writes_the_outputs_of_every_training(cases, case, more, weights, tmp_path):
    file = tmp_path / "truth.safetensors"
    subsets = ["--num_subsets", 3, "--fraction", 0.75, "--seeds", 1, "--seed", 5]
    run("retrain", *cases[case], *more, *subsets, *training(tmp_path / "runs"), "--output_file", file)
    truth = Counterfactuals.load(file)
    assert truth.outputs.shape == (3, 1, 3)
    assert (truth.subsets.masks == Subsets.random(12, 3, 0.75, seed=5).masks).all()
    assert truth.protocol["initial_weights"] == weights
    assert truth.protocol["training"]["num_train_epochs"] == 1
    assert len(list((tmp_path / "runs").rglob("runs/*.safetensors"))) == 3
    assert np.ptp(truth.outputs) > 0


def test_weights_that_retrain_keeps_can_be_attributed_with(cases, tmp_path):
    file = tmp_path / "file.safetensors"
    more = ["--num_subsets", 2, "--keep_checkpoints", *training(tmp_path / "runs"), "--output_file", file]
    run("retrain", *cases["new head"], *more)
    kept = sorted(path.parent for path in tmp_path.rglob("runs/*/model.safetensors"))
    assert len(kept) == 2
    argv = ["attribute", *cases["new head"], "--method", "grad_dot", "--output_file", file, "--checkpoints"]
    singles = []
    for folders_ in ([kept[0]], [kept[1]], kept, kept):
        run(*argv, *folders_)
        singles.append(Scores.load(file))
    np.testing.assert_allclose(singles[2].values, (singles[0].values + singles[1].values) / 2, rtol=1e-4, atol=1e-6)
    assert singles[2].fingerprint == singles[3].fingerprint


def test_a_second_retrain_trains_no_more(cases, tmp_path, monkeypatch):
    file = tmp_path / "truth.safetensors"
    argv = [*cases["text"], "--num_subsets", 3, *training(tmp_path / "runs"), "--output_file", file]
    run("retrain", *argv)
    before = file.read_bytes()
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("trained again"))
    run("retrain", *argv)
    assert file.read_bytes() == before


def test_workers_are_a_number_or_ray():
    assert [RetrainArguments(workers=given).crew for given in ("1", "16", "ray")] == [1, 16, "ray"]


def test_dry_runs_say_what_is_coming_and_write_nothing(cases, tmp_path, capsys, monkeypatch):
    file = tmp_path / "file.safetensors"
    run("attribute", *cases["text"], "--method", "grad_dot", "--dry_run", "--output_file", file)
    assert "grad_dot: 3 queries x 12 training examples." in capsys.readouterr().out
    retraining = [*cases["text"], "--num_subsets", 3, *training(tmp_path / "runs"), "--dry_run", "--output_file", file]
    run("retrain", *retraining)
    script = ROOT / "scripts" / "retrain.py"
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, retraining)])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.count("3 trainings in") == 2
    assert not file.exists()


@pytest.fixture
def judged(tmp_path):
    """Retrainings whose outputs are the sum of known scores, and files of these scores and of random ones."""
    rng = np.random.default_rng(0)
    values, subsets = rng.normal(size=(3, 12)), Subsets.random(12, 20)
    outputs = np.repeat((subsets.masks @ values.T)[:, None], 2, axis=1)
    truth = Counterfactuals(subsets, outputs, {"name": "resampled"}, {"seconds": 80.0})
    known = Scores(values, "known", provenance={"seconds": 4.0})
    noise = Scores(rng.normal(size=(3, 12)), "noise", provenance={"seconds": 1.0})
    for name, artefact in (("truth", truth), ("known", known), ("noise", noise)):
        artefact.save(tmp_path / f"{name}.safetensors")
    return tmp_path, truth, known, noise


def test_evaluate_prints_the_report(judged, cases, capsys):
    folder, truth, known, _ = judged
    files = ["--scores", folder / "known.safetensors", "--counterfactuals", folder / "truth.safetensors"]
    run("evaluate", *files)
    assert capsys.readouterr().out == f"{evaluate_lds(known, truth)}\n"
    run("evaluate", *files, *cases["text"][2:])
    reviews = folders.reviews(12)
    assert capsys.readouterr().out == f"{evaluate_lds(known, truth, reviews)}\n"
    assert evaluate_lds(known, truth, reviews).partial_lds is not None


def test_estimate_is_the_library_s_estimate(judged, capsys):
    folder, truth, _, _ = judged
    fit, file = folder / "fit.safetensors", folder / "estimated.safetensors"
    truth.select(range(16)).save(fit)
    options = ["--counterfactuals", fit, "--method", "datamodel", "--output_file", file]
    run("estimate", *options, "--method_settings", '{"penalty": "ridge"}')
    expected = estimate(truth.select(range(16)), penalty="ridge")
    np.testing.assert_array_equal(Scores.load(file).values, expected.values)
    assert "fed datamodel" in error(
        capsys, "evaluate", "--scores", file, "--counterfactuals", folder / "truth.safetensors"
    )
    assert "Did you mean 'datamodel'" in error(capsys, "estimate", "--counterfactuals", fit, "--method", "datamodels")
    assert "no setting 'alpha'" in error(capsys, "estimate", *options, "--method_settings", '{"alpha": 1}')


def test_estimate_takes_groups_of_a_dataset_and_goes_on_from_scores(judged, cases, capsys):
    folder, truth, _, _ = judged
    few, many, file = folder / "few.safetensors", folder / "many.safetensors", folder / "estimated.safetensors"
    truth.select(range(12)).save(few)
    truth.select(range(16)).save(many)
    groups = ["--group_column", "label", *cases["text"][2:]]
    run("estimate", "--counterfactuals", few, "--output_file", file, *groups)
    first = estimate(truth.select(range(12)), group_column="label", train_dataset=folders.reviews(12))
    np.testing.assert_array_equal(Scores.load(file).values, first.values)
    run(
        "estimate",
        "--counterfactuals",
        many,
        "--previous",
        file,
        "--output_file",
        folder / "more.safetensors",
        *groups,
    )
    more = estimate(truth.select(range(16)), group_column="label", train_dataset=folders.reviews(12), previous=first)
    np.testing.assert_array_equal(Scores.load(folder / "more.safetensors").values, more.values)
    assert "name --dataset_name" in error(capsys, "estimate", "--counterfactuals", few, "--group_column", "label")


def test_evaluate_compares_methods_with_their_cost(judged, capsys):
    folder = judged[0]
    files = [folder / "noise.safetensors", folder / "known.safetensors"]
    run("evaluate", "--scores", *files, "--counterfactuals", folder / "truth.safetensors")
    table = capsys.readouterr().out.partition("Linear datamodeling scores")[2]
    assert table.index("known") < table.index("noise")
    # 80 s for 40 trainings on half of the data: 4 s for one on all.
    assert "1.00" in table
    assert "0.25" in table


def test_evaluate_speaks_json(judged, capsys):
    folder, truth, known, _ = judged
    constant = Scores(np.ones((3, 12)), "constant")
    constant.save(folder / "constant.safetensors")
    files = [folder / "known.safetensors", folder / "constant.safetensors"]
    run("evaluate", "--scores", *files, "--counterfactuals", folder / "truth.safetensors", "--json")
    first, second = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert first["scores"] == str(files[0])
    assert first["lds"] == evaluate_lds(known, truth).lds == pytest.approx(1)
    assert second["lds"] is None


def test_attribute_then_retrain_then_evaluate(cases, tmp_path, capsys):
    truth, files = tmp_path / "truth.safetensors", [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    run("retrain", *cases["text"], "--num_subsets", 6, *training(tmp_path / "runs"), "--output_file", truth)
    for method, file in zip(("grad_dot", "label_match"), files, strict=True):
        run("attribute", *cases["text"], "--method", method, "--output_file", file)
    capsys.readouterr()
    run("evaluate", "--scores", *files, "--counterfactuals", truth, *cases["text"][2:])
    printed = capsys.readouterr().out
    assert "LDS of grad_dot" in printed
    assert "given counts of 'label'" in printed


class TestErrors:
    def test_unknown_names_suggest_the_nearest(self, cases, capsys):
        assert error(capsys, "atribute").startswith("There is no command 'atribute'. Did you mean attribute?")
        assert "no option --metod. Did you mean --method?" in error(
            capsys, "attribute", *cases["text"], "--metod", "x"
        )
        assert "Did you mean 'trak'?" in error(capsys, "attribute", *cases["text"], "--method", "trakk")

    def test_settings_are_checked_first(self, cases, capsys):
        argv = ["attribute", *cases["text"], "--method_settings"]
        assert "trak has no setting 'dimm'" in error(capsys, *argv, '{"dimm": 3}')
        assert "is not JSON" in error(capsys, *argv, "dim=3")
        assert "must be a JSON object" in error(capsys, *argv, "[3]")

    def test_what_cannot_be_written_is_refused_before_anything_is_read(self, tmp_path, capsys):
        missing = options("nowhere", "./nowhere")
        assert "is a folder" in error(capsys, "attribute", *missing, "--output_file", tmp_path)
        (tmp_path / "file").touch()
        argv = ["retrain", *missing, "--output_file", tmp_path / "file" / "x"]
        assert "file" in error(capsys, *argv)

    def test_new_weights_are_not_attributed(self, cases, capsys, tmp_path):
        argv = ["attribute", *cases["new head"], "--output_file", tmp_path / "x"]
        assert "new weights" in error(capsys, *argv)

    def test_missing_files_and_foreign_ones_are_named(self, tmp_path, capsys):
        (tmp_path / "foreign").write_bytes(b"no artefact")
        argv = ["evaluate", "--scores", "x", "--counterfactuals"]
        assert "There is no counterfactuals file at nowhere" in error(capsys, *argv, "nowhere")
        assert "foreign is truncated, damaged" in error(capsys, *argv, tmp_path / "foreign")

    def test_debug_shows_the_traceback(self):
        with pytest.raises(ValueError, match="There is no command"):
            main(["--debug", "nonsense"])

    def test_interrupted_retraining_says_that_it_goes_on(self, cases, tmp_path, monkeypatch, capsys):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "train", interrupt)
        argv = ["retrain", *cases["text"], *training(tmp_path / "runs"), "--output_file", tmp_path / "x"]
        assert main([str(each) for each in argv]) == 130
        assert "goes on from there" in capsys.readouterr().err


class TestHelp:
    def test_help_is_cheap_and_names_the_commands(self):
        code = (
            "import sys, time; start = time.process_time()\nfrom hf_attribution.cli import main\n"
            "try: main(['--help'])\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'datasets', 'rich'} & set(sys.modules)\n"
            "sys.exit(bool(heavy) or time.process_time() - start > 0.8)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        for command in ("demo", "attribute", "retrain", "evaluate", "methods"):
            assert command in done.stdout

    @pytest.mark.parametrize("command", ["demo", "attribute", "retrain", "evaluate", "methods"])
    def test_every_command_explains_itself(self, command, capsys):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert f"usage: hf-attribution {command} [options]" in text
        assert f"example:\n  hf-attribution {command}" in text
        assert "(default: None)" not in text

    def test_one_spelling_of_each_option(self, capsys):
        with pytest.raises(SystemExit):
            main(["attribute", "--help"])
        text = capsys.readouterr().out
        assert "--model_name_or_path" in text
        assert "--model-name-or-path" not in text
        assert "(default: scores.safetensors)" in " ".join(text.split())

    def test_no_command_prints_the_help(self, capsys):
        assert main([]) == 2
        assert "commands:" in capsys.readouterr().out

    def test_version(self, capsys):
        with pytest.raises(SystemExit):
            main(["--version"])
        assert capsys.readouterr().out == f"hf-attribution {hf_attribution.__version__}\n"

    def test_methods_are_listed_with_their_settings(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        run("methods")
        listed = capsys.readouterr().out
        assert all(name in listed for name in METHODS)
        assert "dim=2048" in listed
        assert "Park et al. 2023" in listed


def test_demo_is_called_with_its_options(monkeypatch):
    called = {}
    demo = types.ModuleType("hf_attribution.demo")
    demo.run_demo = lambda **settings: called.update(settings)
    monkeypatch.setitem(sys.modules, "hf_attribution.demo", demo)
    run("demo", "--acts", "digits", "shakespeare", "--output_dir", "there", "--seed", 3)
    expected = {
        "acts": ["digits", "shakespeare"],
        "full": False,
        "every_method": False,
        "output_dir": "there",
        "seed": 3,
    }
    assert called == expected
    run("demo", "--full", "--every_method")
    assert called == {
        "acts": ["digits", "reviews", "shakespeare"],
        "full": True,
        "every_method": True,
        "output_dir": "outputs/demo",
        "seed": 0,
    }


@pytest.mark.parametrize("name", ["attribute", "retrain"])
def test_scripts_do_what_the_commands_do(cases, name, tmp_path, monkeypatch, capsys):
    files = [tmp_path / "command.safetensors", tmp_path / "script.safetensors"]
    argv = [*cases["text"]]
    argv += ["--method", "grad_cos"] if name == "attribute" else ["--num_subsets", 3, *training(tmp_path / "runs")]
    argv = [str(each) for each in argv]
    run(name, *argv, "--output_file", files[0])
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv, "--output_file", str(files[1])])
    runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    kind = Scores if name == "attribute" else Counterfactuals
    command, script = (kind.load(file) for file in files)
    assert command.fingerprint == script.fingerprint


def test_options_have_help_and_one_name_each():
    from hf_attribution import arguments

    kinds = [kind for name, kind in vars(arguments).items() if name.endswith("Arguments")]
    for kind in kinds:
        assert all(field.metadata["help"] for field in dataclasses.fields(kind))
    # All options of a command in one parser: argparse refuses a name that is there twice.
    HfArgumentParser((ModelArguments, DataArguments, arguments.RetrainArguments, TrainingArguments))
