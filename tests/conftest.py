"""Shared fixtures: seeds, the implementations a test of an operator runs through, commands."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastmeta import _library
from fastmeta.ops import use_impl

_KEEP: list[torch.library.Library] = []  # a library is unregistered when it is collected
ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulated_cuda() -> str:
    """Registers the CUDA kernels, run on the CPU (tests/cuda_emulation), as ``cuda_emulated``."""
    if shutil.which("c++") is None or shutil.which("ninja") is None:
        pytest.skip("emulating the CUDA kernels needs a C++ compiler and ninja")
    from torch.utils.cpp_extension import load

    folder = ROOT / "tests" / "cuda_emulation"
    build = ROOT / "build" / f"cuda_emulation-{torch.__version__}"
    build.mkdir(parents=True, exist_ok=True)
    load(
        "fastmeta_emulated",
        [str(p) for p in sorted(folder.glob("*.cpp"))],
        extra_include_paths=[str(ROOT / "csrc"), str(folder)],
        extra_cflags=[
            *("-O1", "-g0", "-ffp-contract=off", "-fno-strict-aliasing"),
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        ],
        is_python_module=False,
        build_directory=str(build),
    )
    library = torch.library.Library("fastmeta_emulated", "DEF")
    _KEEP.append(library)
    for name, op in _library.OPS.items():
        library.define(op.schema)
        key = f"fastmeta_emulated::{name}"
        if torch._C._dispatch_has_kernel_for_dispatch_key(key, "CPU"):
            kernel = getattr(torch.ops.fastmeta_emulated, name).default
            op.kernels["cuda_emulated"] = ("cpu", kernel)
    return "cuda_emulated"


@pytest.fixture(params=("reference", "cpp", "cuda_emulated", "cuda"))
def impl(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """(implementation, device), in force for the test; skipped with the reason where absent."""
    yield from _in_force(request, request.param)


@pytest.fixture(params=("reference", "cpp", "cuda"))
def native_impl(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """As ``impl`` without emulation, for tests that make thousands of calls."""
    yield from _in_force(request, request.param)


@pytest.fixture(params=("reference", "cpp"))
def cpu_impl(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """As ``impl`` on the CPU only, for tests whose arguments lie there."""
    yield from _in_force(request, request.param)


def _in_force(request: pytest.FixtureRequest, name: str) -> Iterator[tuple[str, str]]:
    device = "cpu"
    if name == "cuda_emulated":
        request.getfixturevalue("emulated_cuda")
    elif name != "reference":
        extension = next(e for e in _library.EXTENSIONS if e.impl == name)
        if extension.state != "loaded":
            pytest.skip(f"{extension.module}: {extension.state}, {extension.detail}")
        device = extension.device
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # on a GPU whatever serves an operator there, by CUDA or Triton
    with use_impl("auto" if name == "cuda" else name):
        yield name, device


@pytest.fixture
def call(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run a command; returns (exit status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        from fastmeta.cli import main

        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def fails(call: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Run a command that must fail with one sentence on stderr; returns the sentence."""

    def run(*arguments: object) -> str:
        status, out, err = call(*arguments)
        assert status == 2 and out == ""
        assert err.startswith("fastmeta: error: ") and err.count("\n") == 1
        return err.removeprefix("fastmeta: error: ").rstrip()

    return run


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with LoRA and the head."""
    from command_line import flags

    from fastmeta.cli import main

    out = tmp_path_factory.mktemp("lora") / "run"
    spec = "lora:r=2,alpha=8,targets=query+value + head"
    # A large outer rate, so that the trained values differ from the initial ones by a lot.
    assert main(["train", "--quiet", *flags(spec=spec, out=out, outer_lr=0.1, inner_lr=0.5)]) == 0
    return out
