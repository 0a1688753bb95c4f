"""The Triton kernels, interpreted on the CPU, as implementation ``"triton"``.

Triton decides when it is imported whether kernels are interpreted, so these tests run in a process
of their own: `test_triton_interpreter.py` starts it with TRITON_INTERPRET=1.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from fastmeta import _triton

    _triton.register("cpu", winner=False)
else:
    collect_ignore_glob = ["*"]


def pytest_configure(config):
    # lanes that a mask discards divide by zero without a word on a GPU
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
