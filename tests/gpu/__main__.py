"""Runs the tests of this folder on a GPU, or on a stand-in for one: ``python tests/gpu``.

The stand-in has to be there when torch is imported, so these tests have a process of their own;
`test_gpu.py` starts it.
"""

import ctypes
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = Path(importlib.util.find_spec("torch").origin).parent


def build() -> Path:
    """The compiled standin.cpp, kept beside other builds."""
    version = (TORCH / "version.py").read_text().split("__version__ = '")[1].split("'")[0]
    target = HERE.parent.parent / "build" / f"gpu_standin-{version}" / "standin.so"
    source = HERE / "standin.cpp"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")
        include = f"-I{TORCH / 'include'}"
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run(
            ["c++", "-std=c++20", "-shared", "-fPIC", include, source, *libraries, "-o", fresh],
            check=True,
        )
        fresh.replace(target)
    return target


def prepare() -> None:
    """Before torch is imported: puts the stand-in there, if torch was built for the CPU."""
    if re.search(r"^cuda.*= None$", (TORCH / "version.py").read_text(), re.M):
        library = build()
        for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(TORCH / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))


def main() -> int:
    prepare()
    import pytest

    return pytest.main([str(HERE), "-q", "-p", "no:cacheprovider", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
