"""Inner products of gradients, part by part of a training example: its modules' share, or its tokens'."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_attribution.curvature.blocks import Block, make_blocks
from hf_attribution.data import Batch
from hf_attribution.errors import UnsupportedError
from hf_attribution.gradients.checks import refuse_non_finite
from hf_attribution.gradients.directions import Preconditioner, gradient_blocks
from hf_attribution.gradients.held import Source
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import Lookup, Outer, Term, inner_products, squared_norms, take
from hf_attribution.processes import add_up, count

GRANULARITIES = ("example", "module", "token")

# Numbers of intermediate products of tokens that are formed at once.
_CHUNK = 2**22


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which part of which example each of K columns is.

    Args:
        examples: Positions of the examples in their dataset, int64 `[K]`.
        parts: Numbers of the modules; or positions of the tokens among an example's own, without padding, and -1 for
            what belongs to no token. int64 `[K]`.
        names: The modules' names; none for tokens.
    """

    examples: np.ndarray
    parts: np.ndarray
    names: tuple[str, ...] = ()


class Identity:
    """The preconditioner that leaves gradients as they are."""

    def __call__(self, block: Sequence[Gradients]) -> list[Gradients]:
        """`g`."""
        return list(block)

    def quadratic_forms(self, block: Sequence[Gradients]) -> list[Tensor]:
        """`gᵀ g`."""
        return [torch.stack([squared_norms(terms) for terms in part.terms.values()]).sum(0) for part in block]


def module_layout(source: Source) -> Layout:
    """A column for every example and module with chosen parameters."""
    names = tuple(dict.fromkeys(_owner(name) for name in source.gradients.parameters))
    size = len(source.split)
    return Layout(np.arange(size).repeat(len(names)), np.tile(np.arange(len(names)), size), names)


def token_layout(source: Source, model: nn.Module) -> Layout:
    """A column for every token of every example, and one for what belongs to none.

    Args:
        source: The training examples.
        model: The model.

    Returns:
        The layout.

    Raises:
        UnsupportedError: If the examples have no tokens, or tokens of two kinds.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__} has tokens of an encoder and of a decoder, which are not told apart: use "
            "granularity='module' or 'example'."
        )
    lengths = np.zeros(len(source.split), dtype=np.int64)
    for batch in source.split.batches(shared=True):
        lengths[batch.indices.numpy()] = _token_mask(batch).sum(1).cpu().numpy()
    add_up(lengths)
    parts = [np.arange(-1, length) for length in lengths]
    return Layout(np.arange(len(lengths)).repeat(lengths + 1), np.concatenate(parts))


def part_products(
    queries: Source, train: Source, preconditioner: Preconditioner, layout: Layout, model: nn.Module, progress: bool
) -> np.ndarray:
    """`⟨P g(query), g(example)⟩`, split into parts that add up to it.

    A token's part is what its positions add to the gradients of linear layers and embeddings. What the gradients of
    norms, of other parameters, and of layers that see no sequence add belongs to no token.

    Args:
        queries: The queries' gradients.
        train: The training examples' gradients, with respect to the same parameters.
        preconditioner: P.
        layout: The columns, of modules or of tokens.
        model: The model.
        progress: Whether to show a progress bar.

    Returns:
        float32 `[Q, K]`.
    """
    values = np.zeros((len(queries.split), len(layout.examples)), dtype=np.float32)
    starts = np.searchsorted(layout.examples, np.arange(len(train.split)))

    def computed(batch: Batch) -> tuple[Batch, Gradients]:
        return batch, train.gradients(batch)

    probe = train.gradients(train.split.probe().to(train.gradients.device))
    blocks = make_blocks(model, probe, train.gradients.parameters)
    total = len(queries.split) * len(train.split)
    with tqdm(total=total, desc="gradient products", unit="pairs", leave=False, disable=not progress) as bar:
        for block in gradient_blocks(queries):
            directions = preconditioner(block)
            for whole in train.split.batches(shared=True):
                found_parts = train.split.in_parts(computed, whole.to(train.gradients.device))
                for part, (batch, gradients) in itertools.product(directions, found_parts):
                    if layout.names:
                        found = _by_module(part, gradients, layout.names)
                        columns = starts[batch.indices.numpy()][:, None] + np.arange(len(layout.names))
                        kept = np.ones(columns.shape, dtype=bool)
                    else:
                        found = _by_token(part, gradients, blocks, batch)
                        kept = torch.nn.functional.pad(_token_mask(batch), (1, 0), value=True).cpu().numpy()
                        columns = starts[batch.indices.numpy()][:, None] + np.cumsum(kept, axis=1) - 1
                    refuse_non_finite(found.transpose(0, 1), batch.indices, "An inner product with the gradient")
                    rows = part.indices.numpy()[:, None]
                    values[rows, columns[kept]] = found.cpu().numpy()[:, kept]
                    bar.update(len(part.indices) * len(batch.indices) * count())
    add_up(values)
    return values


def _by_module(directions: Gradients, gradients: Gradients, names: Sequence[str]) -> Tensor:
    """`[Q, B, modules]`."""
    found = directions.values.new_zeros(len(directions.indices), len(gradients.indices), len(names))
    for name in directions.terms.keys() & gradients.terms.keys():
        found[:, :, names.index(_owner(name))] += inner_products(directions.terms[name], gradients.terms[name])
    return found


def _by_token(directions: Gradients, gradients: Gradients, blocks: Sequence[Block], batch: Batch) -> Tensor:
    """`[Q, B, 1 + T]`, the first of it for what belongs to no token."""
    mask = _token_mask(batch)
    found = directions.values.new_zeros(len(directions.indices), len(mask), 1 + mask.shape[1])
    for block in blocks:
        if block.kind == "vector" or block.parameters[0] not in directions.terms:
            terms: list[Term] = []
        else:
            terms = block.matrices(gradients.terms, pack=False)
        if terms and all(_length(term) == mask.shape[1] > 1 for term in terms):
            for term in terms:
                found[:, :, 1:] += _token_products(block, directions, term)
        else:
            for name in directions.terms.keys() & gradients.terms.keys() & set(block.parameters):
                found[:, :, 0] += inner_products(directions.terms[name], gradients.terms[name])
    padding = ~mask.to(found.device)
    found[:, :, 0] += (found[:, :, 1:] * padding).sum(2)
    return found


def _token_products(block: Block, directions: Gradients, term: Term) -> Tensor:
    """What each position of a term adds to the inner products: `[Q, B, T]`."""
    (batch, length), width = term.right.shape[:2], block.shape[0]  # type: ignore[union-attr]
    step = max(1, _CHUNK // max(batch * length * width, block.shape[0] * block.shape[1]))
    parts = []
    for start in range(0, len(directions.indices), step):
        where = slice(start, start + step)
        chosen = {n: [take(t, where) for t in directions.terms[n]] for n in block.parameters}
        matrices = block.join(chosen)
        if isinstance(term, Lookup):
            parts.append((matrices[:, term.ids] * term.right).sum(-1))
        else:
            assert isinstance(term, Outer)
            parts.append(((term.right @ matrices[:, None].transpose(2, 3)) * term.left).sum(-1))
    return torch.cat(parts)


def _length(term: Term) -> int:
    return term.right.shape[1] if isinstance(term, (Outer, Lookup)) else 0


def _token_mask(batch: Batch) -> Tensor:
    """Which positions of a batch are tokens, not padding: `[B, T]` bool."""
    ids = batch.inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise UnsupportedError(
            "granularity='token' needs text: a batch with 'input_ids' of [examples, tokens]. Use granularity='module'."
        )
    mask = batch.inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()


def _owner(name: str) -> str:
    """The module that owns a parameter."""
    return name.rpartition(".")[0]
