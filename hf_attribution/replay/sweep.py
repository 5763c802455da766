"""One sweep through a training: the derivative of what it ends with by the weights of the training examples.

Training with weights w takes `θ', s' = step(θ, s, Σ_i w_i ∇l_i(θ) / d)`, and a measurement of the last parameters is a
function of w. Going back, the cotangents by a step's state become those by the state before it, through the optimiser
(in closed form) and through the gradient (a product with the loss' Hessian). An example's score is the sum over its
steps of `u·∇l_i / d`, with u the cotangent by the step's gradient: reverse-mode differentiation of the whole
training (Maclaurin et al. 2015; Engstrom et al. 2025; Ilyas & Engstrom 2025), for many measurements at once.

Forward, the same derivatives carry a change of the weights to the change of the last parameters: one tangent for each
group of examples serves any number of measurements.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import get_max_memory
from torch import Tensor, nn

from hf_attribution.errors import NonFiniteError
from hf_attribution.replay.parameters import put_flat
from hf_attribution.replay.products import FlatModel, Product, in_chunks
from hf_attribution.replay.run import RecordedRun, Replay
from hf_attribution.replay.storage import backward_in_time
from hf_attribution.replay.trials import check_separate, choose_product, find_rule
from hf_attribution.seeds import random_state_kept
from hf_attribution.tasks import Task

# Vectors whose products are tried to be taken at once, and how much slower a size may be before larger ones are not.
_CHUNKS = (1, 4, 16, 64)
_WORSE = 1.2

# The shares of free memory that states of the run, cotangents, and products may take.
_STATES_SHARE, _COTANGENTS_SHARE, _PRODUCTS_SHARE = 0.25, 0.25, 0.25

# What a product with one vector takes, in units of what a forward pass keeps: up to 5.4 were measured.
_PER_VECTOR = 6


@dataclasses.dataclass
class Standing:
    """How far a sweep back has come.

    Args:
        step: The step it has gone back through last.
        cotangents: By parameters and moments before that step, `[M, P]` each.
        scores: Of the steps so far, `[M, N]`.
        lengths: Of the cotangents by the parameters, from the end on, `[M]` each.
    """

    step: int
    cotangents: list[Tensor]
    scores: Tensor
    lengths: list[Tensor]


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
        replay.advance()  # what is not repeatable at all shows here
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
        self._go_to(replay, len(recording))
        return replay.state()[0]

    def load(self, model: nn.Module, parameters: Tensor) -> nn.Module:
        """Put flat parameters `[P]` into a model of the run's architecture."""
        put_flat(model, self.flat.names, parameters)
        return model

    def fitting_block(self) -> int:
        """How many measurements can be differentiated at once in the memory that is free."""
        replay_copies = 1 + len(self.run.recording.optimizer.moments)
        # Cotangents, those by the gradient, and the product with its intermediate results.
        numbers = (replay_copies + 4) * sum(self.flat.sizes) + self.run.recording.header["num_examples"]
        return max(1, int(_COTANGENTS_SHARE * self._free_memory() // (numbers * self._itemsize)))

    def fitting_storage(self, weights: Tensor | None) -> str:
        """The storage that repeats least in the memory that is free."""
        recording = self.run.recording
        size = (2 + len(recording.optimizer.moments)) * sum(self.flat.sizes) * self._itemsize
        steps, room = len(recording) - recording.first, _STATES_SHARE * self._free_memory()
        if weights is not None and steps * size < room:
            return "full"
        spacing = recording.header["spacing"] if weights is None else 2 * (int(steps**0.5) + 1)
        return "sqrt" if spacing * size < room else "tree"

    def fastest_chunk(self, num_vectors: int) -> int:
        """How many products at once are fastest of those that fit into memory, found out by trying."""
        replay, first = self.replay(), self.run.recording.first
        replay.load(first, self.run.recording.state(first))
        part, parameters = replay.parts(first)[0], replay.state()[0]
        weights = torch.full((len(part.rows),), 1 / part.denominator, dtype=parameters.dtype, device=parameters.device)
        # On a CPU its own time, whatever else the machine is busy with.
        clock = time.process_time if parameters.device.type == "cpu" else time.perf_counter
        fastest, best = 1, float("inf")
        with random_state_kept():
            needed = _PER_VECTOR * self.flat.saved_bytes(parameters, part.inputs)
        fitting = max(1, int(_PRODUCTS_SHARE * self._free_memory() // max(1, needed)))
        for size in (size for size in _CHUNKS if size < 2 * num_vectors and size <= fitting):
            vectors = parameters.new_zeros(size, len(parameters))
            seconds = []
            with random_state_kept():
                for _ in range(3):
                    started = clock()
                    self.product(parameters, part.inputs, weights, vectors)[0].sum().item()
                    seconds.append((clock() - started) / size)
            if min(seconds) < best:
                fastest, best = size, min(seconds)
            elif min(seconds) > _WORSE * best:
                break
        return fastest

    @property
    def _itemsize(self) -> int:
        return next(self.flat.model.parameters()).element_size()

    def _free_memory(self) -> int:
        device = next(self.flat.model.parameters()).device
        return get_max_memory()["cpu" if device.type == "cpu" else device.index or 0]

    def sweep(
        self,
        targets: Tensor,
        weights: Tensor | None = None,
        first: int | None = None,
        storage: str = "sqrt",
        chunk: int = 16,
    ) -> tuple[Tensor, list[Tensor]]:
        """Differentiate measurements of the last parameters by all examples' weights.

        Args:
            targets: The measurements' gradients by the last parameters, `[M, P]`. They are overwritten.
            weights: Weights of the examples, `[N]`, to differentiate at, instead of those of the recorded run.
            first: The step to go back to, by default the first.
            storage: One of `STORAGES`.
            chunk: How many products with the curvature are taken at once.

        Returns:
            Derivatives `[M, N]`, and the lengths of the cotangents after each step back, `[M]` each.

        Raises:
            NonFiniteError: If the cotangents overflow; the message names the step.
        """
        standing = self.start(targets)
        for _ in self.go_back(standing, weights, first, storage, chunk):
            pass
        return standing.scores, standing.lengths

    def start(self, targets: Tensor) -> Standing:
        """A sweep at the end of the training, before its first step back.

        Args:
            targets: The measurements' gradients by the last parameters, `[M, P]`. They are overwritten.

        Returns:
            Where it stands.
        """
        recording = self.run.recording
        return Standing(
            step=len(recording),
            cotangents=[targets, *(torch.zeros_like(targets) for _ in recording.optimizer.moments)],
            scores=targets.new_zeros(len(targets), recording.header["num_examples"]),
            lengths=[targets.norm(dim=1)],
        )

    def go_back(
        self,
        standing: Standing,
        weights: Tensor | None = None,
        first: int | None = None,
        storage: str = "sqrt",
        chunk: int = 16,
    ) -> Iterator[Standing]:
        """Go on with a sweep from where it stands; however often it was broken off, the bits are the same.

        Args:
            standing: Where it stands. It is changed.
            weights: As for `sweep`, like the others.
            first: The step to go back to.
            storage: One of `STORAGES`.
            chunk: How many products are taken at once.

        Yields:
            Where it stands after each step.

        Raises:
            NonFiniteError: If the cotangents overflow; the message names the step.
        """
        replay, recording = self.replay(weights), self.run.recording
        product, factors = in_chunks(self.product, chunk), replay.example_weights
        cotangents, scores = standing.cotangents, standing.scores
        first = recording.first if first is None else first
        for moment in backward_in_time(replay, first, storage, standing.step):
            rates = recording.step(moment.step).rates
            by_gradient = replay.optimizer.derivative(rates=rates, **moment._asdict()).pull_back(cotangents)
            for part in replay.parts(moment.step):
                coefficients = factors[part.rows].to(scores) / part.denominator
                with random_state_kept():
                    part.random.restore()
                    found, tangents = product(moment.before[0], part.inputs, coefficients, by_gradient)
                cotangents[0] += found
                scores.index_add_(1, part.rows.to(scores.device), tangents / part.denominator)
            standing.lengths.append(cotangents[0].norm(dim=1))
            where = f"{len(recording) - moment.step} steps before the end (step {moment.step})"
            _refuse_non_finite(standing.lengths[-1], "query row", where)
            standing.step = moment.step
            yield standing

    def push(
        self,
        directions: Tensor,
        weights: Tensor | None = None,
        first: int | None = None,
        chunk: int = 16,
        progress: Callable[[], Any] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Differentiate the last parameters by the examples' weights along some directions, going forward.

        Args:
            directions: Changes of the weights, `[G, N]`.
            weights: Weights of the examples, `[N]`, to differentiate at, instead of those of the recorded run.
            first: The step from which on the weights change, by default the first.
            chunk: How many products with the curvature are taken at once.
            progress: Called after every step.

        Returns:
            Tangents of the last parameters `[G, P]`, and their lengths after each step, `[G]` each.

        Raises:
            NonFiniteError: If the tangents overflow; the message names the step.
        """
        replay, recording = self.replay(weights), self.run.recording
        product, factors = in_chunks(self.product, chunk), replay.example_weights
        start = recording.first if first is None else first
        self._go_to(replay, start)
        states = replay.state()
        tangents = [part.new_zeros(len(directions), len(part)) for part in states]
        lengths: list[Tensor] = []
        for step in range(start, len(recording)):
            before, gradient, after = states, replay.advance(), replay.state()
            of_gradient = torch.zeros_like(tangents[0])
            for part in replay.parts(step):
                coefficients = factors[part.rows].to(gradient) / part.denominator
                changes = directions[:, part.rows].to(gradient) / part.denominator
                with random_state_kept():
                    part.random.restore()
                    of_gradient += product(before[0], part.inputs, coefficients, tangents[0])[0]
                    part.random.restore()
                    of_gradient += self.flat.gradients(before[0], part.inputs, changes)
            rates = recording.step(step).rates
            replay.optimizer.derivative(step, rates, before, after, gradient).push_forward(tangents, of_gradient)
            states = after
            lengths.append(tangents[0].norm(dim=1))
            _refuse_non_finite(lengths[-1], "group", f"after step {step} of {len(recording)}")
            if progress is not None:
                progress()
        return tangents[0], lengths

    def _go_to(self, replay: Replay, step: int) -> None:
        """Take a replay to a step, from the last state before it that is kept."""
        recording = self.run.recording
        # Another training than the recorded one shares only its beginning.
        kept = [each for each in recording.checkpoints if each <= step] if replay.weights is None else []
        start = kept[-1] if kept else recording.first
        replay.load(start, recording.state(start))
        while replay.step < step:
            replay.advance()


def _refuse_non_finite(lengths: Tensor, who: str, where: str) -> None:
    if not bool(lengths.isfinite().all()):
        raise NonFiniteError(
            f"The derivative of {who} {int((~lengths.isfinite()).nonzero()[0])} is not finite {where}: the training "
            "is too unstable to differentiate that far. Use a lower learning rate, a larger Adam epsilon, or last=."
        )
