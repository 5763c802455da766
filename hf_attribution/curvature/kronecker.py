"""Curvature in Kronecker-factored eigenbases: diagonal, K-FAC and EK-FAC, as an artefact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_attribution.artefacts import Artefact
from hf_attribution.curvature.blocks import Block, Side, quadratic_forms, scaled
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import Dense, Term
from hf_attribution.seals import plain_json

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class BlockSpectrum:
    """One block of a curvature matrix, `(U ⊗ V) diag(eigenvalues) (U ⊗ V)ᵀ`.

    Args:
        block: Which parameters it is of.
        left: The basis U of its rows.
        right: The basis V of its columns.
        eigenvalues: `[rows, columns]`, sums over training examples.
    """

    block: Block
    left: Side
    right: Side
    eigenvalues: Tensor

    @property
    def trace(self) -> float:
        """The sum of the eigenvalues: of the squared lengths of the rows of the curvature."""
        return float(self.eigenvalues.sum(dtype=torch.float64))


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerCurvature(Artefact):
    """A block-diagonal curvature matrix of the training losses, summed over examples, block by block in a basis.

    Attributes:
        spectra: The blocks.
        num_examples: N.
        provenance: What it belongs to: method, curvature, seed, `fingerprints`; JSON.

    Example:
        >>> curvature = KroneckerCurvature.load("factors.safetensors")  # doctest: +SKIP
        >>> curvature.summary().to_pandas()  # doctest: +SKIP
    """

    kind: ClassVar[str] = "curvature"

    spectra: tuple[BlockSpectrum, ...]
    num_examples: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", plain_json(self.provenance, "KroneckerCurvature.provenance"))

    def __repr__(self) -> str:
        numbers = sum(spectrum.eigenvalues.numel() for spectrum in self.spectra)
        return (
            f"KroneckerCurvature({self.provenance.get('kind', '')}, {len(self.spectra)} blocks of {numbers:,} "
            f"parameters, {self.num_examples} examples, mean squared gradient {self.unit:.4g})"
        )

    @property
    def units(self) -> dict[str, float]:
        """The trace of each block per example: the mean squared length of its part of a gradient."""
        return {spectrum.block.name: spectrum.trace / self.num_examples for spectrum in self.spectra}

    @property
    def unit(self) -> float:
        """The trace per example: the mean squared length of a gradient."""
        return sum(self.units.values())

    def summary(self) -> datasets.Dataset:
        """The blocks and their spectra.

        Returns:
            A row per block: `block`, `kind`, `rows`, `columns`, `trace` (per example), `largest` eigenvalue (per
            example) and `effective_rank`, `(Σ λ)² / Σ λ²`.
        """
        import datasets

        rows = []
        for spectrum in self.spectra:
            values = spectrum.eigenvalues.double()
            squares = float(values.square().sum())
            rows.append(
                {
                    "block": spectrum.block.name,
                    "kind": spectrum.block.kind,
                    "rows": spectrum.block.shape[0],
                    "columns": spectrum.block.shape[1],
                    "trace": spectrum.trace / self.num_examples,
                    "largest": float(values.max()) / self.num_examples,
                    "effective_rank": spectrum.trace**2 / squares if squares else 0.0,
                }
            )
        return datasets.Dataset.from_list(rows)

    def to(self, device: torch.device) -> KroneckerCurvature:
        """The same with its tensors on a device."""

        def side(one: Side) -> Side:
            return Side(one.size, tuple(vectors.to(device) for vectors in one.vectors))

        spectra = tuple(
            BlockSpectrum(s.block, side(s.left), side(s.right), s.eigenvalues.to(device)) for s in self.spectra
        )
        return KroneckerCurvature(spectra, self.num_examples, self.provenance)

    def inverse(self, ridge: float | Mapping[str, float]) -> KroneckerInverse:
        """`(H + λI)⁻¹`, with λ for all blocks, or for each by name; of a block without curvature, 1 / λ."""
        ridges = ridge if isinstance(ridge, Mapping) else {s.block.name: ridge for s in self.spectra}
        return KroneckerInverse(
            tuple(
                BlockSpectrum(s.block, s.left, s.right, 1 / (s.eigenvalues + ridges[s.block.name]))
                for s in self.spectra
            )
        )

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays, blocks = {}, []
        for number, spectrum in enumerate(self.spectra):
            arrays[f"{number}.eigenvalues"] = spectrum.eigenvalues.cpu().numpy()
            for name, side in (("left", spectrum.left), ("right", spectrum.right)):
                for run, vectors in enumerate(side.vectors):
                    arrays[f"{number}.{name}.{run}"] = vectors.cpu().numpy()
            block = spectrum.block
            runs = [len(spectrum.left.vectors), len(spectrum.right.vectors)]
            blocks.append([block.name, block.parameters, block.shape, block.kind, block.transposed, runs])
        metadata = {"blocks": blocks, "num_examples": self.num_examples, "provenance": self.provenance}
        return arrays, plain_json(metadata, "curvature")

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> KroneckerCurvature:
        spectra = []
        for number, (name, parameters, shape, kind, transposed, runs) in enumerate(metadata["blocks"]):
            left, right = (
                Side(size, tuple(_tensor(arrays, f"{number}.{side}.{run}") for run in range(count)))
                for side, size, count in zip(("left", "right"), shape, runs, strict=True)
            )
            block = Block(name, tuple(parameters), (shape[0], shape[1]), kind, transposed)
            spectra.append(BlockSpectrum(block, left, right, _tensor(arrays, f"{number}.eigenvalues")))
        return cls(tuple(spectra), metadata["num_examples"], metadata["provenance"])


@dataclass(frozen=True)
class KroneckerInverse:
    """The inverse of a damped curvature matrix, to be applied to gradients.

    Args:
        spectra: Its blocks; their eigenvalues are those of the inverse.
    """

    spectra: tuple[BlockSpectrum, ...]

    def __call__(self, block: Sequence[Gradients]) -> list[Gradients]:
        """The products with the gradients of some batches."""
        return [self._product(gradients) for gradients in block]

    def quadratic_forms(self, block: Sequence[Gradients]) -> list[Tensor]:
        """`gᵀ (H + λI)⁻¹ g` of each gradient of some batches."""
        return [self._quadratic_form(gradients) for gradients in block]

    def _product(self, gradients: Gradients) -> Gradients:
        terms: dict[str, list[Term]] = {}
        for spectrum in self.spectra:
            found = spectrum.block.matrices(gradients.terms)
            if not found:
                continue
            values = scaled(found, spectrum.left, spectrum.right, spectrum.eigenvalues)
            if isinstance(values, Tensor):
                terms.update({name: [Dense(part)] for name, part in spectrum.block.split(values).items()})
            else:
                terms[spectrum.block.parameters[0]] = values
        return Gradients(gradients.indices, gradients.values, terms)

    def _quadratic_form(self, gradients: Gradients) -> Tensor:
        total = torch.zeros_like(gradients.values)
        for spectrum in self.spectra:
            found = spectrum.block.matrices(gradients.terms)
            if found:
                total += quadratic_forms(found, spectrum.left, spectrum.right, spectrum.eigenvalues)
        return total


def _tensor(arrays: dict[str, np.ndarray], name: str) -> Tensor:
    """An array as a tensor in memory of torch, since the last bits of products depend on where their factors lie."""
    return torch.from_numpy(arrays.pop(name)).clone()
