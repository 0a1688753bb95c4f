"""Extension modules; everything else is declared in pyproject.toml.

FASTMETA_BUILD_EXT (read at build time only):
  auto (default)  build each extension whose build requirements are there (torch for the operators,
                  pybind11 for the host module, a C++ compiler for both)
  1               a missing requirement is an error; CUDA's nvcc is one with a torch built for CUDA
  0               pure Python
A compile that fails is always an error.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
HERE = Path(__file__).parent


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc" / folder).glob(pattern))


def compiler_found() -> bool:
    wanted = os.environ.get("CXX")
    names = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    return any(shutil.which(name) for name in names)


def importable(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def nvcc_found() -> bool:
    """Whether torch knows where CUDA lies, if it was built for it."""
    if not importable("torch"):
        return True
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    return not torch.version.cuda or bool(CUDA_HOME)


def torch_extensions() -> list:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    # Without contraction to fused multiply-adds every CPU gives the same bits.
    flags = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-fvisibility=hidden"]
    # the free-threaded Python has no limited API yet
    limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
    common = {"include_dirs": [str(HERE / "csrc")], "py_limited_api": limited}
    modules = [
        CppExtension(
            "fastmeta._C",
            [*sources("cpu", "*.cpp"), "csrc/module.cpp"],
            extra_compile_args={"cxx": [STABLE_ABI, "-DFASTMETA_MODULE=_C", *flags]},
            **common,
        )
    ]
    if torch.version.cuda and CUDA_HOME:
        cuda = [STABLE_ABI, "-DFASTMETA_MODULE=_C_cuda", "-DUSE_CUDA"]
        modules.append(
            CUDAExtension(
                "fastmeta._C_cuda",
                [*sources("cuda", "*.cu"), "csrc/module.cpp"],
                extra_compile_args={"cxx": [*cuda, *flags], "nvcc": [*cuda, "-O3"]},
                **common,
            )
        )
    return modules


def extensions() -> tuple[list, dict]:
    switch = os.environ.get("FASTMETA_BUILD_EXT", "auto")
    if switch not in ("auto", "0", "1"):
        sys.exit(f"FASTMETA_BUILD_EXT must be auto, 0 or 1, got {switch!r}")
    if switch == "0":
        return [], {}
    have = {
        "a C++ compiler": compiler_found(),
        "torch": importable("torch"),
        "pybind11": importable("pybind11"),
        "nvcc": nvcc_found(),
    }
    missing = [name for name, there in have.items() if not there]
    if switch == "1" and missing:
        sys.exit(f"FASTMETA_BUILD_EXT=1 needs {', '.join(missing)} in the build environment")
    if not have["a C++ compiler"]:
        return [], {}
    modules, commands = [], {}
    if have["torch"]:
        from torch.utils.cpp_extension import BuildExtension

        modules += torch_extensions()
        commands = {"build_ext": BuildExtension}
    if have["pybind11"]:
        from pybind11.setup_helpers import Pybind11Extension

        modules.append(Pybind11Extension("fastmeta._host", ["csrc/host/bindings.cpp"]))
    return modules, commands


ext_modules, cmdclass = extensions()
setup(
    packages=[*find_packages(include=["fastmeta", "fastmeta.*"]), "fastmeta.kernels"],
    package_dir={"fastmeta.kernels": "kernels"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
