"""Tests of this folder run on a GPU, or where `__main__.py` has put a stand-in for one."""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent

if torch.accelerator.current_accelerator() is None:
    collect_ignore_glob = ["*"]
else:
    sys.path.insert(0, str(HERE))
    import standin

    if not standin.REAL:
        torch.set_num_threads(1)  # other tests run meanwhile
        standin.set_up()
