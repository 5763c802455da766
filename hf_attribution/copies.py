"""Copies of models that compute with weights of their own."""

import copy
import functools
import types
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def own_copy(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy of a model that shares nothing with it, or only the tensors that are named.

    Where a library has given a module a `forward` of its own (TRL's fused heads, accelerate's hooks), that function
    often holds the original module in its closure, which `copy.deepcopy` leaves as it is: the copy would compute with
    the original's weights, silently. Here such functions are made anew around the copy.

    Args:
        model: The model.
        shared: Its parameters and buffers that the copy is to use, too, instead of copies of them.

    Returns:
        The copy.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> own_copy(layer).weight is layer.weight
        False
        >>> own_copy(layer, shared=[layer.weight]).weight is layer.weight
        True
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if "forward" in vars(module):
            module.forward = _rebound(module.forward, memo)
    return copied


def _rebound(thing: Any, memo: dict[int, Any]) -> Any:
    """What a function holds: the copy of what has one, functions made anew, and all else as it is, shared."""
    if id(thing) in memo:
        return memo[id(thing)]
    if isinstance(thing, types.MethodType):
        return types.MethodType(_rebound(thing.__func__, memo), _rebound(thing.__self__, memo))
    if isinstance(thing, functools.partial):
        arguments = [_rebound(value, memo) for value in thing.args]
        keywords = {name: _rebound(value, memo) for name, value in thing.keywords.items()}
        return functools.update_wrapper(functools.partial(_rebound(thing.func, memo), *arguments, **keywords), thing)
    if isinstance(thing, types.FunctionType) and thing.__closure__:
        cells = tuple(types.CellType() for _ in thing.__closure__)
        made = types.FunctionType(thing.__code__, thing.__globals__, thing.__name__, thing.__defaults__, cells)
        made.__kwdefaults__ = thing.__kwdefaults__
        memo[id(thing)] = functools.update_wrapper(made, thing)  # first of all: a function may hold itself
        for cell, old in zip(cells, thing.__closure__, strict=True):
            cell.cell_contents = _rebound(old.cell_contents, memo)
        return made
    return thing
