"""Curvature in Kronecker-factored eigenbases, fitted in passes over the training data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_attribution.curvature.blocks import Block, Side, make_blocks, sum_of_squares
from hf_attribution.curvature.factors import FactorSums
from hf_attribution.curvature.kronecker import BlockSpectrum, KroneckerCurvature
from hf_attribution.curvature.passes import Passes
from hf_attribution.curvature.rows import CurvatureRows
from hf_attribution.errors import NonFiniteError
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import Term
from hf_attribution.processes import add_up, is_main

# Bytes of the gradients' factors that EK-FAC's first pass may keep for its second one: less than scoring takes.
KEPT_BYTES = 2**27


def fit_curvature(
    model: nn.Module,
    rows: CurvatureRows,
    kind: str,
    provenance: dict[str, Any] | None = None,
    progress: bool = True,
    unfinished: Path | None = None,
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
        unfinished: How the names of files begin that say where the fit stands, see `Passes`: a fit that is killed goes
            on from there, to the same bits. Each process writes its own factors' sums, and after EK-FAC's first pass
            one of them the bases, as large as the result.

    Returns:
        The curvature.

    Raises:
        NonFiniteError: If a gradient is NaN or infinite; the message names the row and the parameter.
    """
    parameters = rows.gradients[0].parameters
    blocks = make_blocks(model, rows.probe(), parameters)
    spectra = [BlockSpectrum(b, Side(b.shape[0]), Side(b.shape[1]), _zeros(b, parameters)) for b in blocks]
    passes, kept, device = Passes(rows, unfinished, progress), _Kept(), rows.device
    if kind == "kfac":
        spectra = _find_bases(passes, spectra)
    elif kind == "ekfac":
        if earlier := passes.earlier(KroneckerCurvature):
            spectra = list(earlier.to(device).spectra)
        else:
            spectra = _find_bases(passes, spectra, kept)
            passes.keep(KroneckerCurvature(tuple(spectra), len(rows.split)))
        _refit(passes, [s for s in spectra if s.block.kind != "vector"], kept)
    else:
        _refit(passes, spectra, kept)
    for spectrum in spectra:
        if not spectrum.eigenvalues.isfinite().all():
            rows.refuse_non_finite()
            raise NonFiniteError(f"The curvature of {spectrum.block.name} is infinite: its gradients are too large.")
    return KroneckerCurvature(tuple(spectra), len(rows.split), provenance or {})


@dataclass
class _Kept:
    """The matrices of EK-FAC's first pass that the second one need not compute again.

    Args:
        batches: Terms by block of each part of a batch, by its number.
        num_bytes: Their memory.
        full: Whether there is no room for more.
    """

    batches: dict[int, list[dict[str, list[Term]]]] = field(default_factory=dict)
    num_bytes: int = 0
    full: bool = False

    def offer(self, number: int, matrices: dict[str, list[Term]]) -> None:
        """Keep the next part of a batch, or forget the batch if it does not fit."""
        tensors = (v for terms in matrices.values() for term in terms for v in vars(term).values())
        self.num_bytes += sum(v.nbytes for v in tensors if isinstance(v, Tensor))
        self.full = self.num_bytes > KEPT_BYTES
        if self.full:
            self.batches.pop(number, None)
        else:
            self.batches.setdefault(number, []).append(matrices)


def _find_bases(passes: Passes, spectra: list[BlockSpectrum], kept: _Kept | None = None) -> list[BlockSpectrum]:
    """Eigenvectors and K-FAC's eigenvalues of all blocks but vectors, of which the diagonal is summed up."""
    sums = {s.block.name: FactorSums(s.block, s.eigenvalues) for s in spectra if s.block.kind != "vector"}
    diagonal = [spectrum.eigenvalues for spectrum in spectra if spectrum.block.name not in sums]
    totals = [*diagonal, *(tensor for total in sums.values() for tensor in total.tensors())]
    for number, batch in passes.batches("Kronecker factors", totals):
        for gradients in batch:
            matrices: dict[str, list[Term]] = {}
            keeps = kept is not None and not kept.full
            for spectrum in spectra:
                terms = spectrum.block.matrices(gradients.terms)
                if terms and spectrum.block.name in sums:
                    sums[spectrum.block.name].add(terms)
                    matrices[spectrum.block.name] = terms if keeps else []
                elif terms:
                    spectrum.eigenvalues.add_(sum_of_squares(terms, spectrum.left, spectrum.right))
            gradients.terms.clear()  # before the next batch needs memory for its own
            if kept is not None and keeps:
                kept.offer(number, matrices)
    add_up(*totals)
    del totals  # each block's sums are freed as soon as it has its bases
    return [BlockSpectrum(s.block, *_bases(sums.pop(s.block.name))) if s.block.name in sums else s for s in spectra]


def _refit(passes: Passes, spectra: list[BlockSpectrum], kept: _Kept) -> None:
    """Replace eigenvalues by the sums of the gradients' squared entries in the basis."""
    totals = [spectrum.eigenvalues.zero_() for spectrum in spectra]
    for _, batch in passes.batches("eigenvalues", totals, kept.batches):
        for part in batch:
            for spectrum in spectra:
                block = spectrum.block
                terms = block.matrices(part.terms) if isinstance(part, Gradients) else part.get(block.name)
                if terms:
                    spectrum.eigenvalues.add_(sum_of_squares(terms, spectrum.left, spectrum.right))
            if isinstance(part, Gradients):
                part.terms.clear()
    add_up(*totals)


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
