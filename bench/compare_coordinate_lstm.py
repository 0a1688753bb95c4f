"""Compare coordinate_lstm with torch.nn.LSTMCell, in time and peak memory.

    python -m bench.compare_coordinate_lstm [--device cuda] [--rounds 15] [--out results.json]

Forward and backward, interleaved; the limit of every row is the time of a copy of the bytes that
must move and of the matrix products at this machine's best rate. Peak memory includes the results.
"""

from __future__ import annotations

from functools import partial

from bench.bench_coordinate_lstm import CASES, WAYS, floors, forward, step, weights_step
from bench.comparison import Case, run
from bench.timing import Way


def ways(make, case: str, device: str) -> dict[str, Way]:
    return {way: make(way, case, device) for way in WAYS}


def cases(device: str) -> dict[str, Case]:
    found = {}
    for case, (rows, features, hidden) in CASES.items():
        size = f"{case}: M={rows}, F={features}, H={hidden}"
        moved, flops = floors(case)
        large = rows > 1_000_000
        found[f"{size}, forward + backward"] = Case(
            partial(ways, step, case, device), moved, flops, memory=large
        )
        if large:
            found[f"{size}, forward + backward to the weights"] = Case(
                partial(ways, weights_step, case, device),
                4 * rows * (2 * features + 8 * hidden),
                3 * flops // 4,
                memory=True,
            )
            found[f"{size}, forward"] = Case(
                partial(ways, forward, case, device),
                4 * rows * (features + 4 * hidden),
                flops // 4,
            )
    return found


if __name__ == "__main__":
    run("bench.compare_coordinate_lstm", __doc__, cases)
