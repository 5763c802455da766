"""TracIn over every step of a recorded run: what each step's examples did to the queries at that step."""

import dataclasses
from typing import Any, ClassVar

import numpy as np
from tqdm.auto import tqdm

from hf_attribution.errors import UnsupportedError
from hf_attribution.gradients.held import Source
from hf_attribution.gradients.products import gradient_products
from hf_attribution.inputs import evaluating
from hf_attribution.methods.base import Method, Scored
from hf_attribution.problem import Problem
from hf_attribution.replay.products import FlatModel
from hf_attribution.replay.run import Replay
from hf_attribution.replay.trials import find_rule


@dataclasses.dataclass(frozen=True)
class TracInIdeal(Method):
    """`Σ_t η_t Σ_{i in batch t} ⟨∇m(query; θ_t), -∇loss_i(θ_t)⟩ / d_t` over the steps t of a recorded run.

    An example counts in the steps that it took part in, with their learning rates, and by what the step's loss was
    divided by. It is the first-order part of `Unroll`, without what the changed parameters do to later steps:
    momentum, Adam's scales, clipping and weight decay are left out. The queries' gradients are computed at every step.
    """

    name: ClassVar[str] = "tracin_ideal"
    paper: ClassVar[str] = "Pruthi et al. 2020, Estimating training data influence by tracing gradient descent, (1)"
    needs_run: ClassVar[bool] = True

    def score(self, problem: Problem) -> Scored:
        """Repeat the recorded run, and multiply gradients at every step.

        Args:
            problem: Task, data, and the recorded run.

        Returns:
            Values `[Q, N]`; the number of steps, and how the recorded training divided its losses.

        Raises:
            ValueError: If there is no recorded run.
            UnsupportedError: If parameter groups have learning rates of their own.
        """
        if problem.run is None:
            raise ValueError(
                f"{self.name} follows a recorded training: train an AttributionTrainer(..., record=True), then call "
                f"trainer.attribute(queries, method={self.name!r})."
            )
        recording = problem.run.recording
        steps = range(recording.first, len(recording))
        if any(len(set(recording.step(step).rates)) > 1 for step in steps):
            raise UnsupportedError(
                f"{self.name} has one learning rate for a step, and this training had one for each parameter group: "
                "use method='unroll'."
            )
        replay = Replay(problem.run, problem.task)
        replay.load(recording.first, recording.state(recording.first))
        rule = find_rule(replay, FlatModel(replay.model, problem.task, recording.names))
        with evaluating(replay.model):
            queries = problem.gradients(replay.model, problem.task.measurement, problem.query)
            train = problem.gradients(replay.model, problem.task.gains, problem.train)
        values = np.zeros(problem.shape, np.float64)
        for step in tqdm(steps, desc=self.name, unit="step", disable=not problem.progress):
            rate = recording.step(step).rates[0]
            for part in replay.parts(step):
                rows, counts = np.unique(part.rows.numpy(), return_counts=True)
                only = np.zeros(len(problem.train), dtype=bool)
                only[rows] = True
                with evaluating(replay.model):
                    found = gradient_products(
                        Source(queries, problem.query), Source(train, problem.train, only), progress=False
                    )
                values[:, rows] += found[:, rows] * counts * (rate / part.denominator)
            replay.advance()
        choices: dict[str, Any] = {"steps": len(steps), "loss_divided_by": rule}
        return Scored(values.astype(np.float32), choices)
