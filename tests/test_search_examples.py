"""The examples of `fm.search` are valid."""

from __future__ import annotations

import runpy
from pathlib import Path

from fastmeta.cli import main

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "search"


def test_the_configuration_runs(tmp_path, capsys):
    arguments = ["search", f"--config={EXAMPLES / 'builtin.yaml'}", f"--out={tmp_path}", "--quiet"]
    small = ["--evaluations=4", "--population=4", "--tasks=2", "--queries=1", "--shots=1"]
    assert main([*arguments, *small, "--model=builtin:hidden=16,layers=4"]) == 0
    assert "relative" not in capsys.readouterr().err
    assert (tmp_path / "winner" / "recipe.yaml").is_file()


def test_the_script_runs(tmp_path, monkeypatch, capsys):
    import fastmeta as fm

    whole = fm.search.run

    def short(space, judged, **settings):
        return whole(space, judged, **(settings | {"evaluations": 4, "population": 4,
                                                   "progress": False}))  # fmt: skip

    monkeypatch.setattr(fm.search, "run", short)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "search.py"))
    assert "from_pretrained('search-winner')" in capsys.readouterr().out
