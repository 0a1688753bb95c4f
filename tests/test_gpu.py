"""What the library does on a GPU, on one or on a stand-in, in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(
        torch.version.cuda is not None and not torch.cuda.is_available(),
        reason="a torch with CUDA has no room for a stand-in, and there is no GPU",
    ),
]
pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_learners(which: str):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "gpu"), "-m", which],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
