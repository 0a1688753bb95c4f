"""``python -m fastmeta.info``: versions, compiled parts, and what serves each operator and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
import textwrap
from dataclasses import dataclass

import torch

from fastmeta import _backend, _library, _sampler, _triton
from fastmeta import ops as _ops  # noqa: F401  (importing it declares the operators)

DEVICES = ("cpu", "cuda")
PACKAGES = ("fastmeta", "torch", "transformers", "triton", "numpy", "safetensors", "peft")


@dataclass(frozen=True)
class Serving:
    """Who serves one operator on one device."""

    op: str
    device: str
    impl: str
    why: str


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; "not installed" for the others."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there = name in sys.modules or importlib.util.find_spec(name) is not None
            found[name] = "not installed (imported from a folder)" if there else "not installed"
    return found


def serving() -> list[Serving]:
    """Which implementation the dispatcher runs for each operator and device, and the reason."""
    rows = []
    for op in _library.OPS.values():
        for device in DEVICES:
            rows.append(Serving(op.name, device, *_served(op, device)))
    return rows


def _served(op: _library.Op, device: str) -> tuple[str, str]:
    if device == "cuda" and not torch.cuda.is_available():
        missing = ""
        if op.name in _triton.OPERATORS and importlib.util.find_spec("triton") is None:
            missing = "; triton is not installed"
        return "-", f"this torch sees no CUDA device{missing}"
    for name, (on, call) in op.kernels.items():
        if on == device and call is op.overload:
            return name, "kernel registered for this device"
    impl = "triton" if device == "cuda" and op.name in _triton.OPERATORS else None
    extension = next(e for e in _library.parts() if e.device == device and impl in (None, e.impl))
    if extension.state == "loaded":
        return "reference", f"{extension.module} holds no kernel for it"
    return "reference", _backend.why_absent(extension.impl)


def report() -> str:
    """The whole answer as text."""
    lines = ["versions"]
    lines += [f"  {name:<13}{version}" for name, version in versions().items()]
    lines += [
        "",
        "devices",
        f"  {'cpu':<13}{platform.machine()}, {torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lines.append(f"  {'cuda':<13}{', '.join(names)} (CUDA {torch.version.cuda})")
    else:
        lines.append(f"  {'cuda':<13}none (torch is built for CUDA {torch.version.cuda})")
    lines += ["", "compiled parts"]
    for e in _library.parts():
        lines.append(f"  {e.module:<18}{e.state}: {e.detail}")
    host = "loaded" if _sampler.host_available() else "not built: the Python sampler serves"
    lines.append(f"  {'fastmeta._host':<18}{host}")
    lines += ["", "operators"]
    into = " " * 15
    served: dict[tuple[str, str, str], list[str]] = {}
    for row in serving():
        served.setdefault((row.device, row.impl, row.why), []).append(row.op)
    for device in DEVICES:
        groups = {key: names for key, names in served.items() if key[0] == device}
        for (_, impl, why), names in groups.items():
            lines.append(f"  {device:<13}{impl}: {why} ({len(names)} operators)")
            if impl != "-":
                lines += textwrap.wrap(
                    " ".join(names), 96, initial_indent=into, subsequent_indent=into
                )
    return "\n".join(lines)


def main() -> int:
    """Print the report; the exit status is 1 where a compiled part is broken."""
    print(report())
    return int(any(e.state == "failed" for e in _library.parts()))


if __name__ == "__main__":
    sys.exit(main())
