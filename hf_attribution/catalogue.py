"""Settings chosen by name: dictionaries of dataclasses whose errors name what there is."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


class Catalogue(dict[str, type[T]]):
    """Dataclasses by their `name`.

    Args:
        what: What each of them is, for messages: "method".
        kinds: The dataclasses.
    """

    def __init__(self, what: str, kinds: Iterable[type[T]]) -> None:
        super().__init__((kind.name, kind) for kind in kinds)  # type: ignore[attr-defined]
        self.what = what

    def __missing__(self, name: str) -> type[T]:
        close = difflib.get_close_matches(str(name), self, n=1, cutoff=0.3)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise KeyError(f"Unknown {self.what} {name!r}.{hint} There are {', '.join(self)}.")

    def make(self, chosen: str | T, settings: dict[str, Any]) -> T:
        """One of them with settings.

        Args:
            chosen: A name, or an instance, of any class, whose settings are replaced.
            settings: Fields.

        Returns:
            The instance.

        Raises:
            KeyError: If there is none of that name; the message suggests the nearest.
            TypeError: If it has no such setting; the message lists those it has.
        """
        kind: Any = self[chosen] if isinstance(chosen, str) else type(chosen)
        known = [field.name for field in dataclasses.fields(kind)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise TypeError(f"{kind.name} has no setting {unknown[0]!r}: it has {', '.join(known) or 'none'}.")
        return kind(**settings) if isinstance(chosen, str) else dataclasses.replace(chosen, **settings)  # type: ignore[type-var]
