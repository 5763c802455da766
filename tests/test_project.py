"""The shape of the project: what imports what, what an import costs, what the wheel holds."""

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_attribution"

# From the bottom up. A module or folder imports from its own line and from the lines above it.
LAYERS = (
    ("errors", "finite", "seeds", "seals", "metric_cache", "arguments", "catalogue", "team", "locks"),
    ("processes",),
    # Artefacts push themselves, and say what they are worth.
    (
        "artefacts",
        "bookmark",
        "rows",
        "provenance",
        "notebook",
        "reliability",
        "scores",
        "top_scores",
        "part_scores",
        "subsets",
        "counterfactuals",
        "evaluation",
        "hub",
    ),
    ("tuning", "estimation", "splits", "preprocessing", "blocks"),
    ("inputs", "copies", "adapters", "weights", "logits", "tasks", "columns", "data", "streams", "optimizer_states"),
    ("numbered", "store"),
    ("gradients",),
    ("curvature",),
    ("replay",),
    ("problem",),
    ("methods", "retraining"),
    ("simfluence",),
    ("ensemble", "worker"),
    ("checkpoints", "posing"),
    ("attribution", "dry_run", "retrainable"),
    ("trainer", "report", "workspace"),
    ("studies", "debugging"),
    ("demo", "commands", "cli"),
)
LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}

HEAVY = {"torch", "transformers", "datasets", "evaluate", "accelerate", "scipy", "sklearn", "matplotlib", "rich"}


def modules(folder: Path) -> list[str]:
    """Every Python file below a folder, by its path from the root of the repository."""
    return sorted(str(path.relative_to(ROOT)) for path in folder.rglob("*.py"))


def imported_names(module: str) -> set[str]:
    """Every dotted name that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `evaluate` takes along the files that a metric imports relatively, and no others.
            assert node.level == 0 or module.startswith("metrics/"), f"{module}:{node.lineno}: imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def own_parts(module: str) -> set[str]:
    """The modules and folders directly under the package that a file imports from."""
    return {name.split(".")[1] for name in imported_names(module) if name.startswith("hf_attribution.")}


@pytest.mark.parametrize("module", modules(PACKAGE))
def test_imports_run_strictly_downward(module: str) -> None:
    part = Path(module).parts[1].removesuffix(".py")
    if part == "__init__":  # the public face names everything, and imports it when it is asked for
        return
    assert part in LEVELS, f"{module}: give `{part}` its place in LAYERS"
    upward = {other for other in own_parts(module) if LEVELS.get(other, len(LAYERS)) > LEVELS[part]}
    assert not upward, f"{module} imports {sorted(upward)}, which stand above it or are no modules of the package"


@pytest.mark.parametrize("module", modules(ROOT / "metrics"))
def test_metrics_stand_alone(module: str) -> None:
    assert not own_parts(module)
    assert "hf_attribution" not in imported_names(module)


def test_importing_the_package_is_cheap() -> None:
    script = (
        "import json, sys, time; start = time.process_time(); import hf_attribution; "
        "print(json.dumps([time.process_time() - start, sorted(sys.modules)]))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, loaded = json.loads(run.stdout)
    assert not HEAVY & set(loaded)
    assert seconds < 1


def test_the_wheel_holds_the_package_and_the_metrics(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    metrics = {f"hf_attribution/{path}" for path in modules(ROOT / "metrics")}
    guides = {f"hf_attribution/guides/{path.name}" for path in (PACKAGE / "guides").glob("*.md")}
    assert guides
    assert held >= metrics | guides | set(modules(PACKAGE))
    assert not [name for name in held if name.startswith(("metrics/", "tests/", "scripts/"))]
