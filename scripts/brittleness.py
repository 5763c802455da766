"""How few training examples decide a prediction? On 1,000 digits, by retraining without them.

    python scripts/brittleness.py                                   # about 15 minutes on a CPU
    python scripts/brittleness.py --methods influence trak --num_queries 20 --seeds 3

For each query and method: the smallest set of top-scored examples, up to `--max_share` of the data, without which a
ResNet-9 predicts another class, found by bisection and tried again under new seeds, beside random sets. Scores are of
`--models` models trained on random halves. Queries are the first rows of the held-out set, right or wrong.
Interrupted, the same command goes on where it stopped. Numbers are also written to `results.json`.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers import HfArgumentParser, PrinterCallback, ProgressCallback, set_seed
from transformers.utils import logging

from hf_attribution import AttributionTrainer, brittleness
from hf_attribution.demo.acts import ACTS


@dataclasses.dataclass
class Arguments:
    """Options of the demonstration."""

    methods: list[str] = dataclasses.field(default_factory=lambda: ["influence"], metadata={"help": "Methods."})
    num_queries: int = dataclasses.field(default=8, metadata={"help": "Predictions to flip."})
    max_share: float = dataclasses.field(default=0.05, metadata={"help": "Largest share of the data to remove."})
    seeds: int = dataclasses.field(default=2, metadata={"help": "Trainings without each set, and again to verify."})
    models: int = dataclasses.field(default=5, metadata={"help": "Models, on random halves, that the scores are of."})
    seed: int = dataclasses.field(default=0, metadata={"help": "Of the models and everything else."})
    output_dir: str = dataclasses.field(default="outputs/brittleness", metadata={"help": "Folder for all of it."})


def main(arguments: Arguments) -> None:
    """Attribute, and remove."""
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, digits = Path(arguments.output_dir), ACTS["digits"]
    material = digits.prepare()
    queries = material.queries(arguments.num_queries)
    trainer = AttributionTrainer(
        model_init=material.model_init,
        args=digits.training_arguments(
            folder / "run", seed=arguments.seed, data_seed=arguments.seed, save_strategy="no", logging_strategy="no"
        ),
        train_dataset=material.train,
        eval_dataset=queries,
        data_collator=material.data_collator,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    set_seed(arguments.seed)
    trainer.train()

    halves = trainer.train_ensemble(
        arguments.models, fraction=0.5, seed=arguments.seed, output_dir=folder / f"halves-{arguments.seed}"
    )
    results: dict[str, Any] = {"arguments": dataclasses.asdict(arguments)}
    for method in arguments.methods:
        started = time.perf_counter()
        scores = trainer.attribute(method=method, checkpoints=halves)
        found = brittleness(
            scores, trainer, max_share=arguments.max_share, seeds=arguments.seeds, seed=arguments.seed,
            output_dir=folder / f"{method}-{arguments.seed}",
        )  # fmt: skip
        print(found)
        print(f"{time.perf_counter() - started:.0f} s")
        results[method] = {"queries": found.to_dataset().to_list(), **found.summary()}
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    options: Any = Arguments
    main(*HfArgumentParser(options).parse_args_into_dataclasses())
