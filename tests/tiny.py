"""A small world to train in: a linear or hidden-layer classifier of points, and trainers for it."""

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput


class PointsConfig(PretrainedConfig):
    model_type = "points"

    def __init__(self, size=3, hidden=0, dropout=0.0, norm=None, **kwargs):
        self.size, self.hidden, self.dropout, self.norm = size, hidden, dropout, norm
        super().__init__(**kwargs)


class PointsForSequenceClassification(PreTrainedModel):
    config_class = PointsConfig

    def __init__(self, config):
        super().__init__(config)
        layers = []
        if config.hidden:
            layers = [nn.Linear(config.size, config.hidden), nn.Tanh(), nn.Dropout(config.dropout)]
        if config.norm == "batch":
            layers.append(nn.BatchNorm1d(config.hidden or config.size))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(config.hidden or config.size, config.num_labels)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
            nn.init.zeros_(module.bias)

    def forward(self, points=None, labels=None):
        logits = self.head(self.body(points))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)


class CountTrainings(TrainerCallback):
    """How many trainings there were, and a fault at the start of a chosen one."""

    trainings = 0
    interrupt_at = None

    def on_train_begin(self, args, state, control, **kwargs):
        CountTrainings.trainings += 1
        if CountTrainings.trainings == CountTrainings.interrupt_at:
            raise KeyboardInterrupt


def points(rows=24, size=3, seed=0):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(rows, size)).astype(np.float32)
    labels = (inputs[:, 0] + 0.5 * generator.normal(size=rows) > 0).astype(int)
    return Dataset.from_dict({"points": inputs.tolist(), "labels": labels.tolist()})


def normal_points(rows, seed):
    """Points of three classes, told apart by nothing."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(rows, 4)).astype(np.float32)
    return Dataset.from_dict({"points": inputs, "labels": rng.integers(3, size=rows)}).with_format("torch")


class PadTokens:
    """A collator that pads on either side, to a length of choice; its labels are the rows' own, or the tokens."""

    def __init__(self, side="right", multiple=1, causal=False):
        self.side, self.multiple, self.causal = side, multiple, causal

    def __call__(self, rows):
        length = max(len(row["input_ids"]) for row in rows)
        length += -length % self.multiple
        ids, mask = torch.ones(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            tokens = torch.tensor(row["input_ids"])
            where = slice(0, len(tokens)) if self.side == "right" else slice(length - len(tokens), length)
            ids[number, where], mask[number, where] = tokens, 1
        labels = ids.masked_fill(mask == 0, -100) if self.causal else torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def model(seed=0, **config):
    torch.manual_seed(seed)
    return PointsForSequenceClassification(PointsConfig(**config))


def arguments(folder, **settings):
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | settings))


def make_trainer(trainer_class, folder, *, model_settings=None, trainer_settings=None, **settings):
    """A trainer of points; `settings` are training arguments."""
    given = {
        "model": model(**(model_settings or {})),
        "args": arguments(folder, **settings),
        "train_dataset": points(),
        "eval_dataset": points(rows=7, seed=1),
        **(trainer_settings or {}),
    }
    if "model_init" in given:
        del given["model"]
    return trainer_class(**given)


def make_counted_trainer(trainer_class, folder, **settings):
    """The same, whose trainings and those of its copies are counted."""
    settings.setdefault("trainer_settings", {}).setdefault("callbacks", [CountTrainings()])
    return make_trainer(trainer_class, folder, **settings)


def plain_training(fresh_model, args, dataset, seed, **settings):
    """What the plain Trainer makes of a model with these arguments, under this seed."""
    args = TrainingArguments(**{**args.to_dict(), "seed": seed, "data_seed": seed})
    trainer = Trainer(model=fresh_model, args=args, train_dataset=dataset, **settings)
    trainer.train()
    return trainer.model
