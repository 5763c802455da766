"""The tokens of a training example with their scores: what a page colours."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_attribution.errors import MismatchError
from hf_attribution.part_scores import PartScores
from hf_attribution.report.content import clean, cut


class TokenColours:
    """Texts split into tokens, and the scores of these.

    Args:
        parts: Scores of tokens, `[Q, K]`.
        tokenizer: The tokenizer that made the rows' `input_ids`.
        shape: `(Q, N)` of the scores on the page.
        share: Bytes that a row's text may take.

    Raises:
        ValueError: The parts are of modules, or there is no tokenizer.
        MismatchError: They are of other queries or training examples.
    """

    def __init__(self, parts: PartScores, tokenizer: Any, shape: tuple[int, int], share: int) -> None:
        if parts.granularity != "token":
            raise ValueError(
                f"tokens= are scores of {parts.granularity}s: compute them with attribute_parts(..., 'token')."
            )
        if tokenizer is None:
            raise ValueError("tokens= needs the tokenizer that made the rows' input_ids: pass tokenizer=.")
        own = (len(parts.values), int(parts.examples[-1]) + 1)
        if own != shape:
            raise MismatchError(f"tokens= are of {own} queries and training examples and the scores of {shape}.")
        self.parts, self.tokenizer, self.share = parts, tokenizer, share

    def pieces(self, row: dict[str, Any], columns: Sequence[str]) -> list[dict[str, Any]] | None:
        """Split a row's texts where its tokens begin and end.

        Args:
            row: A training example with `input_ids`.
            columns: Its columns of text.

        Returns:
            A field for each column: `pieces`, which make up the text, and `tokens`, the position of the token of each
            piece (-1 for what lies between tokens). Where the tokenizer does not make these tokens of these texts, one
            field of the tokens as they are. None for a row without tokens.
        """
        ids = row.get("input_ids")
        if ids is None:
            return None
        mask = row.get("attention_mask")
        if mask is not None:  # positions are counted without padding
            ids = [token for token, seen in zip(ids, mask, strict=True) if seen]
        texts = [row[name] for name in columns]
        found = self._aligned(ids, texts) if all(isinstance(text, str) for text in texts) else None
        return found if found is not None else [self._raw(ids)]

    def values(self, query: int, example: int) -> dict[str, Any]:
        """The scores of an example's tokens for a query.

        Args:
            query: Its row.
            example: Its row in the training set.

        Returns:
            `scale`, the largest magnitude; `values`, bytes as base64: by position 127 is the scale and -127 its
            negative; `rest`, what belongs to no token.
        """
        start, stop = np.searchsorted(self.parts.examples, [example, example + 1])
        positions, values = self.parts.parts[start:stop], self.parts.values[query, start:stop].astype(np.float64)
        of_tokens = positions >= 0
        by_position = np.zeros(int(positions.max(initial=-1)) + 1)
        by_position[positions[of_tokens]] = values[of_tokens]
        scale = float(np.abs(by_position).max(initial=0.0))
        levels = np.round(by_position / (scale or 1.0) * 127).astype(np.int8)
        return {
            "scale": float(f"{scale:.4g}"),
            "values": base64.b64encode(levels.tobytes()).decode(),
            "rest": float(f"{values[~of_tokens].sum():.4g}"),
        }

    def _aligned(self, ids: Sequence[int], texts: Sequence[str]) -> list[dict[str, Any]] | None:
        if not 1 <= len(texts) <= 2 or not self.tokenizer.is_fast:
            return None
        # More characters than these tokens can stand for need not be read: a token of 100 characters is rare.
        given = [text[: 1000 + 100 * len(ids)] for text in texts]
        encoded = self.tokenizer(*given, return_offsets_mapping=True, truncation=True, max_length=len(ids))
        if list(encoded["input_ids"]) != list(ids):
            return None
        fields = []
        for number, text in enumerate(texts):
            spans = [
                (*span, position)
                for position, (span, sequence) in enumerate(
                    zip(encoded["offset_mapping"], encoded.sequence_ids(0), strict=True)
                )
                if sequence == number and span[1] > span[0]
            ]
            fields.append(_split(text, spans, self.share // len(texts)))
        return fields

    def _raw(self, ids: Sequence[int]) -> dict[str, Any]:
        pieces: list[Any] = []
        tokens: list[Any] = []
        size = 0
        for position, token in enumerate(self.tokenizer.convert_ids_to_tokens(list(ids))):
            size += len(str(token)) + 4
            if size > self.share:
                return {"pieces": pieces, "tokens": tokens, "cut_tokens": len(ids)}
            pieces += [clean(str(token)), " "]
            tokens += [position, -1]
        return {"pieces": pieces, "tokens": tokens}


def _split(text: str, spans: Sequence[tuple[int, int, int]], share: int) -> dict[str, Any]:
    """A text cut at spans of tokens, given as (start, end, position)."""
    kept = cut(text, share)
    end_of_kept, done = len(kept.pop("text")), 0
    pieces, tokens = [], []
    for start, end, position in spans:
        start, end = max(start, done), min(end, end_of_kept)
        if start >= end:
            continue
        if start > done:
            pieces.append(clean(text[done:start]))
            tokens.append(-1)
        pieces.append(clean(text[start:end]))
        tokens.append(position)
        done = end
    if done < end_of_kept:
        pieces.append(clean(text[done:end_of_kept]))
        tokens.append(-1)
    return {"pieces": pieces, "tokens": tokens, **kept}
