"""The Python of the READMEs runs, each file from top to bottom."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["README.md", "examples/README.md", "examples/porting.md"])
def test_its_python_runs(name, tmp_path, monkeypatch, capsys):
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks
    monkeypatch.chdir(tmp_path)  # some write files
    names: dict = {}
    for block in blocks:
        lines = text[: block.start(1)].count("\n")
        code = "\n" * lines + block[1]  # so that errors name the line of the file
        exec(compile(code, str(ROOT / name), "exec"), names)
    assert "loss" in capsys.readouterr().out or name != "README.md"
