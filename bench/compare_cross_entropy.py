"""Compare cross_entropy with torch's, and linear_cross_entropy with a layer and those, in time and
peak memory.

    python -m bench.compare_cross_entropy [--device cuda] [--rounds 15] [--out results.json]

Interleaved; the limit of every row is the time of a copy of the bytes that must move, with the
layer that of its products at this machine's best rate. Peak memory includes the results.
"""

from __future__ import annotations

from functools import partial

from bench.bench_cross_entropy import (
    CASES,
    LAYERS,
    PASSES,
    PRODUCTS,
    WAYS,
    WAYS_OF_LAYERS,
    floor_bytes,
    floor_flops,
    step,
    step_of_layer,
)
from bench.comparison import Case, run
from bench.timing import Way


def ways(case: str, order: str, device: str) -> dict[str, Way]:
    return {way: step(way, case, order, device) for way in WAYS}


def ways_of_layers(case: str, order: str, device: str) -> dict[str, Way]:
    return {way: step_of_layer(way, case, order, device) for way in WAYS_OF_LAYERS}


def cases(device: str) -> dict[str, Case]:
    found = {}
    for case, (rows, classes) in CASES.items():
        for order in PASSES:
            title = f"{case}: R={rows}, C={classes}, {order}"
            make = partial(ways, case, order, device)
            found[title] = Case(make, floor_bytes(case, order), memory=order != "forward")
    for case, (rows, width, classes) in LAYERS.items():
        for order in PRODUCTS:
            title = f"layer, {case}: R={rows}, D={width}, C={classes}, {order}"
            make = partial(ways_of_layers, case, order, device)
            flops = floor_flops(case, order)
            found[title] = Case(make, flops=flops, memory=order != "forward")
    return found


if __name__ == "__main__":
    run("bench.compare_cross_entropy", __doc__, cases)
