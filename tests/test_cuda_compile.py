"""Every CUDA source compiles for the supported architectures, without register spills.

Needs nvcc, but neither a GPU nor a CUDA build of torch: the stable headers are enough.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")


def nvcc(source: Path, *arguments: str) -> str:
    """Compile and return what ptxas says."""
    includes = [f"-I{p}" for p in (ROOT / "csrc", *include_paths())]
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    command = [str(NVCC), str(source), *includes, *flags, target, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def resource_usage(log: str) -> tuple[dict[str, int], int]:
    """Registers of every kernel in a ptxas log, and all bytes spilled, in functions too."""
    kernels = re.findall(r"Compiling entry function '(.+?)' for", log)
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= len(kernels)
    used = dict(zip(kernels, map(int, registers), strict=True))
    return used, sum(int(stores) + int(loads) for stores, loads in spills)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_compiles_without_spills(source: Path, architecture: str, tmp_path: Path):
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    output = str(tmp_path / "out.o")
    log = nvcc(source, "-c", "-o", output, "-gencode", code, "-Xptxas", "-v")
    used, spilled = resource_usage(log)
    most = max(used.values())
    print(f"\n{source.name} sm_{architecture}: {len(used)} kernels, at most {most} registers")
    assert used and spilled == 0


@pytest.mark.parametrize(
    "source", [s for s in SOURCES if s.stem == "inner_update"], ids=lambda p: p.stem
)
def test_moves_16_bytes_at_a_time(source: Path, tmp_path: Path):
    """The packed kernels load and store vectors of four 32-bit words."""
    output = tmp_path / "out.ptx"
    nvcc(source, "-ptx", "-o", str(output), "-arch=compute_90")
    text = output.read_text()
    packed = [
        body
        for body in text.split(".entry")[1:]
        if re.search(r"(pass|list)_kernelI.*Li[24]E", body.split("(")[0])
    ]
    assert packed
    for body in packed:
        assert re.search(r"ld(\.global)?(\.nc)?\.v[24]\.", body), body[:200]
        assert re.search(r"st(\.global)?(\.cg)?\.v[24]\.", body), body[:200]
