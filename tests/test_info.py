"""What `python -m fastmeta.info` says agrees with what really runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastmeta import _library, info, ops
from fastmeta.testing.ops import update_sample


def test_report_names_every_operator_and_part(capsys):
    assert info.main() == 0
    text = capsys.readouterr().out
    for name in (*_library.OPS, "fastmeta._C", "fastmeta._C_cuda", "fastmeta._host"):
        assert name in text
    assert torch.__version__ in text


def test_serving_matches_what_use_impl_accepts():
    sample = update_sample("sgd", "T1", 3, 5)
    (row,) = (r for r in info.serving() if (r.op, r.device) == ("sgd_update", "cpu"))
    assert row.impl in ("cpp", "reference")
    with ops.use_impl(row.impl):
        sample.call(*sample.tensors)


def test_a_broken_extension_is_reported(monkeypatch, capsys):
    broken = _library.Extension("fastmeta._C", "cpp", "cpu", "failed", "undefined symbol: x")
    monkeypatch.setattr(_library, "EXTENSIONS", (broken, _library.EXTENSIONS[1]))
    assert info.main() == 1
    assert "failed: undefined symbol: x" in capsys.readouterr().out


def test_loading_a_broken_extension_warns(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(_library.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_library.importlib, "import_module", fail)
    with pytest.warns(RuntimeWarning, match="could not be loaded .undefined symbol: x"):
        extension = _library._load("_C", "cpp", "cpu", "a compiler")
    assert extension.state == "failed"


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "fastmeta.info"], capture_output=True, text=True, check=True
    )
    assert "sgd_update" in done.stdout
