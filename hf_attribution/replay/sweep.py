"""One sweep back through a training: the derivative of measurements by the weight of every training example.

Training with weights w takes `θ_{t+1}, s_{t+1} = step(θ_t, s_t, Σ_i w_i ∇l_i(θ_t) / d)`, and a measurement of the last
parameters is a function of w. Going back, the cotangents by a step's state become those by the state before it, through
the optimiser (in closed form) and through the gradient (a product with the loss' Hessian). An example's score is the
sum over its steps of `u·∇l_i / d`, with u the cotangent by the step's gradient: reverse-mode differentiation of the
whole training (Maclaurin et al. 2015; Engstrom et al. 2025; Ilyas & Engstrom 2025), for many measurements at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attribution.errors import NonFiniteError
from hf_attribution.replay.products import FlatModel, Product, in_chunks
from hf_attribution.replay.run import RecordedRun, Replay, random_state_kept
from hf_attribution.replay.storage import backward_in_time
from hf_attribution.replay.trials import check_separate, choose_product, find_rule
from hf_attribution.tasks import Task


@dataclasses.dataclass(frozen=True)
class Differentiable:
    """A recorded run, with what is needed to differentiate through it.

    Args:
        run: The run.
        task: Defines the losses.
        flat: The losses as functions of flat parameters.
        rule: How the recorded training divided its losses.
        product: Products with the loss' curvature.
        product_name: Which ones.
    """

    run: RecordedRun
    task: Task
    flat: FlatModel
    rule: str
    product: Product
    product_name: str

    @classmethod
    def prepare(cls, run: RecordedRun, task: Task, curvature: str = "exact") -> "Differentiable":
        """Check on the first recorded step that the training can be differentiated, and how.

        Args:
            run: The run.
            task: Defines the losses.
            curvature: `"exact"` or `"gauss_newton"`.

        Returns:
            The run, ready for sweeps.

        Raises:
            UnsupportedError: If the training's gradient is not that of the task's losses, an example's loss depends on
                the others of its batch, or there are no second derivatives.
        """
        replay, first = Replay(run, task), run.recording.first
        replay.load(first, run.recording.state(first))
        flat = FlatModel(replay.model, task, run.recording.names)
        rule = find_rule(replay, flat)
        check_separate(flat, replay.state()[0], replay.parts(first)[0])
        product, name = choose_product(flat, replay, curvature)
        return cls(run, task, flat, rule, product, name)

    def replay(self, weights: Tensor | None = None) -> Replay:
        """A replay of the run, or of the training with other weights of the examples, `[N]`."""
        return Replay(self.run, self.task, weights, self.rule)

    def final(self, weights: Tensor | None = None) -> Tensor:
        """The parameters at the end, of the recorded run or of one with other weights, `[P]`."""
        recording = self.run.recording
        if weights is None:
            return recording.state(len(recording))[0]
        replay = self.replay(weights)
        replay.load(recording.first, recording.state(recording.first))
        for _ in range(recording.first, len(recording)):
            replay.advance()
        return replay.state()[0]

    def sweep(
        self,
        targets: Tensor,
        weights: Tensor | None = None,
        first: int | None = None,
        storage: str = "sqrt",
        chunk: int = 16,
        progress: Callable[[], Any] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Differentiate measurements of the last parameters by all examples' weights.

        Args:
            targets: The measurements' gradients by the last parameters, `[M, P]`. They are overwritten.
            weights: Weights of the examples, `[N]`, to differentiate at, instead of those of the recorded run.
            first: The step to go back to, by default the first.
            storage: One of `STORAGES`.
            chunk: How many products with the curvature are taken at once.
            progress: Called after every step.

        Returns:
            Derivatives `[M, N]`, and the lengths of the cotangents after each step back, `[M]` each.

        Raises:
            NonFiniteError: If the cotangents overflow; the message names the step.
        """
        replay, recording = self.replay(weights), self.run.recording
        product, factors = in_chunks(self.product, chunk), replay.example_weights
        cotangents = [targets, *(torch.zeros_like(targets) for _ in replay.optimizer.moments)]
        scores = targets.new_zeros(len(targets), len(factors))
        lengths = [targets.norm(dim=1)]
        for moment in backward_in_time(replay, recording.first if first is None else first, storage):
            rates = recording.step(moment.step).rates
            by_gradient = replay.optimizer.pull_back(rates=rates, cotangents=cotangents, **moment._asdict())
            for part in replay.parts(moment.step):
                coefficients = factors[part.rows].to(targets) / part.denominator
                with random_state_kept():
                    part.random.restore()
                    found, tangents = product(moment.before[0], part.inputs, coefficients, by_gradient)
                cotangents[0] += found
                scores.index_add_(1, part.rows.to(scores.device), tangents / part.denominator)
            lengths.append(cotangents[0].norm(dim=1))
            if not bool(lengths[-1].isfinite().all()):
                raise NonFiniteError(
                    f"The derivative of query row {int((~lengths[-1].isfinite()).nonzero()[0])} is not finite "
                    f"{len(recording) - moment.step} steps before the end (step {moment.step}): the training is too "
                    "unstable to differentiate that far. Use a lower learning rate, a larger Adam epsilon, or last=."
                )
            if progress is not None:
                progress()
        return scores, lengths
