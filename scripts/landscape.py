"""How well does each method predict retraining, and at what cost? The field's summary figure, for any model and data.

    python scripts/landscape.py scripts/recipes/qnli_bert.yaml
    python scripts/landscape.py scripts/recipes/qnli_bert.yaml --max_train_examples 2000 --output_dir outputs/small
    python scripts/landscape.py \
        --model_name_or_path google-bert/bert-base-uncased --task text-classification \
        --dataset_name nyu-mll/glue --dataset_config_name sst2 --max_train_examples 2000 --max_query_examples 100 \
        --methods label_match grad_cos trak trak@half:5 'influence{"damping": 0.3}@half:5' datamodel@half:50 \
        --num_subsets 50 --seeds 2 --output_dir outputs/sst2

A method is written `name`, with settings as JSON behind it where the defaults are not meant, and with the models that
it is given: `trak` has the one trained model, `trak@full:5` five models trained on everything with other seeds,
`trak@half:5` five trained on random halves. Direct estimation (`datamodel`, `banzhaf`, ...) has models trained on
halves, too, but only their outputs: `datamodel@half:100`. Models are shared by the methods that ask for them.

Everything is kept in `--output_dir`: trainings, and the scores of each method. Interrupted, the same command goes on
where it stopped; with more methods, subsets or models it adds to what is there. Written there: `landscape.csv`,
`landscape.png` and `landscape/`, a dataset for `datasets.load_from_disk`.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from datasets import Dataset
from rich.console import Console
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

import hf_attribution.demo.models  # noqa: F401  (registers ResNet-9 with AutoModelForImageClassification)
from hf_attribution import METHODS, AttributionTrainer, Counterfactuals, Ensemble, Scores, evaluate_lds
from hf_attribution.arguments import DataArguments, ModelArguments, option
from hf_attribution.artefacts import fingerprint
from hf_attribution.methods import get_method
from hf_attribution.report.comparison import Entry, comparison_table
from hf_attribution.report.plots import plot_cost
from hf_attribution.seeds import derive_seed
from hf_attribution.weights import load_weights
from hf_attribution.workspace import Workspace, load_workspace

FRACTIONS = {"half": 0.5, "full": 1.0}
_NOTATION = re.compile(r"(?P<name>\w+)(?P<settings>\{.*\})?(?:@(?P<kind>half|full):(?P<number>[1-9]\d*))?")


@dataclasses.dataclass
class LandscapeArguments:
    """Which methods, and how many retrainings judge them."""

    _argument_group_name: ClassVar[str] = "landscape"

    methods: list[str] = dataclasses.field(
        default_factory=lambda: [
            "random", "label_match", "representation_similarity", "grad_cos", "trak", "influence", "trak@half:5",
            "influence@half:5", "datamodel@half:20", "datamodel@half:50", "datamodel@half:100",
        ],
        metadata={"help": "Methods: name, name@half:5, name@full:5, 'name{\"setting\": 1}@half:5'."},
    )  # fmt: skip
    num_subsets: int = option("Random subsets of the training data that all methods are judged by.", 100)
    fraction: float = option("Fraction of the training data in each subset.", 0.5)
    seeds: int = option("Trainings on each subset. Two or more are needed for a noise ceiling.", 2)
    group_column: str | None = option("Column whose counts give the partial LDS. By default the label.")
    momentum: float = option("Momentum of --optim sgd; the Trainer's has none.", 0.0)
    title: str = option("What stands above table and figure.", "How well scores predict retraining")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A method with its settings and the models that it is given."""

    label: str
    name: str
    settings: dict[str, Any]
    kind: str | None
    number: int

    @property
    def is_estimator(self) -> bool:
        """Whether it sees outputs of retrained models, and nothing else."""
        return self.name not in METHODS

    def check(self, training_args: TrainingArguments) -> None:
        """Refuse now what would fail after hours.

        Args:
            training_args: How the model is trained.

        Raises:
            ValueError: The message names the method and what to write instead.
        """
        if self.is_estimator:
            from hf_attribution.estimation import get_estimator

            get_estimator(self.name, **self.settings)
            if self.kind != "half":
                raise ValueError(f"{self.label} needs the outputs of models trained on halves: {self.name}@half:100.")
            return
        method = get_method(self.name, **self.settings)
        if method.needs_checkpoints and self.kind is not None:
            raise ValueError(f"{self.label}: {self.name} follows one training, leave out @{self.kind}.")
        if method.needs_checkpoints and training_args.save_strategy == SaveStrategy.NO:
            raise ValueError(f"{self.label} needs checkpoints of the training: set --save_strategy epoch.")


def parse_method(text: str) -> Candidate:
    """Read the notation of a method.

    Args:
        text: For example `'trak{"dim": 4096}@half:5'`.

    Returns:
        The method.

    Raises:
        ValueError: It is not written like that.
    """
    match = _NOTATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no method: write name, name@half:5, name@full:5 or 'name{{\"setting\": 1}}'.")
    try:
        settings = json.loads(match["settings"] or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"The settings in {text!r} are not JSON: {error}.") from error
    return Candidate(text, match["name"], settings, match["kind"], int(match["number"] or 1))


def main(
    model_args: ModelArguments, data_args: DataArguments, args: LandscapeArguments, training_args: TrainingArguments
) -> list[Entry]:
    """Train, retrain, attribute with every method, and show how they compare."""
    candidates = [parse_method(text) for text in args.methods]
    for candidate in candidates:
        candidate.check(training_args)
    folder = Path(str(training_args.output_dir))

    workspace = load_workspace(model_args, data_args)
    trainer = make_trainer(workspace, args, training_args)
    train_once(trainer, folder / "model")

    # What the methods are to predict: models retrained on subsets that none of them has seen.
    truth = trainer.retrain(
        num_subsets=args.num_subsets, fraction=args.fraction, seeds=args.seeds, seed=training_args.seed,
        task=trainer_task(workspace, training_args), output_dir=folder / "truth",
    )  # fmt: skip
    # One training on all of the data, the unit of cost: a training on half of it takes half as long.
    unit = truth.provenance["seconds"] / (truth.outputs.shape[0] * truth.outputs.shape[1]) / args.fraction

    sources = Sources(trainer, workspace, training_args, folder, candidates)
    entries = []
    for candidate in candidates:
        scores = sources.scores(candidate)
        report = evaluate_lds(scores, truth, workspace.train, group_column=args.group_column)
        trainings = FRACTIONS[candidate.kind] * candidate.number if candidate.kind is not None else 0.0
        own = scores.provenance.get("fit_seconds", scores.provenance["seconds"])
        entries.append(Entry(candidate.label, report, own + trainings * unit, own / unit + trainings))
    show(entries, candidates, args.title, folder)
    return entries


def make_trainer(
    workspace: Workspace, args: LandscapeArguments, training_args: TrainingArguments
) -> AttributionTrainer:
    """The trainer that every training and retraining goes through."""
    settings: dict[str, Any] = {}
    if args.momentum:
        settings["optimizer_cls_and_kwargs"] = (
            torch.optim.SGD,
            {"lr": training_args.learning_rate, "momentum": args.momentum},
        )
    return AttributionTrainer(
        model=workspace.model,
        model_init=workspace.model_init,
        args=training_args,
        train_dataset=workspace.train,
        eval_dataset=workspace.query,
        data_collator=workspace.data_collator,
        processing_class=workspace.processing_class,
        **settings,
    )


def trainer_task(workspace: Workspace, training_args: TrainingArguments) -> Any:
    """What is learned and measured."""
    return dataclasses.replace(workspace.task, label_smoothing=training_args.label_smoothing_factor)


def train_once(trainer: AttributionTrainer, folder: Path) -> None:
    """Train the model that single-model methods are given, or load it where that has been done."""
    model: Any = trainer.model
    if folder.is_dir():
        load_weights(model, folder)
        return
    set_seed(trainer.args.seed)
    trainer.train()
    temporary = folder.with_name(f".{folder.name}.part")
    model = trainer.model
    model.save_pretrained(temporary)
    temporary.rename(folder)


class Sources:
    """What methods are given: the trained model, ensembles, or outputs of retrained models; and the scores they give.

    Args:
        trainer: Trains.
        workspace: The data.
        training_args: Has the seed.
        folder: Where everything is kept.
        candidates: All methods: the most models that any asks for are trained at once.
    """

    def __init__(
        self,
        trainer: AttributionTrainer,
        workspace: Workspace,
        training_args: TrainingArguments,
        folder: Path,
        candidates: Sequence[Candidate],
    ) -> None:
        self.trainer, self.folder, self.seed = trainer, folder, training_args.seed
        self.task, self.train = trainer_task(workspace, training_args), workspace.train
        self.most = {
            (kind, direct): max(
                (c.number for c in candidates if (c.kind, c.is_estimator) == (kind, direct)), default=0
            )
            for kind in FRACTIONS
            for direct in (False, True)
        }

    def scores(self, candidate: Candidate) -> Scores:
        """The scores of a method, computed or as they were kept."""
        path = self.folder / "scores" / f"{candidate.name}-{fingerprint(candidate.label)[:12]}.safetensors"
        if path.exists():
            return Scores.load(path)
        if candidate.is_estimator:
            scores = self._estimate(candidate)
        else:
            scores = self.trainer.attribute(
                method=get_method(candidate.name, **candidate.settings),
                checkpoints=self._ensemble(candidate),
                task=self.task,
                cache_dir=self.folder / "cache",
            )
        scores.save(path)
        return scores

    def _ensemble(self, candidate: Candidate) -> Ensemble | None:
        if candidate.kind is None:
            return None
        folder = self.folder / f"ensemble-{candidate.kind}"
        most, fraction = self.most[candidate.kind, False], FRACTIONS[candidate.kind]
        self.trainer.train_ensemble(most, fraction, self.seed, folder, task=self.task)
        return Ensemble.from_retraining(folder, candidate.number)

    def _estimate(self, candidate: Candidate) -> Scores:
        from hf_attribution.estimation import estimate

        # Other subsets than the methods are judged by, which `evaluate_lds` makes sure of.
        outputs: Counterfactuals = self.trainer.retrain(
            num_subsets=self.most["half", True], fraction=FRACTIONS["half"], task=self.task,
            seed=derive_seed(self.seed, "estimation"), output_dir=self.folder / "estimation",
        )  # fmt: skip
        fit = outputs.select(range(candidate.number))
        return estimate(fit, candidate.name, train_dataset=self.train, **candidate.settings)


def show(entries: Sequence[Entry], candidates: Sequence[Candidate], title: str, folder: Path) -> None:
    """Print the table; write CSV, figure and dataset."""
    console = Console()
    console.print(comparison_table(entries, title))
    plot_cost(entries, title).savefig(folder / "landscape.png")
    rows = Dataset.from_list([row(*pair) for pair in zip(entries, candidates, strict=True)])
    rows.to_csv(folder / "landscape.csv", index=False)
    rows.save_to_disk(folder / "landscape")
    console.print(f"Written to {folder}: landscape.csv, landscape.png, landscape/")


def row(entry: Entry, candidate: Candidate) -> dict[str, Any]:
    """A method as a row of the dataset."""
    report = entry.report
    low, high = report.confidence_interval
    partial_low, partial_high = report.partial_confidence_interval or (None, None)
    return {
        "method": candidate.name,
        "settings": json.dumps(candidate.settings),
        "models": f"{candidate.number} {candidate.kind or 'full'}",
        "label": entry.label,
        "seconds": entry.seconds,
        "trainings": entry.trainings,
        "lds": report.lds,
        "lds_low": low,
        "lds_high": high,
        "ceiling": report.ceiling,
        "partial_lds": report.partial_lds,
        "partial_lds_low": partial_low,
        "partial_lds_high": partial_high,
        "partial_ceiling": report.partial_ceiling,
        "num_undefined": report.num_undefined,
        "protocol": json.dumps(report.protocol),
    }


def parse(argv: Sequence[str]) -> tuple[Any, ...]:
    """Read a recipe, if the first argument is one, and then the options, which win over it."""
    options: tuple[Any, ...] = (ModelArguments, DataArguments, LandscapeArguments, TrainingArguments)
    tokens: list[str] = []
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        for name, value in yaml.safe_load(Path(argv[0]).read_text()).items():  # JSON is YAML
            tokens += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        argv = argv[1:]
    return HfArgumentParser(options).parse_args_into_dataclasses([*tokens, *argv], look_for_args_file=False)


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
