"""The mean of the damped inverses of every example's own curvature, layer by layer (Kwon et al. 2024)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_attribution.curvature.damping import layer_ridges
from hf_attribution.gradients.held import Source
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import Dense, Term, dense, inner_products, squared_norms
from hf_attribution.processes import add_up


class MeanInverse:
    """`P = N⁻² Σ_j (g_j g_jᵀ + λI)⁻¹` for each layer, an approximation of `(Σ_j g_j g_jᵀ + NλI)⁻¹`.

    By the Sherman-Morrison formula `P v = (N λ)⁻¹ (v - N⁻¹ Σ_j (g_j · v) / (λ + ‖g_j‖²) g_j)` (eq. 5 of the paper,
    which leaves out N⁻¹ before the sum over examples). The training data are read once here, for the lengths, and once
    for every call.

    Args:
        train: The gradients g_j of the N training examples.
        damping: λ in units of a layer's mean squared gradient length.
        progress: Whether to show a progress bar.

    Attributes:
        ridges: λ of each layer.
    """

    def __init__(self, train: Source, damping: float, progress: bool = True) -> None:
        self.train, self.progress = train, progress
        self.layers = layers(train.gradients.parameters)
        self._lengths = {layer: torch.zeros(len(train.split), device=train.gradients.device) for layer in self.layers}
        for gradients in self._batches("gradient lengths", shared=True):
            for layer, names in self.layers.items():
                for name in names & gradients.terms.keys():
                    found = squared_norms(gradients.terms[name])
                    self._lengths[layer][gradients.indices] += found.to(self._lengths[layer])
        add_up(*self._lengths.values())
        means = {layer: float(lengths.mean(dtype=torch.float64)) for layer, lengths in self._lengths.items()}
        self.ridges = layer_ridges(damping, means)

    def __call__(self, block: Sequence[Gradients]) -> list[Gradients]:
        """The products with a block of gradients, dense."""
        return self._products(block, shared=True)

    def _products(self, block: Sequence[Gradients], shared: bool) -> list[Gradients]:
        shapes = self.train.gradients.parameters
        sums = [{name: _zeros(part, name, shapes[name]) for name in part.terms} for part in block]
        for gradients in self._batches("mean of inverses", shared):
            for layer, names in self.layers.items():
                known = names & gradients.terms.keys()
                weights = 1 / (self.ridges[layer] + self._lengths[layer][gradients.indices])
                formed = {name: dense(gradients.terms[name]) for name in known}
                for part, total in zip(block, sums, strict=True):
                    common = known & part.terms.keys()
                    products = [inner_products(part.terms[name], [Dense(formed[name])]) for name in common]
                    if products:
                        coefficients = torch.stack(products).sum(0) * weights
                        for name in common:
                            total[name] += coefficients @ formed[name]
        if shared:
            add_up(*(total for totals in sums for total in totals.values()))
        return [self._directions(part, total) for part, total in zip(block, sums, strict=True)]

    def quadratic_forms(self, block: Sequence[Gradients]) -> list[Tensor]:
        """`gᵀ P g` of each gradient of a block."""
        found = []
        for part, directions in zip(block, self._products(block, shared=False), strict=True):
            products = [
                (directions.terms[name][0].dense() * dense(terms)).sum(1) for name, terms in part.terms.items()
            ]
            found.append(torch.stack(products).sum(0))
        return found

    def _directions(self, part: Gradients, sums: Mapping[str, Tensor]) -> Gradients:
        count = len(self.train.split)
        terms: dict[str, list[Term]] = {}
        for layer, names in self.layers.items():
            for name in names & part.terms.keys():
                values = (dense(part.terms[name]) - sums[name] / count) / (count * self.ridges[layer])
                terms[name] = [Dense(values)]
        return Gradients(part.indices, part.values, terms)

    def _batches(self, what: str, shared: bool) -> "tqdm[Gradients]":
        device, gradients = self.train.gradients.device, self.train.gradients
        split = self.train.split
        batches = (
            part for batch in split.batches(shared=shared) for part in split.in_parts(gradients, batch.to(device))
        )
        return tqdm(batches, desc=what, leave=False, disable=not self.progress)


def layers(parameters: Mapping[str, nn.Parameter]) -> dict[str, set[str]]:
    """The parameters' names by the module that owns them."""
    found: dict[str, set[str]] = {}
    for name in parameters:
        found.setdefault(name.rpartition(".")[0], set()).add(name)
    return found


def _zeros(part: Gradients, name: str, parameter: Tensor) -> Tensor:
    return part.values.new_zeros(len(part.indices), parameter.numel())
