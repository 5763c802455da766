"""Attribution scores of parts of training examples: of their tokens, or of a model's modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf_attribution.artefacts import Artefact, first_non_finite, freeze
from hf_attribution.errors import NonFiniteError
from hf_attribution.rows import from_rows, to_rows
from hf_attribution.scores import Scores
from hf_attribution.seals import plain_json

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, eq=False, repr=False)
class PartScores(Artefact):
    """Scores of training examples, split into parts that add up to them.

    Attributes:
        values: float32 `[Q, K]`, K parts of all examples together.
        examples: Of which training example each column is: its position in the dataset, int64 `[K]`, in order.
        parts: Which part of it: for `"module"` a number, see `names`; for `"token"` the position among the example's
            tokens as collated, without padding, or -1 for what belongs to no token (norms, the head of a classifier).
        granularity: `"module"` or `"token"`.
        names: The names of the modules; none for tokens.
        method: The name of the method, as in `METHODS`.
        settings: The method's settings; JSON.
        provenance: As of `Scores`.

    Raises:
        ValueError: The columns do not fit together.
        NonFiniteError: A score is NaN or infinite.

    Example:
        >>> import numpy as np
        >>> parts = PartScores(np.array([[1.0, 2.0, 4.0]]), np.array([0, 0, 1]), np.array([-1, 0, -1]), "token")
        >>> parts
        PartScores(grad_dot, 1 query x 3 tokens of 2 training examples)
        >>> parts.sum().values.tolist()
        [[3.0, 4.0]]
    """

    kind: ClassVar[str] = "part scores"

    values: np.ndarray
    examples: np.ndarray
    parts: np.ndarray
    granularity: str
    names: tuple[str, ...] = ()
    method: str = "grad_dot"
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values, examples, parts = (
            freeze(np.asarray(array), kind)
            for array, kind in ((self.values, np.float32), (self.examples, np.int64), (self.parts, np.int64))
        )
        if values.ndim != 2 or not values.size or examples.shape != values.shape[1:] or parts.shape != examples.shape:
            raise ValueError(
                f"PartScores.values must be [queries, parts] with an example and a part for each column; the shapes "
                f"are {values.shape}, {examples.shape} and {parts.shape}."
            )
        steps = np.diff(examples)
        if examples[0] != 0 or steps.min(initial=0) < 0 or steps.max(initial=0) > 1:
            raise ValueError("PartScores.examples must be 0, 0, ..., 1, 1, ...: at least one part for each example.")
        where = first_non_finite(values)
        if where is not None:
            raise NonFiniteError(
                f"The score of query row {where[0]} and part {parts[where[1]]} of train row {examples[where[1]]} is "
                f"{values[where]}. Look for a gradient that is not finite, or raise the damping."
            )
        for name, value in (("values", values), ("examples", examples), ("parts", parts)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "settings", plain_json(self.settings, "PartScores.settings"))
        object.__setattr__(self, "provenance", plain_json(self.provenance, "PartScores.provenance"))

    def __repr__(self) -> str:
        queries = "1 query" if len(self.values) == 1 else f"{len(self.values)} queries"
        columns = f"{self.values.shape[1]} {self.granularity}s of {self.examples[-1] + 1} training examples"
        return f"PartScores({self.method}, {queries} x {columns})"

    def sum(self) -> Scores:
        """The scores of whole examples, `[Q, N]`."""
        starts = np.flatnonzero(np.diff(self.examples, prepend=-1))
        values = np.add.reduceat(self.values, starts, axis=1, dtype=np.float64)
        return Scores(values, self.method, self.settings, self.provenance)

    def of(self, query: int, example: int) -> dict[str | int, float]:
        """The parts of one score: by the module's name, or by the token's position."""
        columns = np.flatnonzero(self.examples == example)
        keys = [self.names[part] if self.names else int(part) for part in self.parts[columns]]
        return dict(zip(keys, self.values[query, columns].tolist(), strict=True))

    def to_dataset(self) -> datasets.Dataset:
        """Return a row a part: `example`, `part`, `scores` (a list of Q float32)."""
        columns = {"example": self.examples, "part": self.parts, "scores": np.ascontiguousarray(self.values.T)}
        return to_rows(self.kind, columns, self._pack()[1], title=repr(self))

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> PartScores:
        """Return what `to_dataset` was given, also after Parquet or the Hub, or raise `ArtefactError`."""
        columns, metadata = from_rows(dataset, cls.kind)
        arrays = {"values": columns["scores"].T, "examples": columns["example"], "parts": columns["part"]}
        return cls._unpack(arrays, metadata)

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        metadata = {
            "granularity": self.granularity, "names": list(self.names), "method": self.method,
            "settings": self.settings, "provenance": self.provenance,
        }  # fmt: skip
        return {"values": self.values, "examples": self.examples, "parts": self.parts}, metadata

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> PartScores:
        return cls(arrays["values"], arrays["examples"], arrays["parts"], **metadata)
