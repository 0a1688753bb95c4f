"""A table of cases: ways of doing the same, interleaved, beside the physical limit of each case.

Each case has a process of its own: what the heap of another left behind decides how many page
faults a way takes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.timing import Way, copy_bandwidth, gemm_rate, interleave


@dataclass(frozen=True)
class Case:
    """Ways of doing the same, and what any of them must move or compute.

    Attributes:
        make: the ways by name, ours first.
        bytes: that must move through memory.
        flops: of matrix products that must be done.
        memory: whether the peak memory of every way is measured too, each in its own process.
    """

    make: Callable[[], dict[str, Way]]
    bytes: int = 0
    flops: int = 0
    memory: bool = False


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    flags = next((x.split() for x in lines if x.startswith("flags")), [])
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    return f"{model or platform.machine()}, {vectors}"


def run(module: str, description: str, cases: Callable[[str], dict[str, Case]]) -> None:
    """The command line of a comparison: measure, print, write JSON after every case."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="part of a title")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", metavar="TITLE", help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", nargs=2, metavar=("TITLE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = cases(args.device)
    if args.peak_of:
        return print(peak_bytes(table[args.peak_of[0]].make()[args.peak_of[1]], args.device))
    if args.case:
        ways = table[args.case].make()
        found = interleave(ways, rounds=args.rounds, device=args.device)
        return print(json.dumps(found))

    def timed(title: str, case: Case) -> dict:
        if args.device == "cuda":
            return interleave(case.make(), rounds=args.rounds, device=args.device)
        return json.loads(child("--case", title))

    def peak(title: str, case: Case, label: str) -> int:
        if args.device == "cuda":
            return peak_bytes(case.make()[label], args.device)
        return int(child("--peak-of", title, label))

    def child(*more: str) -> str:  # whose heap is its own
        command = [sys.executable, "-m", module, "--device", args.device]
        command += ["--threads", str(args.threads), "--rounds", str(args.rounds), *more]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.splitlines()[-1]

    bandwidth = copy_bandwidth(args.device, 1024 if args.device == "cuda" else 256)
    rate = gemm_rate(args.device)
    result = {
        "machine": machine(args.device),
        "threads": args.threads,
        "torch": torch.__version__,
        "copy_bytes_per_second": bandwidth,
        "gemm_flops_per_second": rate,
        "cases": {},
    }
    print(
        f"{result['machine']}: a copy moves {bandwidth / 1e9:.1f} GB/s, "
        f"GEMM {rate / 1e9:.0f} GFLOP/s"
    )
    for title, case in table.items():
        if args.only not in title:
            continue
        found = timed(title, case)
        limit = case.bytes / bandwidth + case.flops / rate
        for label, row in found.items() if case.memory else ():
            row["peak_bytes"] = peak(title, case, label)
        result["cases"][title] = {
            "limit_seconds": limit,
            "bytes": case.bytes,
            "flops": case.flops,
            "ways": found,
        }
        print(f"\n{title}; limit {limit * 1e3:.3f} ms")
        for label, row in found.items():
            most = f"{row['peak_bytes'] / 2**20:10.0f} MiB" if "peak_bytes" in row else ""
            print(f"  {label:40s}{row['seconds'] * 1e3:10.3f} ms {row['ratio']:8.2f} x{most}")
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1))


def peak_bytes(way: Way, device: str) -> int:
    """Memory that one call takes over what was there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(name: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(name))
        return 1024 * int(line.split()[1])

    clear.write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    way()
    return resident("VmHWM") - before
