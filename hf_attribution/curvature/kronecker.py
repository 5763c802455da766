"""Curvature in Kronecker-factored eigenbases: diagonal, K-FAC and EK-FAC, as an artefact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_attribution.artefacts import Artefact
from hf_attribution.curvature.blocks import Block, Side, make_blocks, quadratic_forms, scaled, sum_of_squares
from hf_attribution.curvature.factors import FactorSums
from hf_attribution.curvature.rows import CurvatureRows
from hf_attribution.errors import NonFiniteError
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import Dense, Term
from hf_attribution.processes import add_up, is_main
from hf_attribution.seals import plain_json

if TYPE_CHECKING:
    import datasets

# Bytes of the gradients' factors that EK-FAC's first pass may keep for its second one: less than scoring takes.
KEPT_BYTES = 3 * 2**25

KINDS = ("diagonal", "kfac", "ekfac")


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
                Side(size, tuple(torch.from_numpy(arrays[f"{number}.{side}.{run}"]) for run in range(count)))
                for side, size, count in zip(("left", "right"), shape, runs, strict=True)
            )
            block = Block(name, tuple(parameters), (shape[0], shape[1]), kind, transposed)
            spectra.append(BlockSpectrum(block, left, right, torch.from_numpy(arrays[f"{number}.eigenvalues"])))
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


def fit_curvature(
    model: nn.Module, rows: CurvatureRows, kind: str, provenance: dict[str, Any] | None = None, progress: bool = True
) -> KroneckerCurvature:
    """Fit a curvature matrix to its rows, in one pass over the training data, for EK-FAC in two.

    Args:
        model: The model.
        rows: Its rows.
        kind: `"diagonal"`; `"kfac"`, the Kronecker product of two factors (Martens & Grosse 2015); `"ekfac"`, the
            same eigenvectors with the eigenvalues that fit best, the squared entries of the gradients in that basis
            (George et al. 2018). Tables are diagonal in their entries; parameters other than the weights and biases
            of linear layers, convolutions and embeddings are diagonal throughout.
        provenance: What to record.
        progress: Whether to show a progress bar.

    Returns:
        The curvature.

    Raises:
        NonFiniteError: If a gradient is NaN or infinite; the message names the row and the parameter.
    """
    parameters = rows.gradients[0].parameters
    blocks = make_blocks(model, rows.probe(), parameters)
    spectra = [BlockSpectrum(b, Side(b.shape[0]), Side(b.shape[1]), _zeros(b, parameters)) for b in blocks]
    kept = _Kept(np.zeros(len(rows.split), dtype=bool))
    if kind != "diagonal":
        spectra = _find_bases(rows, spectra, kept if kind == "ekfac" and rows.one_each else None, progress)
    if kind != "kfac":
        fixed = {"vector"} if kind == "ekfac" else set()
        _refit(rows, [s for s in spectra if s.block.kind not in fixed], kept, progress)
    for spectrum in spectra:
        if not spectrum.eigenvalues.isfinite().all():
            rows.refuse_non_finite()
            raise NonFiniteError(f"The curvature of {spectrum.block.name} is infinite: its gradients are too large.")
    return KroneckerCurvature(tuple(spectra), len(rows.split), provenance or {})


@dataclass
class _Kept:
    """The matrices of EK-FAC's first pass that the second one need not compute again.

    Args:
        examples: The examples that they are of, `[N]` bool.
        batches: Terms by block, of each batch.
        num_bytes: Their memory.
    """

    examples: np.ndarray
    batches: list[dict[str, list[Term]]] = field(default_factory=list)
    num_bytes: int = 0

    def offer(self, indices: Tensor, matrices: dict[str, list[Term]]) -> None:
        """Keep a batch if it fits."""
        tensors = (v for terms in matrices.values() for term in terms for v in vars(term).values())
        more = sum(v.nbytes for v in tensors if isinstance(v, Tensor))
        if self.num_bytes + more <= KEPT_BYTES:
            self.batches.append(matrices)
            self.examples[indices.numpy()] = True
            self.num_bytes += more


def _find_bases(
    rows: CurvatureRows, spectra: list[BlockSpectrum], kept: _Kept | None, progress: bool
) -> list[BlockSpectrum]:
    """Eigenvectors and K-FAC's eigenvalues of all blocks but vectors, of which the diagonal is summed up."""
    sums = {s.block.name: FactorSums(s.block, s.eigenvalues) for s in spectra if s.block.kind != "vector"}
    for gradients in tqdm(rows, desc="Kronecker factors", leave=False, disable=not progress):
        matrices: dict[str, list[Term]] = {}
        for spectrum in spectra:
            terms = spectrum.block.matrices(gradients.terms)
            if terms and spectrum.block.name in sums:
                sums[spectrum.block.name].add(terms)
                matrices[spectrum.block.name] = terms if kept else []
            elif terms:
                spectrum.eigenvalues.add_(sum_of_squares(terms, spectrum.left, spectrum.right))
        gradients.terms.clear()  # before the next batch needs memory for its own
        if kept:
            kept.offer(gradients.indices, matrices)
    diagonal = [spectrum.eigenvalues for spectrum in spectra if spectrum.block.name not in sums]
    add_up(*diagonal, *(tensor for total in sums.values() for tensor in total.tensors()))
    return [BlockSpectrum(s.block, *_bases(sums.pop(s.block.name))) if s.block.name in sums else s for s in spectra]


def _refit(rows: CurvatureRows, spectra: list[BlockSpectrum], kept: _Kept, progress: bool) -> None:
    """Replace eigenvalues by the sums of the gradients' squared entries in the basis."""
    for spectrum in spectra:
        spectrum.eigenvalues.zero_()
    of_all = kept.examples.astype(np.int32)
    add_up(of_all)
    remaining = rows.batches(of_all > 0, shared=True)
    while kept.batches:
        matrices = kept.batches.pop(0)
        for spectrum in spectra:
            if terms := matrices.get(spectrum.block.name):
                spectrum.eigenvalues.add_(sum_of_squares(terms, spectrum.left, spectrum.right))
    for gradients in tqdm(remaining, desc="eigenvalues", leave=False, disable=not progress):
        for spectrum in spectra:
            if terms := spectrum.block.matrices(gradients.terms):
                spectrum.eigenvalues.add_(sum_of_squares(terms, spectrum.left, spectrum.right))
        gradients.terms.clear()
    add_up(*(spectrum.eigenvalues for spectrum in spectra))


def _bases(sums: FactorSums) -> tuple[Side, Side, Tensor]:
    """The bases of one block, the main process's: of equal eigenvalues another machine may choose other vectors."""
    left, right, eigenvalues = sums.bases()
    parts = [part.contiguous() for part in (*left.vectors, *right.vectors, eigenvalues)]
    if not is_main():
        for part in parts:
            part.zero_()
    add_up(*parts)
    lefts, rights = parts[: len(left.vectors)], parts[len(left.vectors) : -1]
    return Side(left.size, tuple(lefts)), Side(right.size, tuple(rights)), parts[-1]


def _zeros(block: Block, parameters: Mapping[str, Tensor]) -> Tensor:
    parameter = parameters[block.parameters[0]]
    wide = torch.float32 if parameter.dtype in (torch.float16, torch.bfloat16) else parameter.dtype
    return torch.zeros(block.shape, dtype=wide, device=parameter.device)
