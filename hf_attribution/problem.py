"""What an attribution method is given: a model and its checkpoints, a task, training examples and queries."""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_attribution.adapters import adapters_trainable
from hf_attribution.artefacts import fingerprint
from hf_attribution.curvature.parts import Layout, module_layout, part_products, token_layout
from hf_attribution.curvature.ridge import in_memory
from hf_attribution.data import Split
from hf_attribution.gradients.directions import Preconditioner
from hf_attribution.gradients.features import compute_features
from hf_attribution.gradients.held import Source
from hf_attribution.gradients.moments import DividedGradients, SecondMoments
from hf_attribution.gradients.per_example import PerExampleGradients
from hf_attribution.gradients.products import gradient_products, squared_lengths
from hf_attribution.gradients.projections import Projection
from hf_attribution.gradients.stored import StoredProducts, StoredScores, as_stored, unit_length
from hf_attribution.inputs import evaluating, weights_fingerprint
from hf_attribution.processes import from_main
from hf_attribution.replay.run import RecordedRun
from hf_attribution.store import FeatureStore
from hf_attribution.tasks import Task
from hf_attribution.weights import copy_to_load_into, load_weights


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights of a model: the model itself, or a folder that `save_pretrained` or the Trainer wrote.

    Args:
        source: The folder, or the model.
        weight: How much it counts in an average over checkpoints.
        learning_rate_sum: The learning rates of the optimiser steps that it stands for, added up, where known.
    """

    source: Path | nn.Module
    weight: float = 1.0
    learning_rate_sum: float | None = None

    @property
    def name(self) -> str:
        """The folder's path, or the model's class."""
        return str(self.source) if isinstance(self.source, Path) else type(self.source).__name__


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attribution problem. Methods ask it for gradients, features and products, and never touch a dataset.

    Args:
        model: The user's model. It is never changed.
        task: Its task.
        train: The training examples as the model sees them.
        query: The queries as the model sees them.
        train_dataset: The training dataset with all its columns.
        query_dataset: The query dataset with all its columns.
        checkpoints: The weights to attribute with.
        cache_dir: Where stored features are kept.
        progress: Whether to show progress bars.
        store_dtype: The number format that they are kept in.
        run: The recorded training, for methods that differentiate through it.
        train_masked: Trains on subsets and records each training, for methods that differentiate through those; see
            `AttributionMixin.attribute`.
        outlasting: Whether `cache_dir` is still there in the next call.
        begun: What `unfinished` gave.
    """

    model: nn.Module
    task: Task
    train: Split
    query: Split
    train_dataset: Any
    query_dataset: Any
    checkpoints: Sequence[Checkpoint]
    cache_dir: Path
    progress: bool = True
    store_dtype: str = "float32"
    run: RecordedRun | None = None
    train_masked: Callable[..., Any] | None = None
    outlasting: bool = False
    begun: list[Path] = dataclasses.field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of training examples."""
        return len(self.query), len(self.train)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def models(self) -> Iterator[tuple[nn.Module, float]]:
        """Each checkpoint's model in `eval()` mode, one at a time, with its share of the average over checkpoints.

        Yields:
            A model, valid until the next one, and its weight divided by the number of checkpoints.
        """
        loaded: nn.Module | None = None
        for checkpoint in self.checkpoints:
            if isinstance(checkpoint.source, nn.Module):
                model = checkpoint.source
            else:
                if loaded is None:
                    folders = [c.source for c in self.checkpoints if isinstance(c.source, Path)]
                    loaded = copy_to_load_into(self.model, folders)
                model = load_weights(loaded, checkpoint.source)
            with evaluating(model), adapters_trainable(model):
                yield model, checkpoint.weight / len(self.checkpoints)

    def average(self, function: Callable[[nn.Module, int], np.ndarray]) -> np.ndarray:
        """The average over the checkpoints, by their weights, of what a function makes of their models.

        Args:
            function: Takes a model and its number.

        Returns:
            float32.
        """
        parts = (share * function(model, number) for number, (model, share) in enumerate(self.models()))
        total = next(parts)
        for part in parts:
            total = total + part
        return total.astype(np.float32, copy=False)

    def average_parts(
        self, function: Callable[[nn.Module, int], tuple[Layout, np.ndarray]]
    ) -> tuple[Layout, np.ndarray]:
        """The same of a function that says, beside its values, what their columns are: the same for all models."""
        layouts: list[Layout] = []

        def values(model: nn.Module, number: int) -> np.ndarray:
            layout, found = function(model, number)
            layouts.append(layout)
            return found

        total = self.average(values)
        return layouts[0], total

    def gradients(
        self, model: nn.Module, function: Callable[..., Tensor], split: Split, modules: Sequence[str] | None = None
    ) -> PerExampleGradients:
        """What computes the gradients of `function(model, inputs) -> [B]` for the rows of a split."""
        return PerExampleGradients(model, function, split.probe().to(self.device), modules)

    def products(
        self,
        model: nn.Module,
        modules: Sequence[str] | None = None,
        dim: int | None = None,
        seed: int = 0,
        normalize: bool = False,
    ) -> np.ndarray:
        """Inner products of the queries' measurement gradients with the gradients that training follows.

        Args:
            model: A model of `models()`.
            modules: Patterns of the modules whose parameters count.
            dim: Project the gradients to this dimension; `None` for exact products.
            seed: Seed of the projection.
            normalize: Whether to take cosines.

        Returns:
            float32 `[Q, N]`.
        """
        if dim is not None:
            return StoredScores([self.stored_products(model, modules, dim, seed, normalize)]).matrix()
        queries, train = self.sources(model, modules)
        unfinished = self.unfinished(lambda: (weights_fingerprint(model), list(modules or ()), normalize))
        return gradient_products(queries, train, normalize, self.progress, unfinished)

    def stored_products(
        self,
        model: nn.Module,
        modules: Sequence[str] | None,
        dim: int,
        seed: int = 0,
        normalize: bool = False,
    ) -> StoredProducts:
        """Inner products of projected gradients, from stored features; else as `products`."""
        projection, vectors = Projection(dim, seed), unit_length if normalize else as_stored
        train = self.features(model, self.task.gains, self.train, projection, modules)
        queries = in_memory(self.features(model, self.task.measurement, self.query, projection, modules))
        return StoredProducts(vectors(slice(None), queries), train, vectors)

    def stored_sum(self, function: Callable[[nn.Module, int], StoredProducts]) -> StoredScores:
        """The average over the checkpoints, by their weights, of what a function gives for a model and its number."""
        terms = []
        for number, (model, share) in enumerate(self.models()):
            products = function(model, number)
            terms.append(dataclasses.replace(products, queries=share * products.queries))
        return StoredScores(terms)

    def unfinished(self, what: Callable[[], Any]) -> Path | None:
        """How the names of files begin that say how far a pass for scores has come, see `Filling`.

        They are deleted when all scores are there.

        Args:
            what: Gives what the pass depends on beside data, task and the problem's weights: JSON.

        Returns:
            `None` where no later call could take them up: without a `cache_dir`, or of a stream.
        """
        if not self.outlasting or self.train.streamed:
            return None
        inputs = [split.inputs_fingerprint for split in (self.train, self.query)]
        key = fingerprint(what(), inputs, self.fingerprints, importlib.import_module("hf_attribution").__version__)
        path = self.cache_dir / "unfinished" / f"scores-{key}"
        self.begun.append(path)
        return path

    def sources(self, model: nn.Module, modules: Sequence[str] | None = None) -> tuple[Source, Source]:
        """The gradients of the queries' measurements, and of what training on the examples raises."""
        queries = self.gradients(model, self.task.measurement, self.query, modules)
        train = self.gradients(model, self.task.gains, self.train, modules)
        return Source(queries, self.query), Source(train, self.train)

    def part_products(
        self,
        model: nn.Module,
        granularity: str,
        preconditioner: Preconditioner,
        modules: Sequence[str] | None = None,
    ) -> tuple[Layout, np.ndarray]:
        """Inner products of preconditioned query gradients with the parts of training gradients.

        Args:
            model: A model of `models()`.
            granularity: `"module"` or `"token"`.
            preconditioner: What is applied to the queries' gradients.
            modules: Patterns of the modules whose parameters count.

        Returns:
            What the parts are, and float32 `[Q, K]`.
        """
        queries, train = self.sources(model, modules)
        layout = module_layout(train) if granularity == "module" else token_layout(train, model)
        return layout, part_products(queries, train, preconditioner, layout, model, self.progress)

    def squared_lengths(
        self, model: nn.Module, modules: Sequence[str] | None = None, dim: int | None = None, seed: int = 0
    ) -> np.ndarray:
        """Squared lengths of the training examples' gradients.

        Args:
            model: A model of `models()`.
            modules: Patterns of the modules whose parameters count.
            dim: Project the gradients to this dimension; `None` for exact lengths.
            seed: Seed of the projection.

        Returns:
            float32 `[N]`.
        """
        if dim is not None:
            train = self.features(model, self.task.gains, self.train, Projection(dim, seed), modules)
            return torch.cat([block.square().sum(1) for _, block in train.blocks()]).numpy()
        train_gradients = self.gradients(model, self.task.gains, self.train, modules)
        return squared_lengths(Source(train_gradients, self.train)).float().numpy()

    def features(
        self,
        model: nn.Module,
        function: Callable[..., Tensor],
        split: Split,
        projection: Projection,
        modules: Sequence[str] | None = None,
        moments: SecondMoments | None = None,
    ) -> FeatureStore:
        """The stored projected gradients of a split, computed if they are not there yet.

        Args:
            model: A model of `models()`.
            function: A method of the task: `task.gains`, `task.measurement`, ...
            split: `train` or `query`.
            projection: The projection.
            modules: Patterns of the modules whose parameters count.
            moments: Divide the gradients by the roots of these second moments before they are projected.

        Returns:
            Features of every row of the split.
        """
        task = getattr(function, "__self__", self.task)
        settings = {
            "model": weights_fingerprint(model),
            "data": split.fingerprint if not split.streamed else None,
            "inputs": split.inputs_fingerprint,
            "task": task.description,
            "function": function.__name__,
            "projection": dataclasses.asdict(projection),
            "modules": list(modules) if modules is not None else None,
            "moments": moments.fingerprint if moments is not None else None,
        }
        path = self.cache_dir / "features" / f"{split.name}-{fingerprint(self.store_dtype, settings)}"
        if not split.streamed and from_main(path.exists):
            return FeatureStore(path)
        gradients = self.gradients(model, function, split, modules)
        divided = DividedGradients(gradients, moments) if moments is not None else gradients
        return compute_features(
            path, split, divided, projection, settings, self.device, self.progress, self.store_dtype
        )

    @functools.cached_property
    def weights(self) -> list[str]:
        """A hash of each checkpoint's weights."""
        return [weights_fingerprint(model) for model, _ in self.models()]

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """What scores of this problem belong to: hashes of the weights, training data, queries and task."""
        return {
            "model": self.weights[0] if len(self.weights) == 1 else fingerprint(self.weights),
            "train": self.train.fingerprint,
            "query": self.query.fingerprint,
            "task": fingerprint(json.dumps(self.task.description, sort_keys=True)),
        }
