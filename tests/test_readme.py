"""The README's code runs as it stands, and it names every method there is."""

import re
from pathlib import Path

import pytest

from hf_attribution.methods import METHODS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_python_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlxtend")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "'train_index'" in printed
    assert "partial LDS" in printed
    report = float(re.search(r"LDS +(-?[\d.]+) \[", printed).group(1))
    assert float(printed.split()[-1]) == pytest.approx(report, abs=1e-3)


def test_it_names_every_method():
    missing = [name for name in METHODS if f"`{name}`" not in README]
    assert not missing
