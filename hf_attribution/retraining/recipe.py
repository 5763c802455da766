"""How to make the user's trainer again: the arguments of its constructor, and the model before training."""

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_attribution.artefacts import fingerprint
from hf_attribution.copies import own_copy
from hf_attribution.errors import UnsupportedError
from hf_attribution.inputs import weights_fingerprint


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Builds fresh trainers like one that was built before; nothing of that one is changed or shared by weight.

    Args:
        trainer_class: The class of the trainer, with whatever the user made of it.
        positional: The positional arguments its constructor was given.
        named: The keyword arguments.
        callbacks: Copies of the callbacks among them, as they were before the constructor saw them.
        initial_model: A copy of the model on the CPU as it was after construction, or `None` where `model_init` makes
            one. Copies that could not be made are the errors that say so.
        holders: Arguments that hold the model, as the losses of sentence-transformers do: copies that hold the copy.
    """

    trainer_class: type[Trainer]
    positional: tuple[Any, ...]
    named: dict[str, Any]
    callbacks: list[Any] | UnsupportedError | None
    initial_model: nn.Module | UnsupportedError | None
    holders: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(
        self, args: TrainingArguments, train_dataset: Any, trainer_class: type[Trainer] | None = None
    ) -> Trainer:
        """A fresh trainer with other training arguments and data, its model untrained.

        Args:
            args: Its training arguments; their seed seeds the constructor.
            train_dataset: What it trains on.
            trainer_class: A subclass of the trainer's class to build instead.

        Returns:
            The trainer.
        """
        replaced: dict[str, Any] = {"args": args, "train_dataset": train_dataset}
        copies: Any = own_copy(_Together(_usable(self.initial_model), self.holders))
        replaced |= copies.holders
        if self.initial_model is not None:
            replaced["model"] = copies.model
        if self.callbacks is not None:
            replaced["callbacks"] = copy.deepcopy(_usable(self.callbacks))
        positional, named = self._arguments(replaced)
        built = trainer_class if trainer_class is not None else self.trainer_class
        trainer: Any = built.__new__(built)
        trainer._remembers = False  # a retraining is not retrained itself
        trainer.__init__(*positional, **named)
        return trainer

    def check(self) -> None:
        """Refuse now what `build` could not do later.

        Raises:
            UnsupportedError: If model or callbacks cannot be copied, or the constructor takes no other data.
        """
        placeholders: dict[str, Any] = {"args": None, "train_dataset": None}
        if self.initial_model is not None:
            _usable(self.initial_model)
            placeholders["model"] = None
        if self.callbacks is not None:
            _usable(self.callbacks)
        positional, named = self._arguments(placeholders)
        try:
            inspect.signature(self.trainer_class.__init__).bind(None, *positional, **named)
        except TypeError as error:
            raise UnsupportedError(
                f"{self.trainer_class.__name__} cannot be built again for a retraining ({error}): let its __init__ "
                "take model, args and train_dataset (or **kwargs) and hand them on."
            ) from error

    def portable(self) -> "Recipe":
        """The same without the user's own model and data, which `build` replaces."""
        left_out = {
            "args": None,
            "train_dataset": None,
            "model": None,
            "callbacks": None,
            **dict.fromkeys(self.holders),
        }
        positional, named = self._arguments({k: v for k, v in left_out.items() if self.given(k) is not None})
        return dataclasses.replace(self, positional=tuple(positional), named=named)

    def given(self, name: str) -> Any:
        """What the constructor was given for a parameter, or `None`."""
        return given(self.trainer_class, self.positional, self.named, name)

    def own_arguments(self) -> dict[str, Any]:
        """What the constructor was given for parameters that `transformers.Trainer` has not; JSON."""
        known = inspect.signature(Trainer.__init__).parameters
        return {name: described(value) for name, value in sorted(self.arguments().items()) if name not in known}

    def arguments(self) -> dict[str, Any]:
        """All that the constructor was given, by name."""
        placed = dict(zip(positional_names(self.trainer_class), self.positional, strict=False))
        return {**placed, **self.named, **self.holders}

    def _arguments(self, replaced: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        names = positional_names(self.trainer_class)
        positional = [replaced.get(name, value) for name, value in zip(names, self.positional, strict=False)]
        placed = set(names[: len(self.positional)])
        return positional, {**self.named, **{k: v for k, v in replaced.items() if k not in placed}}


class _Together(nn.Module):
    """A model and what holds it, to be copied as one."""

    def __init__(self, model: nn.Module | None, holders: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.holders = holders


def copied_model(
    model: nn.Module, arguments: Mapping[str, Any], is_made: bool
) -> tuple[nn.Module | UnsupportedError | None, dict[str, Any]]:
    """Copy a model to the CPU, and with it the arguments of a trainer's constructor that hold it.

    Args:
        model: The trainer's model.
        arguments: What the constructor was given, by name.
        is_made: Whether `model_init` makes it, so that no copy is needed but in what holds it.

    Returns:
        The copy of the model, or the error to raise once it is needed; and copies of the holders by name.
    """
    own = {id(module) for module in model.modules()}
    holders = {name: value for name, value in arguments.items() if name != "model" and _holds(value, own)}
    if is_made and not holders:
        return None, {}
    remedy = "pass model_init=, a function that makes the model, instead of model=."
    together = copied(_Together(model, holders), remedy, type(model).__name__)
    if isinstance(together, UnsupportedError):
        return together, {}
    return (None if is_made else together.cpu().model), together.holders


def _holds(value: Any, own: set[int]) -> bool:
    if isinstance(value, Mapping):
        return any(_holds(each, own) for each in value.values())
    return isinstance(value, nn.Module) and any(id(module) in own for module in value.modules())


def positional_names(trainer_class: type) -> list[str]:
    """The constructor's positional parameters, looked up where `*args` goes on to a parent's constructor."""
    names: list[str] = []
    for base in trainer_class.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            break
    return names


def given(trainer_class: type, positional: tuple[Any, ...], named: dict[str, Any], name: str) -> Any:
    """What a constructor is given for a parameter, or `None`."""
    return {**dict(zip(positional_names(trainer_class), positional, strict=False)), **named}.get(name)


def described(value: Any) -> Any:
    """What tells a setting from another, the same in every process; JSON."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(described(item)) for item in value)
    if isinstance(value, nn.Module):
        return weights_fingerprint(value)
    if isinstance(value, torch.Tensor):
        return fingerprint(value.detach().cpu().float().numpy())
    if isinstance(value, np.ndarray):
        return fingerprint(value)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "to_dict"):  # configurations of transformers and PEFT
        return described(value.to_dict())
    if dataclasses.is_dataclass(value):
        return described({each.name: getattr(value, each.name) for each in dataclasses.fields(value)})
    return f"{type(value).__module__}.{type(value).__qualname__}"


def copied(thing: Any, remedy: str, name: str | None = None) -> Any:
    """A deep copy, or the error to raise once the copy is needed: a constructor must not fail for it."""
    try:
        return own_copy(thing) if isinstance(thing, nn.Module) else copy.deepcopy(thing)
    except Exception as error:
        return UnsupportedError(f"Retraining needs a copy of {name or _name(thing)} ({error}): {remedy}")


def _usable(thing: Any) -> Any:
    if isinstance(thing, UnsupportedError):
        raise thing
    return thing


def _name(thing: Any) -> str:
    if isinstance(thing, list):
        return "the callbacks " + ", ".join(getattr(item, "__name__", type(item).__name__) for item in thing)
    return type(thing).__name__
