"""Compare cross_entropy with torch's, in time and peak memory.

    python -m bench.compare_cross_entropy [--device cuda] [--rounds 15] [--out results.json]

Interleaved; the limit of every row is the time of a copy of the bytes that must move. Peak memory
includes the results.
"""

from __future__ import annotations

from functools import partial

from bench.bench_cross_entropy import CASES, PASSES, WAYS, floor_bytes, step
from bench.comparison import Case, run
from bench.timing import Way


def ways(case: str, order: str, device: str) -> dict[str, Way]:
    return {way: step(way, case, order, device) for way in WAYS}


def cases(device: str) -> dict[str, Case]:
    found = {}
    for case, (rows, classes) in CASES.items():
        for order in PASSES:
            title = f"{case}: R={rows}, C={classes}, {order}"
            make = partial(ways, case, order, device)
            found[title] = Case(make, floor_bytes(case, order), memory=order != "forward")
    return found


if __name__ == "__main__":
    run("bench.compare_cross_entropy", __doc__, cases)
