"""SOURCE: unrolled differentiation of training, approximated by a few stretches of constant curvature."""

import dataclasses
import functools
import itertools
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_attribution.curvature.elementwise import multiplied
from hf_attribution.curvature.flat import MAX_BYTES, dual_bytes, fit_dual, fit_flat
from hf_attribution.curvature.kronecker import BlockSpectrum, KroneckerCurvature
from hf_attribution.curvature.rows import CURVATURES, CurvatureRows
from hf_attribution.curvature.segments import Segment, block_matrix
from hf_attribution.gradients.directions import block_products, gradient_blocks
from hf_attribution.gradients.held import Source as Rows
from hf_attribution.gradients.moments import SecondMoments
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import times
from hf_attribution.methods.base import GradientMethod, Scored
from hf_attribution.methods.fits import kept_fit
from hf_attribution.optimizer_states import OptimizerState, read_optimizer_state
from hf_attribution.problem import Checkpoint, Problem
from hf_attribution.processes import add_up
from hf_attribution.seals import content_fingerprint, fingerprint

SOLVERS = ("auto", "dual", "ekfac", "explicit")
OPTIMIZERS = ("auto", "sgd", "adam")

# Rows of a segment's curvature up to which the decomposition of their kernel is a matter of a minute or two.
MAX_AUTO_ROWS = 6_000


@dataclasses.dataclass(frozen=True)
class Source(GradientMethod):
    """`Σ_l ∇m(query; θ_T)ᵀ S_L ... S_(l+1) (I - exp(-t_l H_l)) H_l⁻¹ ∇gain_l(example)` over segments l of one run.

    Each segment has the average curvature H_l and gradients of its checkpoints, and `t_l`, the learning rates of its
    steps added up; `S_l = exp(-t_l H_l)`. There is no damping. One long segment is the influence function, short ones
    are TracIn. The scale is that of the training loss, a mean over examples (or target tokens).

    For Adam all this is in the coordinates in which its steps are plain ones: gradients are multiplied by the root of
    `1 / (sqrt(v̂) + eps)`, averaged over the segment. EK-FAC takes that as a product of a factor for the rows and one
    for the columns of a weight; the multiplication of the queries' gradients is exact. Gradient clipping and weight
    decay are left out.

    Args:
        segments: How many; each has as many consecutive checkpoints as the others. `"auto"`: 3, or 2 where there are
            only 2 checkpoints.
        curvature: H. `"true_fisher"`: the Fisher matrix by targets drawn from the model; `"gauss_newton"`: what that
            is on average, for classifiers and regressions; `"fisher"`: the empirical Fisher matrix.
        solver: `"dual"`: exact, through the kernel of all pairs of the curvature's gradients in a segment, which are
            kept in memory, for few training examples. `"ekfac"`: approximate, for any number. `"auto"`: the exact one
            where it fits, since it predicts retraining better, by far (a small GPT-2: LDS .66 against .44).
            `"explicit"`: exact, through the matrix of all pairs of parameters, for small models. Only `"ekfac"` keeps
            its fits in `cache_dir`.
        optimizer: `"sgd"`, `"adam"` (which needs the `optimizer.pt` of the checkpoints), or `"auto"`: what these say.
        momentum: Of SGD: it multiplies the learning rate by `1 / (1 - momentum)`. `"auto"` reads `optimizer.pt`.
        seed: Seed of the drawn targets.
        modules: Patterns of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count.
    """

    segments: int | str = "auto"
    curvature: str = "true_fisher"
    solver: str = "auto"
    optimizer: str = "auto"
    momentum: float | str = "auto"
    seed: int = 0

    name: ClassVar[str] = "source"
    paper: ClassVar[str] = "Bae et al. 2024, Training data attribution via approximate unrolled differentiation"
    needs_checkpoints: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting, known in (("curvature", CURVATURES), ("solver", SOLVERS), ("optimizer", OPTIMIZERS)):
            if getattr(self, setting) not in known:
                raise ValueError(f"{setting} must be one of {', '.join(known)}, not {getattr(self, setting)}.")
        if self.segments != "auto" and int(self.segments) < 1:
            raise ValueError(f"segments must be at least 1, not {self.segments}.")
        if self.momentum != "auto" and not 0 <= float(self.momentum) < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum}.")

    def score(self, problem: Problem) -> Scored:
        """Go through the run backwards, a segment at a time, with the queries' gradients at its end."""
        sums = self._learning_rate_sums(problem.checkpoints)
        states = self._optimizer_states(problem)
        counted = np.zeros(1, np.int64)
        for batch in problem.train.batches(shared=True):
            counted += int(problem.task.num_items(batch.inputs))
        add_up(counted)
        items = int(counted[0])
        split = np.array_split(np.arange(len(sums)), self._num_segments(len(sums)))
        method = dataclasses.replace(self, solver=self._fitting_solver(problem, max(map(len, split))))
        parts = [_Part(method, problem, numbers, sums[numbers], [states[n] for n in numbers]) for numbers in split]
        segments = [part.fit(items) for part in parts]
        values = np.zeros(problem.shape, np.float32)
        total = len(sums) * values.size
        bar = tqdm(total=total, desc="gradient products", unit="pairs", leave=False, disable=not problem.progress)
        with bar:
            for final, _ in dataclasses.replace(problem, checkpoints=problem.checkpoints[-1:]).models():
                queries = problem.gradients(final, problem.task.measurement, problem.query, self.modules_of(final))
                for block in gradient_blocks(Rows(queries, problem.query)):
                    rows = torch.cat([gradients.indices for gradients in block]).numpy()
                    directions = [segments[-1].start(gradients) for gradients in block]
                    for part, segment in zip(reversed(parts), reversed(segments), strict=True):
                        moved = [
                            segment.gradients(segment.response(d), like)
                            for d, like in zip(directions, block, strict=True)
                        ]
                        values[rows] += part.products(moved, bar) / items
                        directions = [segment.back(d) for d in directions]
        choices = {
            "solver": method.solver,
            "optimizer": states[0].kind,
            "momentum": states[0].momentum,
            "total_steps": [segment.time for segment in segments],
            "checkpoints": [len(numbers) for numbers in split],
        }
        return Scored(values, choices)

    def settled(self, problem: Problem) -> "Source":
        """Choose the solver."""
        return dataclasses.replace(self, solver=self._fitting_solver(problem, len(problem.checkpoints)))

    def _num_segments(self, num_checkpoints: int) -> int:
        return int(self.segments) if self.segments != "auto" else 2 if num_checkpoints == 2 else 3

    def _fitting_solver(self, problem: Problem, num_checkpoints: int) -> str:
        """The solver; where it is to be chosen, the exact one if the largest segment's rows fit."""
        if self.solver != "auto":
            return self.solver
        fits = True
        for model, _ in dataclasses.replace(problem, checkpoints=problem.checkpoints[:1]).models():
            rows = CurvatureRows(model, problem.task, problem.train, self.curvature, self.modules_of(model), self.seed)
            num_rows = num_checkpoints * len(rows.gradients) * len(problem.train)
            fits = num_rows <= MAX_AUTO_ROWS and dual_bytes(rows, num_rows) <= MAX_BYTES
        return "dual" if fits else "ekfac"

    def _learning_rate_sums(self, checkpoints: Sequence[Checkpoint]) -> np.ndarray:
        """The learning rates of the steps that each checkpoint stands for, added up: float64 `[C]`."""
        segments = self._num_segments(len(checkpoints))
        if len(checkpoints) < segments:
            raise ValueError(
                f"source has {segments} segments, and there is no checkpoint for some ({len(checkpoints)} in all): "
                "train with save_strategy='epoch' (or 'steps') and without save_total_limit, or use fewer segments=."
            )
        for checkpoint in checkpoints:
            if checkpoint.learning_rate_sum is None or not checkpoint.learning_rate_sum > 0:
                raise ValueError(
                    f"source must know how far training went, and {checkpoint.name} does not say its learning rates: "
                    "pass checkpoints=trainer_checkpoints(output_dir), or "
                    "Checkpoint(folder, learning_rate_sum=learning rate x steps since the one before)."
                )
        return np.array([checkpoint.learning_rate_sum for checkpoint in checkpoints], dtype=np.float64)

    def _optimizer_states(self, problem: Problem) -> list[OptimizerState]:
        """What the optimiser did at each checkpoint."""
        if self.optimizer == "sgd" and self.momentum != "auto":
            return [OptimizerState("sgd", float(self.momentum), {})] * len(problem.checkpoints)
        states = []
        for checkpoint in problem.checkpoints:
            if not isinstance(checkpoint.source, Path) or not (checkpoint.source / "optimizer.pt").exists():
                raise ValueError(
                    f"source must know the optimiser, and {checkpoint.name} has no optimizer.pt: train with "
                    "save_only_model=False, or for SGD say optimizer='sgd', momentum=..."
                )
            state = read_optimizer_state(checkpoint.source, problem.model)
            if self.optimizer not in ("auto", state.kind):
                raise ValueError(f"{checkpoint.name} was trained with {state.kind}, not {self.optimizer}.")
            if self.momentum != "auto" and state.kind == "sgd":
                state = dataclasses.replace(state, momentum=float(self.momentum))
            states.append(state)
        return states


class _Part:
    """The checkpoints of one segment.

    Args:
        method: The settings.
        problem: The whole problem.
        numbers: Which checkpoints, `[C]`.
        sums: Their learning rates, added up, `[C]`.
        states: Their optimisers.
    """

    def __init__(
        self, method: Source, problem: Problem, numbers: np.ndarray, sums: np.ndarray, states: list[OptimizerState]
    ) -> None:
        self.method, self.sums, self.numbers = method, sums, numbers
        chosen = [dataclasses.replace(problem.checkpoints[number], weight=1.0) for number in numbers]
        self.problem = dataclasses.replace(problem, checkpoints=chosen)
        self.shares = (sums / sums.sum()).tolist()
        self.momentum = states[0].momentum
        self.weights = fingerprint([problem.weights[number] for number in numbers])
        scales = [state.scales for state in states]
        self.roots = {
            name: sum(share * scale[name] for share, scale in zip(self.shares, scales, strict=True)).sqrt()
            for name in scales[0]
        }

    def fit(self, items: int) -> Segment:
        """The segment, with its curvature as a mean over so many items."""
        with torch.no_grad():
            spectra = [
                dataclasses.replace(spectrum, eigenvalues=spectrum.eigenvalues / items) for spectrum in self._spectra()
            ]
        roots = {s.block.name: block_matrix(s.block, self.roots) for s in spectra} if self.roots else {}
        return Segment(tuple(spectra), float(self.sums.sum()) / (1 - self.momentum), roots)

    def products(self, directions: list[Gradients], bar: tqdm) -> np.ndarray:
        """Products of directions with the training gradients, averaged over the checkpoints: `[q, N]`."""
        total = np.zeros(1, np.float32)
        for (model, _), share in zip(self.problem.models(), self.shares, strict=True):
            _, train = self.problem.sources(model, self.method.modules_of(model))
            total = total + share * block_products(directions, train, bar)
        return total

    def _spectra(self) -> Sequence[BlockSpectrum]:
        first = dataclasses.replace(self.problem, checkpoints=self.problem.checkpoints[:1])
        (spectra,) = (self._fit_rows(model) for model, _ in first.models())
        return spectra

    def _fit_rows(self, model: nn.Module) -> Sequence[BlockSpectrum]:
        if self.method.solver == "ekfac":
            return self._kept(model).to(self.problem.device).spectra
        rows = _MeanRows(self, model)
        if self.method.solver == "explicit":
            return [fit_flat(rows)]
        return [fit_dual(rows, len(self.numbers) * len(rows.gradients) * len(self.problem.train))]

    def _kept(self, model: nn.Module) -> KroneckerCurvature:
        method, modules = self.method, self.method.modules_of(model)
        roots = {name: root.cpu().numpy() for name, root in self.roots.items()}
        settings = {
            "kind": "ekfac",
            "curvature": method.curvature,
            "seed": method.seed if method.curvature == "true_fisher" else None,
            "modules": list(modules) if modules is not None else None,
            "checkpoints": self.numbers.tolist(),
            "shares": self.shares,
            "roots": content_fingerprint("roots", roots, {}),
        }
        return kept_fit(self.problem, model, method.name, lambda: _MeanRows(self, model), settings, self.weights)


class _MeanRows(CurvatureRows):
    """The rows of the mean curvature of a segment's checkpoints, one checkpoint after the other."""

    def __init__(self, part: _Part, first: nn.Module) -> None:
        method, problem = part.method, part.problem
        super().__init__(first, problem.task, problem.train, method.curvature, method.modules_of(first), method.seed)
        self.part = part
        self.moments = rank_one(part.roots) if part.roots and method.solver == "ekfac" else None

    def by_batch(self, without: Container[int] = (), shared: bool = True) -> Iterator[Iterator[Gradients]]:
        """The batches of one checkpoint after the other; their numbers go on from checkpoint to checkpoint."""
        method, problem, numbers = self.part.method, self.part.problem, itertools.count()
        for (model, _), share, checkpoint in zip(problem.models(), self.part.shares, self.part.numbers, strict=True):
            modules, seed = method.modules_of(model), method.seed + int(checkpoint)
            rows = CurvatureRows(model, problem.task, problem.train, method.curvature, modules, seed)
            for batch, number in zip(rows.by_batch(shared=shared), numbers, strict=False):
                if number not in without:
                    yield map(functools.partial(self._transformed, share=share), batch)

    def probe(self) -> Gradients:
        """The rows of two examples."""
        return self._transformed(super().probe(), 1.0)

    def _transformed(self, gradients: Gradients, share: float) -> Gradients:
        """In the optimiser's coordinates, and with this share of the sum of outer products."""
        if self.moments is not None:
            gradients = self.moments.divide(gradients)
        elif self.part.roots:
            gradients = multiplied(gradients, self.part.roots)
        terms = {name: [times(term, share**0.5) for term in terms] for name, terms in gradients.terms.items()}
        return dataclasses.replace(gradients, terms=terms)


def rank_one(roots: dict[str, Tensor]) -> SecondMoments:
    """What to divide gradients by instead of multiplying them by the roots, so that their factors stay factors.

    Args:
        roots: Positive factors of each parameter's entries.

    Returns:
        For each parameter, as a matrix, the closest product of a factor per row and one per column, in their logs.
    """
    rows, columns = {}, {}
    for name, root in roots.items():
        logs = root.log().reshape(len(root) if root.ndim else 1, -1)
        # Gradients are divided by the root of these.
        rows[name] = (-2 * (logs.mean(1) - logs.mean())).exp()
        columns[name] = (-2 * logs.mean(0)).exp()
    return SecondMoments(rows, columns)
