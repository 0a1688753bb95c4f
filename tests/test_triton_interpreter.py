"""The Triton kernels through Triton's interpreter, in a process of their own: no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("triton", reason="triton is not installed")


def test_interpreted_kernels_agree_with_the_references():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    tests = ROOT / "tests" / "triton_interpreter"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(tests), "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
