"""The errors a user can meet. Each message names the thing that is wrong and the remedy."""


class ArtefactError(ValueError):
    """A file is not an artefact of ours: truncated, foreign, of another kind, or of a newer schema."""


class MismatchError(ValueError):
    """Two things that must belong together do not: a dataset changed, a model differs, sizes disagree."""


class NonFiniteError(ArithmeticError):
    """A loss, gradient or output is NaN or infinite. The message names the row and, where known, the module."""


class UnsupportedError(ValueError):
    """What was asked cannot be done correctly for this model, data or setting."""


class ConvergenceError(ArithmeticError):
    """An iterative solver did not reach its tolerance. The message names the residual it reached."""


class HubError(OSError):
    """The Hub refused or could not be reached: no token, no such repository, a name that is taken, no network."""


class ProcessError(ConnectionError):
    """Another process of a launch failed, died or has other data. The message says which, and the remedy."""


class UnfinishedError(RuntimeError):
    """A share of the work is done, and others are still missing. The message says how many and whose."""
