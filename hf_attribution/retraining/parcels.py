"""A plan on its way to other processes: pickled with what of torch's state changes numbers, and unpacked there.

Functions and classes of the main script (or notebook) travel by value, so that workers never run the script again and
need no `if __name__ == "__main__"`; those of importable modules travel by name.
"""

import dataclasses
import pickle
from typing import Any

import cloudpickle
import torch

from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.retraining.plan import Plan, versions
from hf_attribution.retraining.worklist import Run

_REMEDIES = {
    "initial model": "pass model_init=, a function that makes the model, instead of model=.",
    "train_dataset": "pass a datasets.Dataset, or open files when rows are read.",
    "follow-up": "leave workers out.",
}
_REMEDY = "make it when it is first used, or from what can be pickled; or leave workers out."


@dataclasses.dataclass(frozen=True)
class TorchState:
    """Settings of torch that decide the last bits of a training."""

    threads: int
    default_dtype: torch.dtype
    deterministic: bool
    matmul_precision: str
    cudnn_deterministic: bool
    cudnn_benchmark: bool

    @classmethod
    def now(cls, threads: int) -> "TorchState":
        """The settings of this process, with another number of threads."""
        return cls(
            threads,
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        )

    def apply(self) -> None:
        """Set this process as the other one is set."""
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.default_dtype)
        torch.use_deterministic_algorithms(self.deterministic)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.backends.cudnn.deterministic = self.cudnn_deterministic
        torch.backends.cudnn.benchmark = self.cudnn_benchmark


def pack(plan: Plan, runs: list[Run], threads: int) -> bytes:
    """Pickle a plan for workers.

    Args:
        plan: The plan.
        runs: Those that are to be done.
        threads: How many threads a worker has.

    Returns:
        What `unpack` takes.

    Raises:
        UnsupportedError: If a part of it cannot be pickled; the message names it and the remedy.
    """
    try:
        return cloudpickle.dumps((TorchState.now(threads), plan.portable(), runs))
    except Exception as error:
        name, part, reason = next(filter(None, map(_trouble, _parts(plan))), ("training", plan, error))
        raise UnsupportedError(
            f"Workers need the {name} ({type(part).__name__}), which cannot be pickled ({reason}): "
            f"{_REMEDIES.get(name, _REMEDY)}"
        ) from error


def unpack(parcel: bytes) -> tuple[Plan, list[Run]]:
    """Read a plan in a worker, and set torch as it was set where the plan was made.

    Args:
        parcel: What `pack` made.

    Returns:
        The plan, and the runs that are to be done.

    Raises:
        MismatchError: If this worker has other versions of the libraries.
    """
    state, plan, runs = pickle.loads(parcel)
    wanted, own = plan.manifest["versions"], versions()
    different = [f"{name} {own[name]} instead of {wanted[name]}" for name in wanted if own[name] != wanted[name]]
    if different:
        raise MismatchError(f"A worker has {', '.join(different)}: install the same versions for all workers.")
    state.apply()
    _ = plan.args.device  # found out here, and with it that this process is of no launch
    return plan, runs


def _parts(plan: Plan) -> list[tuple[str, Any]]:
    portable = plan.portable()
    recipe = portable.recipe
    return [
        ("trainer class", recipe.trainer_class),
        ("train_dataset", portable.train_dataset),
        ("initial model", recipe.initial_model),
        ("callbacks", recipe.callbacks),
        ("training arguments", portable.args),
        ("task", portable.task),
        *recipe.arguments().items(),
        ("query batches", portable.queries),
        ("follow-up", portable.request.follow_up),
    ]


def _trouble(part: tuple[str, Any]) -> tuple[str, Any, Exception] | None:
    try:
        cloudpickle.dumps(part[1])
    except Exception as error:
        return *part, error
    return None
