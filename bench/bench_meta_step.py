"""One meta-step of each case, by memory mode and beside the per-task loop.

make bench                    all benchmarks
make bench ARGS="-k full"     one case
"""

import pytest

from bench.compare import fastmeta_step, peer_step


@pytest.mark.parametrize("case", ["full", "lora", "last2"])
@pytest.mark.parametrize("way", ["unroll", "recompute", "per-task loop"])
def bench_meta_step(benchmark, case: str, way: str):
    step = peer_step(case, way) if way == "per-task loop" else fastmeta_step(case, way)
    benchmark.group = case
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
