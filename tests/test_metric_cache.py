"""Registration in evaluate's module cache: files, races, other versions, and a fresh process that loads them."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hf_attribution import metric_cache

REPOSITORY = Path(__file__).resolve().parent.parent
NAMES = ["brittleness", "lds", "loo_correlation", "mislabel_auc", "recall_at_k"]


@pytest.fixture
def modules(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "modules"


def scripts(modules):
    return sorted((modules / "evaluate_modules" / "metrics" / "evaluate-metric--lds").glob("*/lds.py"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_python(code, tmp_path, **environment):
    """Start Python in another directory with caches of its own and the checkout on the path."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_EVALUATE_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        **environment,
    }
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=environment.pop("CWD", elsewhere),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def test_files_are_where_evaluate_looks(modules):
    assert "lds" in metric_cache.register_metrics()
    (script,) = scripts(modules)
    assert len(script.parent.name) == 64
    assert sorted(path.name for path in script.parent.iterdir()) == ["__init__.py", "lds.py", "lds_core.py"]
    for name in ("lds.py", "lds_core.py"):
        assert (script.parent / name).read_bytes() == Path(metric_cache.metric_path("lds"), name).read_bytes()
    packages = [modules, *script.parents[1:4], script.parent]
    assert all((package / "__init__.py").is_file() for package in packages)


def test_a_second_call_writes_nothing(modules):
    metric_cache.register_metrics()
    before = {path: path.stat().st_mtime_ns for path in modules.rglob("*")}
    assert "lds" in metric_cache.register_metrics()
    assert {path: path.stat().st_mtime_ns for path in modules.rglob("*")} == before


def test_ours_becomes_the_newest(modules):
    metric_cache.register_metrics()
    (ours,) = scripts(modules)
    foreign = ours.parent.with_name("f" * 64) / "lds.py"
    foreign.parent.mkdir()
    foreign.write_text("another version")
    os.utime(foreign, ns=(ours.stat().st_mtime_ns + 10,) * 2)
    metric_cache.register_metrics()
    assert max(scripts(modules), key=lambda path: path.stat().st_mtime_ns) == ours
    assert foreign.read_text() == "another version"


def test_a_damaged_copy_is_replaced(modules):
    metric_cache.register_metrics()
    before = contents(modules)
    (script,) = scripts(modules)
    script.write_bytes(b"")
    (script.parent / "lds_core.py").unlink()
    metric_cache.register_metrics()
    assert contents(modules) == before


def test_a_cache_that_cannot_be_written_is_tolerated(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "file" / "modules"))
    assert metric_cache.register_metrics() == []
    assert Path(metric_cache.metric_path("lds"), "lds.py").is_file()


def test_a_failed_write_leaves_nothing_behind(modules, monkeypatch):
    def full_disk(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert metric_cache.register_metrics() == []
    monkeypatch.undo()
    assert {path.name for path in modules.rglob("*") if path.is_file()} == {"__init__.py"}
    assert not list(modules.rglob(".new-*"))


def test_unknown_metric_is_named():
    with pytest.raises(ValueError, match=r"no metric 'ldss'.*lds"):
        metric_cache.metric_path("ldss")


def test_metrics_inside_the_package_come_first(tmp_path, monkeypatch):
    """In a wheel `metrics` lies in the package, in a checkout beside it."""
    package = tmp_path / "site" / "hf_attribution"
    packaged = package / "metrics" / "lds"
    packaged.mkdir(parents=True)
    (packaged / "lds.py").write_text("")
    monkeypatch.setattr(metric_cache, "__file__", str(package / "metric_cache.py"))
    assert metric_cache.metric_path("lds") == str(packaged)
    assert '"metrics" = "hf_attribution/metrics"' in (REPOSITORY / "pyproject.toml").read_text()


@pytest.mark.parametrize("variables", [("HF_HOME",), ("XDG_CACHE_HOME",), ()], ids=lambda v: "-".join(v) or "home")
def test_cache_is_the_one_evaluate_uses(variables, tmp_path, monkeypatch):
    for name in ("HF_MODULES_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in variables:
        monkeypatch.setenv(name, str(tmp_path / "set"))
    expected = {
        ("HF_HOME",): tmp_path / "set" / "modules",
        ("XDG_CACHE_HOME",): tmp_path / "set" / "huggingface" / "modules",
        (): tmp_path / "home" / ".cache" / "huggingface" / "modules",
    }
    assert metric_cache._modules_cache() == expected[variables]


REGISTER = """
    from hf_attribution.metric_cache import register_metrics
    import sys
    assert not {"evaluate", "datasets", "numpy", "torch"} & set(sys.modules)
    print(register_metrics())
"""
COMPUTE = """
    import sys
    import evaluate
    lds = evaluate.load({name!r})
    print(lds.compute(predictions=[[1, 2, 3]], references=[[1, 2, 4]])["lds"], "hf_attribution" in sys.modules)
"""


def test_eight_processes_at_once(tmp_path):
    processes = [run_python(REGISTER, tmp_path) for _ in range(8)]
    assert [output_of(process) for process in processes] == [str(NAMES)] * 8
    modules = tmp_path / "hf" / "modules"
    assert len(scripts(modules)) == 1
    assert not list(modules.rglob(".new-*"))
    assert not list(modules.rglob(".old-*"))


@pytest.mark.slow
def test_fresh_processes_load_it_without_us(tmp_path):
    assert "lds" in output_of(run_python(REGISTER, tmp_path))
    loaders = [
        run_python(COMPUTE.format(name="lds"), tmp_path, PYTHONPATH=""),
        run_python(COMPUTE.format(name=metric_cache.metric_path("lds")), tmp_path, PYTHONPATH=""),
        # From the root of the repository, with an empty cache: nothing registered, nothing imported.
        run_python(COMPUTE.format(name="metrics/lds"), tmp_path, HF_HOME=str(tmp_path / "empty"), CWD=str(REPOSITORY)),
    ]
    assert [output_of(process) for process in loaders] == ["1.0 False"] * len(loaders)


@pytest.mark.slow
def test_spawned_workers_load_it(tmp_path):
    (tmp_path / "main.py").write_text(
        textwrap.dedent("""
        import multiprocessing
        from hf_attribution.metric_cache import register_metrics

        def score(scale):
            import evaluate

            rows = [[1.0 * scale, 2.0 * scale, 3.0 * scale]]
            return evaluate.load("lds").compute(predictions=rows, references=[[1, 2, 4]])["lds"]

        if __name__ == "__main__":
            register_metrics()
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                print(pool.map(score, [1, -1]))
        """)
    )
    code = f"import runpy; runpy.run_path({str(tmp_path / 'main.py')!r}, run_name='__main__')"
    process = run_python(code, tmp_path)
    assert output_of(process).endswith("[1.0, -1.0]")
