"""The gradients of which a curvature matrix is the sum of outer products, `H = Σ_r row rowᵀ`, batch by batch."""

import functools
import itertools
from collections.abc import Callable, Container, Iterator, Sequence

import torch
from torch import Tensor, nn

from hf_attribution.data import Batch, Split
from hf_attribution.gradients.checks import refuse_non_finite
from hf_attribution.gradients.per_example import Gradients, PerExampleGradients
from hf_attribution.gradients.terms import squared_norms
from hf_attribution.seeds import derive_seed
from hf_attribution.tasks import Batch as Inputs
from hf_attribution.tasks import Task

CURVATURES = ("true_fisher", "gauss_newton", "fisher")

_SEEDS = "hf_attribution_seeds"  # rides along in a batch's inputs, to the task


class CurvatureRows:
    """Rows of a curvature matrix of the training losses, summed over the examples.

    Processes of a launch share them: each iterates over its part, and adds up what it makes of it.

    Args:
        model: The model, in `eval()` mode.
        task: Its task.
        split: The training examples.
        curvature: `"true_fisher"`: one row an example, the gradient of its loss on targets drawn from the model; the
            matrix is the Gauss-Newton matrix on average over draws. `"gauss_newton"`: that matrix itself, one row for
            each output of a classifier or a regression. `"fisher"`: the gradients of the losses themselves.
        modules: Patterns of the modules whose parameters count.
        seed: Seed of the drawn targets. An example's own depend on it and on its position in the dataset.

    Attributes:
        gradients: What computes the rows; all on the same parameters.
    """

    def __init__(
        self, model: nn.Module, task: Task, split: Split, curvature: str, modules: Sequence[str] | None, seed: int = 0
    ) -> None:
        self.split, self.curvature, self.seed = split, curvature, seed
        self.device = next(model.parameters()).device
        probe = self._prepared(split.probe())

        def sampled(model: nn.Module, inputs: Inputs) -> Tensor:
            return task.sampled_losses(model, {k: v for k, v in inputs.items() if k != _SEEDS}, inputs[_SEEDS])

        def output(number: int, model: nn.Module, inputs: Inputs) -> Tensor:
            return task.curvature_rows(model, inputs)[0][:, number]

        functions: list[Callable[[nn.Module, Inputs], Tensor]]
        if curvature == "true_fisher":
            functions = [sampled]
        elif curvature == "fisher":
            functions = [task.losses]
        else:
            with torch.no_grad():
                count = task.curvature_rows(model, probe.inputs)[0].shape[1]
            functions = [functools.partial(output, number) for number in range(count)]
        self.gradients = [PerExampleGradients(model, function, probe, modules) for function in functions]

    def __iter__(self) -> Iterator[Gradients]:
        return itertools.chain.from_iterable(self.by_batch())

    def by_batch(self, without: Container[int] = (), shared: bool = True) -> Iterator[Iterator[Gradients]]:
        """The rows of one batch of examples after the other, which are computed as they are asked for.

        Args:
            without: Batches that are left out, by their numbers from 0 on.
            shared: Whether these are this process's share of the rows, or all.

        Yields:
            The rows of a batch, in one or several parts.
        """
        for batch in self.split.batches(shared=shared, without=without):
            yield self._rows_of(self._prepared(batch))

    def probe(self) -> Gradients:
        """The rows of two examples."""
        return self.gradients[0](self._prepared(self.split.probe()))

    def refuse_non_finite(self) -> None:
        """Find the first example whose gradient is NaN, infinite or too long, and refuse it by row and parameter."""
        for gradients in itertools.chain.from_iterable(self.by_batch(shared=False)):
            for name, terms in gradients.terms.items():
                what = f"The squared length of the gradient of {name}"
                refuse_non_finite(squared_norms(terms), gradients.indices, what)

    def _rows_of(self, batch: Batch) -> Iterator[Gradients]:
        for gradients in self.gradients:
            yield from self.split.in_parts(gradients, batch)

    def _prepared(self, batch: Batch) -> Batch:
        batch = batch.to(self.device)
        if self.curvature != "true_fisher":
            return batch
        seeds = torch.tensor([derive_seed("targets", self.seed, index) for index in batch.indices.tolist()])
        return Batch(batch.indices, {**batch.inputs, _SEEDS: seeds})
