"""What gets built: pure Python without torch or a compiler, an error where a compile fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is needed to build, without anything built."""
    target = tmp_path / "tree"
    target.mkdir()
    for name in ("fastmeta", "csrc", "kernels"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    return target


def hide(modules: list[str], tmp_path: Path) -> str:
    """A folder for PYTHONPATH in which these modules exist but cannot be imported."""
    folder = tmp_path / "hidden"
    folder.mkdir(exist_ok=True)
    for module in modules:
        (folder / f"{module}.py").write_text(f"raise ImportError('{module} is hidden')\n")
    return str(folder)


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``pip wheel`` without network and without isolation."""
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps"]
    return subprocess.run(
        [*command, "--no-index", "--disable-pip-version-check", "-w", "wheels"],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def only_wheel(tree: Path) -> Path:
    (wheel,) = (tree / "wheels").glob("*.whl")
    return wheel


def run_installed(wheel: Path, code: str, tmp_path: Path) -> str:
    """Run code with the wheel's content first on the path, far from the source tree."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    check = (
        # an editable installation would still find the compiled parts of the source tree
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]; "
        f"import fastmeta; assert fastmeta.__file__.startswith({str(site)!r}); "
    )
    done = subprocess.run(
        [sys.executable, "-c", check + code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


USE = (
    "import torch, fastmeta.kernels; from fastmeta import info, ops, _sampler; "
    "assert ops.sgd_update(torch.ones(2, 3), torch.ones(2, 3), 0.5).sum() == 3; "
    "assert _sampler.sample_episodes([0, 3, 6], 2, 2, 1, 1, seed=0)[1].shape == (2, 2, 1); "
    "print(info.report())"
)


def test_without_torch_at_build_time_the_wheel_is_pure_python(tree: Path, tmp_path: Path):
    done = build(tree, PYTHONPATH=hide(["torch", "pybind11"], tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    wheel = only_wheel(tree)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fastmeta/kernels/__init__.py", "fastmeta/py.typed"} <= set(names)
    assert not [n for n in names if n.endswith((".so", ".cpp", ".h"))]
    assert not [n for n in names if n.split("/")[0] in ("tests", "kernels", "bench", "csrc")]
    metadata = next(n for n in names if n.endswith("METADATA"))
    assert "License-Expression: Apache-2.0" in zipfile.ZipFile(wheel).read(metadata).decode()
    said = run_installed(wheel, USE, tmp_path)
    assert "fastmeta._C       not built" in said


def test_without_a_compiler_the_wheel_is_pure_python(tree: Path, tmp_path: Path):
    done = build(tree, PATH=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stderr[-2000:]
    assert only_wheel(tree).name.endswith("-py3-none-any.whl")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_compile_that_fails_is_an_error(tree: Path):
    pytest.importorskip("pybind11")
    for source in (tree / "csrc").rglob("*.cpp"):
        source.write_text('#error "broken on purpose"\n')
    done = build(tree, FASTMETA_BUILD_EXT="auto")
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr
    assert not (tree / "wheels").exists() or not list((tree / "wheels").glob("*.whl"))


@pytest.mark.parametrize(
    ("switch", "message"),
    [("1", "FASTMETA_BUILD_EXT=1 needs pybind11"), ("yes", "must be auto, 0 or 1, got 'yes'")],
)
def test_build_switch(tree: Path, tmp_path: Path, switch: str, message: str):
    environment = {"FASTMETA_BUILD_EXT": switch, "PYTHONPATH": hide(["pybind11"], tmp_path)}
    if shutil.which("c++") is None:
        message = message.replace("needs pybind11", "needs")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_whole_wheel(tree: Path, tmp_path: Path):
    pytest.importorskip("pybind11")
    done = build(tree, FASTMETA_BUILD_EXT="1")
    assert done.returncode == 0, done.stderr[-4000:]
    names = zipfile.ZipFile(only_wheel(tree)).namelist()
    assert "fastmeta/_C.abi3.so" in names or "fastmeta/_C.pyd" in names
    assert [n for n in names if n.startswith("fastmeta/_host.")]
    said = run_installed(only_wheel(tree), USE, tmp_path)
    assert "fastmeta._C       loaded" in said


def test_the_extension_needs_no_torch_newer_than_the_declared_one():
    """Every symbol the extension imports from torch is a C shim or a vtable-free header symbol."""
    extension = next(iter((ROOT / "fastmeta").glob("_C.*so")), None)
    if extension is None or shutil.which("nm") is None:
        pytest.skip("fastmeta._C is not built, or nm was not found")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(extension)], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in listed.splitlines()]
    unstable = [s for s in symbols if any(w in s for w in ("c10", "2at", "caffe2", "N5torch"))]
    assert not unstable
    assert [s for s in symbols if s.startswith(("aoti_torch_", "torch_"))]
