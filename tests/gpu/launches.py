"""How many operators a meta-step launches on a GPU, and how often its host waits.

    python tests/gpu/launches.py [full lora ...]

Counted on the stand-in, so no GPU is needed; the cases are those of ``bench.compare``.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WAYS = {
    "fastmeta": "unroll",
    "fastmeta, CUDA graph": "unroll:graph",
    "fastmeta, recompute": "recompute",
}


def main(cases: list[str]) -> None:
    runpy.run_path(str(HERE / "__main__.py"))["prepare"]()
    sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
    import standin
    from torch import nn

    if standin.REAL:
        sys.exit("only the stand-in counts, and this torch was built for CUDA")
    standin.set_up()
    from bench.compare import PEERS, fastmeta_step, peer_step

    nn.Module.to = lambda model, device: standin.on_gpu(model)
    with standin.gpu() as device:
        for case in cases:
            print(case)
            steps = {
                label: fastmeta_step(case, mode, device="cuda") for label, mode in WAYS.items()
            }
            for peer in ("torch.func.vmap", "per-task loop"):
                if peer in PEERS[case]:
                    steps[peer] = peer_step(case, peer, "cuda")
            for label, step in steps.items():
                step()  # plans, graphs
                device.launches = 0
                device.waits.clear()
                step()
                # the loss that a step returns is a wait of the benchmark
                print(f"  {label:24s}{device.launches:8d} launches{len(device.waits) - 1:6d} waits")


if __name__ == "__main__":
    main(sys.argv[1:] or ["full", "lora"])
