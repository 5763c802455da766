"""Curvature matrices of a model, known by their products with vectors."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_attribution.data import Batch, Split
from hf_attribution.gradients.held import Source
from hf_attribution.gradients.per_example import Function
from hf_attribution.processes import add_up

# Bytes of right-hand sides that are solved for at once.
BLOCK_BYTES = 2**28

# Bytes up to which the rows of a Gram matrix are kept in memory; beyond they are computed anew for every product.
ROWS_BYTES = 2**31


class FlatRows:
    """Gradients of all rows of some sources as plain vectors, kept in memory where they fit.

    Args:
        sources: What computes them; all on the same parameters.
        shared: Whether the processes of a launch share them, so that each has only its part.
    """

    def __init__(self, sources: Sequence[Source], shared: bool = False) -> None:
        self.sources, self.shared = sources, shared
        self.parameters = sources[0].gradients.parameters
        size = 4 * len(self) * sources[0].gradients.num_parameters
        self._kept: list[tuple[Tensor, Tensor]] | None = list(self._compute()) if size <= ROWS_BYTES else None

    def __len__(self) -> int:
        return sum(len(source.rows) for source in self.sources)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Dataset positions `[B]` and gradients `[B, P]`."""
        return iter(self._kept) if self._kept is not None else self._compute()

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same in as large blocks as fit in memory."""
        parts: list[tuple[Tensor, Tensor]] = []
        for part in self:
            parts.append(part)
            if sum(rows.nbytes for _, rows in parts) + part[1].nbytes > BLOCK_BYTES:
                yield stacked(parts)
                parts = []
        if parts:
            yield stacked(parts)

    def squared_norm(self) -> float:
        """The sum of all rows' squared lengths: the trace of their Gram matrix."""
        total = torch.zeros(1, dtype=torch.float64)
        for _, rows in self:
            total += rows.double().square().sum().cpu()
        if self.shared:
            add_up(total)
        return float(total)

    def _compute(self) -> Iterator[tuple[Tensor, Tensor]]:
        for source in self.sources:
            for held in source.batches(shared=self.shared):
                yield held.indices, held.flat(self.parameters)


class GramOperator:
    """Products with `H = Σ_r row rowᵀ + λI`: the empirical Fisher or the Gauss-Newton matrix, damped.

    Args:
        rows: The rows, shared.
        ridge: λ.
    """

    def __init__(self, rows: FlatRows, ridge: float) -> None:
        self.rows, self.ridge = rows, ridge

    def __call__(self, vectors: Tensor) -> Tensor:
        """Products with vectors `[R, P]`."""
        total = torch.zeros_like(vectors)
        for _, rows in self.rows:
            total += vectors @ rows.T @ rows
        add_up(total)
        return total + self.ridge * vectors


class HessianOperator:
    """Products with the Hessian of the training losses' sum, plus λI, by double backward.

    Args:
        model: The model.
        losses: The losses, `(model, inputs) -> [B]`.
        split: The training examples.
        parameters: What to differentiate with respect to.
        ridge: λ.
    """

    def __init__(
        self, model: nn.Module, losses: Function, split: Split, parameters: dict[str, nn.Parameter], ridge: float
    ) -> None:
        self.model, self.losses, self.split, self.ridge = model, losses, split, ridge
        self.parameters = list(parameters.values())

    def __call__(self, vectors: Tensor) -> Tensor:
        """Products with vectors `[R, P]`."""
        cotangents = [
            part.unflatten(1, parameter.shape)
            for part, parameter in zip(
                vectors.split([p.numel() for p in self.parameters], dim=1), self.parameters, strict=True
            )
        ]
        total = torch.zeros_like(vectors)
        for batch in self.split.batches(shared=True):
            for part in self.split.in_parts(lambda rows: self._product(rows, cotangents), batch.to(vectors.device)):
                total += part
        add_up(total)
        return total + self.ridge * vectors

    def _product(self, batch: Batch, cotangents: Sequence[Tensor]) -> Tensor:
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = self.losses(self.model, batch.inputs).sum()
            gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
            return self._differentiate(gradients, cotangents)

    def _differentiate(self, gradients: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Tensor:
        # A gradient that is constant in the parameters has no graph, and adds nothing.
        varying = [g.requires_grad for g in gradients]
        kept = [g for g, varies in zip(gradients, varying, strict=True) if varies]
        given = [c for c, varies in zip(cotangents, varying, strict=True) if varies]
        if not kept:
            return torch.zeros((), device=gradients[0].device)
        found = torch.autograd.grad(
            kept, self.parameters, given, is_grads_batched=True, materialize_grads=True, allow_unused=True
        )
        return torch.cat([values.flatten(1) for values in found], dim=1)


def stacked(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Positions `[b]` and rows `[b, P]` of some parts, one after the other."""
    indices, rows = zip(*parts, strict=True)
    return torch.cat(indices), torch.cat(rows)
