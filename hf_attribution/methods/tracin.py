"""TracIn: gradient dot products along the training run, weighted by the learning rate."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from hf_attribution.curvature.elementwise import Elementwise
from hf_attribution.curvature.parts import Identity, Layout
from hf_attribution.errors import UnsupportedError
from hf_attribution.gradients.directions import Preconditioner, directional_products, self_products
from hf_attribution.gradients.stored import StoredProducts, StoredScores
from hf_attribution.methods.base import ProductMethod, Scored
from hf_attribution.optimizer_states import read_optimizer_state
from hf_attribution.problem import Problem

OPTIMIZERS = ("sgd", "adam")


@dataclasses.dataclass(frozen=True)
class TracIn(ProductMethod):
    """TracInCP: `Σ_c η_c ⟨∇m(query; θ_c), -P_c ∇loss(example; θ_c)⟩` over checkpoints of one run.

    The checkpoints are the `checkpoint-*` folders of a Trainer, with the learning rates it saved in them.

    Args:
        dim: Project the gradients to this dimension; exact by default.
        seed: Seed of the projection.
        optimizer: `"sgd"`: P is the identity, as in the paper. `"adam"`: what Adam multiplies gradients with,
            `1 / (sqrt(v̂) + eps)`, from the `optimizer.pt` of the checkpoint.
        modules: Patterns of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count, as in the paper.
    """

    optimizer: str = "sgd"

    name: ClassVar[str] = "tracin"
    paper: ClassVar[str] = "Pruthi et al. 2020, Estimating training data influence by tracing gradient descent"
    needs_checkpoints: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer}.")
        if self.optimizer == "adam" and self.dim is not None:
            raise ValueError("optimizer='adam' multiplies whole gradients: leave dim=None.")

    def score(self, problem: Problem) -> Scored:
        """Add up the checkpoints."""
        scales = self._scales(problem)

        def one(model: nn.Module, number: int) -> np.ndarray:
            if scales is None:
                return self.products(problem, model)
            queries, train = problem.sources(model, self.modules_of(model))
            unfinished = problem.unfinished(lambda: (self.name, number, self.settings, scales[number].fingerprint))
            return directional_products(
                queries, train, scales[number], progress=problem.progress, unfinished=unfinished
            )

        return Scored(len(problem.checkpoints) * problem.average(one), self._choices(problem))

    def stored_scores(self, problem: Problem) -> StoredScores:
        """Products of projected gradients, added up over the checkpoints."""
        dim, count = self.dim, len(problem.checkpoints)
        if dim is None:
            return super().stored_scores(problem)

        def one(model: nn.Module, number: int) -> StoredProducts:
            products = problem.stored_products(model, self.modules_of(model), dim, self.seed)
            return dataclasses.replace(products, queries=count * products.queries)

        return dataclasses.replace(problem.stored_sum(one), choices=self._choices(problem))

    def self_influence(self, problem: Problem) -> np.ndarray:
        """The gradients' squared lengths, in the geometry of P, added up over the checkpoints."""
        scales = self._scales(problem)

        def one(model: nn.Module, number: int) -> np.ndarray:
            if scales is None:
                return self.squared_lengths(problem, model)
            return self_products(problem.sources(model, self.modules_of(model))[1], scales[number], problem.progress)

        return len(problem.checkpoints) * problem.average(one)

    def part_scores(self, problem: Problem, granularity: str) -> tuple[Layout, Scored]:
        """Add up the checkpoints module by module, or token by token."""
        if self.dim is not None:
            return super().part_scores(problem, granularity)
        scales = self._scales(problem)

        def one(model: nn.Module, number: int) -> tuple[Layout, np.ndarray]:
            preconditioner: Preconditioner = scales[number] if scales is not None else Identity()
            return problem.part_products(model, granularity, preconditioner, self.modules_of(model))

        layout, values = problem.average_parts(one)
        return layout, Scored(len(problem.checkpoints) * values, self._choices(problem))

    def _scales(self, problem: Problem) -> list[Elementwise] | None:
        """P of every checkpoint, read before any work; `None` for the identity."""
        if self.optimizer == "sgd":
            return None
        scales = []
        for checkpoint in problem.checkpoints:
            if not isinstance(checkpoint.source, Path):
                raise ValueError(
                    "tracin with optimizer='adam' needs the optimizer.pt of a Trainer's checkpoints, and was given a "
                    "model: pass checkpoints=trainer_checkpoints(output_dir)."
                )
            state = read_optimizer_state(checkpoint.source, problem.model)
            if state.kind != "adam":
                raise UnsupportedError(f"{checkpoint.name} was trained with {state.kind}: use optimizer='sgd'.")
            scales.append(Elementwise(state.scales))
        return scales

    def _choices(self, problem: Problem) -> dict[str, list[float]]:
        return {"learning_rates": [checkpoint.weight for checkpoint in problem.checkpoints]}
