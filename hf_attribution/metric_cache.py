"""Our metric scripts in `evaluate`'s module cache, put there with the standard library alone.

`evaluate.load("lds")` looks for a script in the working directory, then on the Hub, then among the modules it
has cached before: `evaluate_modules/metrics/evaluate-metric--lds/<64 hex digits>/lds.py`, the newest first.
Importing `evaluate` to have it cache ours would cost seconds, so the files are written where it would.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import shutil
from pathlib import Path
from types import ModuleType

logger = logging.getLogger(__name__)  # not transformers' logger: importing that would cost what this module saves


def metric_path(name: str) -> str:
    """Absolute path of one of our metrics, for `evaluate.load`: no network, no warning.

    Args:
        name: of the metric, such as `"lds"`.

    Returns:
        The folder that holds the metric's script and card.

    Raises:
        ValueError: there is no metric of that name.

    Example:
        ```python
        >>> import evaluate
        >>> from hf_attribution.metric_cache import metric_path
        >>> lds = evaluate.load(metric_path("lds"))

        ```
    """
    folders = {folder.name: folder for folder in _metric_folders()}
    if name not in folders:
        raise ValueError(f"there is no metric {name!r} in {_metrics_root()}; there are: {', '.join(folders)}")
    return str(folders[name])


@functools.cache
def metric_core(name: str) -> ModuleType:
    """Return the mathematics of one of our metrics, from its file: the metric itself would import `evaluate`, seconds.

    Args:
        name: of the metric, such as `"lds"`.

    Returns:
        The module `<name>_core`: numpy and scipy alone.

    Raises:
        ImportError: the file cannot be loaded.

    Example:
        ```python
        >>> metric_core("lds").compute_lds([[1, 2, 3]], [[1, 2, 4]])["lds"]
        1.0

        ```
    """
    path = Path(metric_path(name)) / f"{name}_core.py"
    spec = importlib.util.spec_from_file_location(f"hf_attribution._{name}_core", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded: is hf_attribution installed completely?")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def register_metrics() -> list[str]:
    """Make `evaluate.load("<name>")` find our metrics, in this and every later process, from any directory.

    Costs about a millisecond. Safe when many processes do it at once. Where the cache cannot be written
    nothing is registered and nothing fails: set `HF_MODULES_CACHE` to a folder that can be, which `evaluate`
    needs for any metric.

    Returns:
        The names of the metrics that are in place.
    """
    registered = []
    for folder in _metric_folders():
        try:
            _register(folder)
        except OSError as error:
            logger.debug("metric %s is not registered with evaluate: %s", folder.name, error)
        else:
            registered.append(folder.name)
    return registered


def _metrics_root() -> Path:
    """Return the folder `metrics`: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / "metrics"
    return packaged if packaged.is_dir() else package.parent / "metrics"


def _metric_folders() -> list[Path]:
    """Return the folders `metrics/<name>` that hold `<name>.py`, in order."""
    return sorted(path.parent for path in _metrics_root().glob("*/*.py") if path.stem == path.parent.name)


def _modules_cache() -> Path:
    """Return where `evaluate` keeps modules, by the rule of `evaluate.config`."""
    xdg_cache = os.getenv("XDG_CACHE_HOME", "~/.cache")
    hf_home = os.path.expanduser(os.getenv("HF_HOME", os.path.join(xdg_cache, "huggingface")))  # noqa: PTH111, PTH118
    return Path(os.getenv("HF_MODULES_CACHE", os.path.join(hf_home, "modules")))  # noqa: PTH118


def _register(folder: Path) -> None:
    """Put one metric into the cache, as the newest of its name."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.py") if path.name != "app.py"}
    files["__init__.py"] = b""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    modules = _modules_cache()
    parent = modules / "evaluate_modules" / "metrics" / f"evaluate-metric--{folder.name}"
    target = parent / digest.hexdigest()
    if not _is_complete(target, files):
        parent.mkdir(parents=True, exist_ok=True)
        for package in (modules, *list(parent.parents)[:2], parent):
            (package / "__init__.py").touch()
        _install(files, target)
    _make_newest(target / f"{folder.name}.py")


def _is_complete(target: Path, files: dict[str, bytes]) -> bool:
    try:
        return all((target / name).read_bytes() == data for name, data in files.items())
    except OSError:
        return False


def _install(files: dict[str, bytes], target: Path) -> None:
    """Write `files` into a new folder and rename it to `target`, so that nobody sees half of it."""
    suffix = os.urandom(8).hex()
    staging, damaged = target.with_name(f".new-{suffix}"), target.with_name(f".old-{suffix}")
    staging.mkdir()
    try:
        for name, data in files.items():
            (staging / name).write_bytes(data)
        try:
            staging.rename(target)
        except OSError:
            # Another process was first, or the folder there is damaged: only the latter is replaced.
            if not _is_complete(target, files):
                target.rename(damaged)
                staging.rename(target)
    finally:
        for leftover in (staging, damaged):
            shutil.rmtree(leftover, ignore_errors=True)


def _make_newest(script: Path) -> None:
    """Give `script` a later time than other versions in the cache; write nothing where it has."""
    own = script.stat().st_mtime_ns
    others = [path.stat().st_mtime_ns for path in script.parent.parent.glob(f"*/{script.name}") if path != script]
    if others and max(others) >= own:
        os.utime(script)
