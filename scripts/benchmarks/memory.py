"""Peak memory of a stretch of code."""

from pathlib import Path
from types import TracebackType

PROC = Path("/proc/self")


class Peak:
    """Peak memory of this process within a `with` block, beyond what it held before. Linux only.

    After the block, `mib` is the peak in MiB.

    Example:
        >>> with Peak() as peak:
        ...     content = bytearray(2**24)
        >>> peak.mib >= 16
        True
    """

    mib: float

    def __enter__(self) -> "Peak":
        (PROC / "clear_refs").write_text("5")  # forget the peak so far
        self._before = _status("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mib = (_status("VmHWM") - self._before) / 1024


def _status(field: str) -> int:
    """A field of this process's status, in KiB."""
    return next(int(line.split()[1]) for line in (PROC / "status").read_text().splitlines() if line.startswith(field))
