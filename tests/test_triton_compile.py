"""Every Triton kernel compiles for the supported architectures in the configurations it is launched
with: without register spills, within shared memory, with vector loads. Needs no GPU.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmeta import _triton
from fastmeta.reference.pairwise import ABSOLUTE, MAXIMUM, POWER, PRODUCT, SQUARES

triton = pytest.importorskip("triton", reason="triton is not installed")

SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes; 8.6 and 8.9 run sm_80's kernels
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
KINDS = {"squares": (SQUARES, 2.0), "absolute": (ABSOLUTE, 1.0), "power": (POWER, 2.7)}
KINDS |= {"maximum": (MAXIMUM, 0.0), "product": (PRODUCT, 0.0)}
SHAPES = {  # B, N, M, D
    "many": (4, 256, 320, 512),
    "few": (64, 75, 5, 640),
    "odd": (3, 33, 20, 35),
    "flat": (2, 100, 200, 3),
}


@dataclass(frozen=True)
class Launch:
    """What `launch` was asked to run."""

    kernel: Any
    args: tuple
    num_warps: int
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


@pytest.fixture(scope="module")
def launchers() -> dict[str, Callable]:
    if triton.knobs.runtime.interpret:
        pytest.skip("the kernels are interpreted in this process")
    return dict(_triton.launchers())


@pytest.fixture
def recorded(launchers, monkeypatch) -> list[Launch]:
    """Launches, recorded instead of run."""
    calls: list[Launch] = []

    def record(kernel, programs, *args, num_warps, **constants):
        assert 0 <= programs < 2**31
        if programs:
            calls.append(Launch(kernel, args, num_warps, constants))

    for module in {
        launcher.__globals__["__name__"]: launcher for launcher in launchers.values()
    }.values():
        monkeypatch.setitem(module.__globals__, "launch", record)
    return calls


def call_pairs(launchers, kind: int, p: float, shape, dtype) -> None:
    """All operators on pairs, on tensors without memory."""
    b, n, m, d = shape
    x, y = (
        torch.empty(b, n, d, dtype=dtype, device="meta"),
        torch.empty(b, m, d, dtype=dtype, device="meta"),
    )
    w = torch.empty(b, n, m, dtype=dtype, device="meta")
    launchers["pairwise_sums"](x, y, kind, p)
    if dtype in (torch.float16, torch.bfloat16):
        return
    sums = w if kind == MAXIMUM else None
    launchers["pairwise_sums_backward"](w, x, y, sums, kind, p, 3)
    needs = 4 if kind in (ABSOLUTE, MAXIMUM) else 7
    for a, c in ((x, y), (x, None), (None, y)):
        launchers["pairwise_sums_double_backward"](a, c, w, x, y, sums, kind, p, needs)


def call_loss(launchers, kind: int, p: float, shape, dtype) -> None:
    tasks, rows, classes, d = shape
    wide = dtype if dtype == torch.float64 else torch.float32
    query = torch.empty(tasks, rows, d, dtype=dtype, device="meta")
    prototypes = torch.empty(tasks, classes, d, dtype=dtype, device="meta")
    labels = torch.empty(tasks, rows, dtype=torch.int64, device="meta")
    scale = torch.empty(tasks, dtype=wide, device="meta")
    root = 2.0 if kind == SQUARES else p if kind == POWER else 1.0
    for present in (None, torch.empty(tasks, classes, dtype=torch.bool, device="meta")):
        given = (query, labels, prototypes, present, scale, kind, p, root)
        _, _, logits = launchers["prototypical"](*given)
        if dtype in (torch.float32, torch.float64):
            launchers["prototypical_backward"](scale, logits, *given, 7)
            launchers["prototypical_rows_"](logits, labels, present, scale, kind, root, True)


def call_others(launchers, shape, dtype) -> None:
    b, n, m, d = shape
    x, y = (torch.empty(b, rows, d, dtype=dtype, device="meta") for rows in (n, m))
    xx, yy = x[..., 0].contiguous(), y[..., 0].contiguous()
    dots = torch.empty(b, n, m, dtype=dtype, device="meta")
    launchers["pairwise_squares_"](dots, x, y, xx, yy)
    labels = torch.empty(b, n, dtype=torch.int64, device="meta")
    launchers["class_sums"](x, labels, m)
    launchers["class_gather"](y, labels)
    launchers["take_rows"](y[0], labels[0])
    for k in (1, 10, 64):
        values = torch.empty(n, k, dtype=dtype, device="meta")
        indices = torch.empty(n, k, dtype=torch.int64, device="meta")
        for offset in (None, yy[0]):
            launchers["nearest_select_"](values, indices, dots[0], offset, -2.0, 0)


def call_lora(launchers, dtype, bits: int = 0, ragged: bool = False) -> None:
    tasks, rows, width, outputs, rank = 64, 800, 512, 384, 8

    def empty(*shape: int, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    wide = dtype if dtype == torch.float64 else torch.float32
    x, dy = empty(tasks * rows, width), empty(tasks * rows, outputs)
    a, b, bias = empty(tasks, rank, width), empty(tasks, outputs, rank), empty(1, outputs)
    weight, scale = empty(outputs, width), None
    if bits:
        values = torch.int8 if bits == 8 else torch.uint8
        weight = empty(outputs, width * bits // 8, dtype=values)
        scale = empty(outputs, width // (width if bits == 8 else 64), dtype=wide)
    offsets = empty(tasks + 1, dtype=torch.int64) if ragged else None
    shared = (weight, scale, a, b)
    _, s = launchers["lora_linear"](x, weight, scale, bias, a, b, offsets, 2.0)
    launchers["lora_linear_backward"](dy, x, *shared, s, offsets, 2.0, 29)
    given = (dy, x, *shared, s, offsets, 2.0, 29)
    launchers["lora_linear_double_backward"](x, bias, a, b, *given)


def call_norms(launchers, dtype) -> None:
    """Normalisations, activations and dropout of BERT's and MiniLM's width."""
    for tasks, rows, width in ((32, 80, 128), (8, 600, 384)):
        x, dy, u = (torch.empty(tasks * rows, width, dtype=dtype, device="meta") for _ in range(3))
        w, b = (torch.empty(tasks, width, dtype=dtype, device="meta") for _ in range(2))
        for bias, rms in ((b, False), (None, True)):
            _, stats = launchers["layer_norm"](x, w, bias, 1e-5, rms)
            launchers["layer_norm_backward"](dy, x, w, stats, rms)
            launchers["layer_norm_double_backward"](u, w, bias, dy, x, w, stats, rms)
    for kind in range(3):
        launchers["activation"](x, kind)
        launchers["activation_backward"](dy, x, kind)
        launchers["activation_double_backward"](u, dy, x, kind)
    seed = torch.empty((), dtype=torch.int64, device="meta")
    launchers["dropout"](x, seed, 0.1, x.numel())


def call_cross_entropy(launchers, dtype) -> None:
    """A few classes, and the words of a language model."""
    for rows, classes in ((160, 5), (2048, 32_000)):
        x, v = (torch.empty(rows, classes, dtype=dtype, device="meta") for _ in range(2))
        labels = torch.empty(rows, dtype=torch.int64, device="meta")
        g, stats = launchers["cross_entropy"](x, labels, -100)
        launchers["cross_entropy_backward"](g, x, labels, stats)
        launchers["cross_entropy_double_backward"](v, g, x, labels, stats)
    states, words = (torch.empty(n, 512, dtype=dtype, device="meta") for n in (2048, 32_000))
    given = states, words, None, labels
    losses, stats, slopes = launchers["linear_cross_entropy"](*given, -100, True, False)
    launchers["linear_cross_entropy_double_backward"](slopes, losses, *given, stats, slopes, False)


def source_of(launch: Launch):
    """The source as the just-in-time compiler would specialise it for these arguments."""
    signature, constants, attributes = {}, {}, {}
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    for i, parameter in enumerate(launch.kernel.params):
        value = given[parameter.name]
        free = parameter.do_not_specialize
        kind = "constexpr"
        if isinstance(value, torch.Tensor):
            kind = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif not parameter.is_constexpr and value is not None and (free or value != 1):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not free and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        if kind == "constexpr":
            constants[(i,)] = value
        signature[parameter.name] = kind
    key = (launch.name, str(signature), str(constants), str(attributes), launch.num_warps)
    return key, triton.compiler.ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )


def compiled(launches: list[Launch], architecture: int) -> Iterator[tuple[Launch, Any]]:
    from triton.backends.compiler import GPUTarget

    seen = set()
    for launch in launches:
        key, source = source_of(launch)
        if key not in seen:
            seen.add(key)
            options = {"num_warps": launch.num_warps, "enable_fp_fusion": True}
            target = GPUTarget("cuda", architecture, 32)
            yield launch, triton.compile(source, target=target, options=options)


def check(
    launches: list[Launch], architecture: int, tmp_path: Path, known: dict[str, int] | None = None
) -> None:
    """Compile them; `known` are bytes of stack that kernels are known to need."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    spilled = []
    for launch, binary in compiled(launches, architecture):
        what = f"{launch.name} sm_{architecture} {launch.constants}"
        assert binary.metadata.shared <= SHARED[architecture], what
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage = subprocess.run(
            [str(cuobjdump), "--dump-resource-usage", str(cubin)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        registers, local = (int(re.search(rf"{n}:(\d+)", usage)[1]) for n in ("REG", "LOCAL"))
        stack = int(re.search(r"STACK:(\d+)", usage)[1])
        print(
            f"{what}: {registers} registers, {binary.metadata.shared} bytes shared, {stack} stack"
        )
        # a few registers around a branch, or a power or exponential of doubles; derivatives of
        # attention, the second ones of which hold eight tiles of wide heads
        doubles = launch.constants.get("ACC") == triton.language.float64
        width = max(launch.constants.get("BD", 0), launch.constants.get("BE", 0))
        first = launch.name in ("rows_kernel", "keys_kernel") and width >= 32
        second = launch.name.startswith("second_") and width >= 64
        most = 512 if second else 320 if first else 64 if doubles else 16
        if local or stack > (known or {}).get(launch.name, most):
            spilled.append(f"{what}: {registers} registers, {stack} bytes of stack")
        assert_vectors(launch, binary, what)
    assert launches and not spilled, "\n".join(spilled)


def assert_vectors(launch: Launch, binary, what: str) -> None:
    """Rows of 640 or 512 contiguous, aligned numbers are loaded 8 or 16 bytes at a time, and so is
    what has no rows."""
    wide = any(
        isinstance(a, torch.Tensor) and a.dim() == 3 and a.shape[2] >= 512 for a in launch.args
    )
    reads_rows = launch.name in ("sums_kernel", "loss_kernel", "class_gather_kernel")
    elementwise = launch.name in ("activation_kernel", "dropout_kernel")
    if (wide and reads_rows) or elementwise:
        assert re.search(r"ld\.global[\w.:]*\.v[24]\.", binary.asm["ptx"]), what


@pytest.mark.parametrize("name", ["squares", "maximum"])
def test_compiles(name: str, launchers, recorded, tmp_path):
    kind, p = KINDS[name]
    call_pairs(launchers, kind, p, SHAPES["many"], torch.float32)
    call_loss(launchers, kind, p, SHAPES["few"], torch.float32)
    if name == "squares":
        call_others(launchers, SHAPES["few"], torch.float32)
    check(recorded[:12] if name == "maximum" else recorded, 90, tmp_path)


def tiles_of(architecture: int, launcher, monkeypatch) -> None:
    """Tiles as a GPU of that architecture has them."""
    hopper = architecture == 90
    monkeypatch.setitem(launcher.__globals__, "multiplies_64_rows", lambda device: hopper)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_compiles(dtype, launchers, recorded, tmp_path, monkeypatch):
    """With tensor cores, which multiply in all types."""
    tiles_of(90, launchers["lora_linear"], monkeypatch)
    call_lora(launchers, dtype)
    check(recorded, 90, tmp_path)
    assert all("mma" in binary.asm["ptx"] for _, binary in compiled(recorded, 90))


def test_norms_compile(launchers, recorded, tmp_path):
    call_norms(launchers, torch.float32)
    call_cross_entropy(launchers, torch.float32)
    check(recorded, 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("dtype", [d for d in TYPES if d.is_floating_point], ids=str)
def test_norms_compile_everything(dtype, architecture: int, launchers, recorded, tmp_path):
    call_norms(launchers, dtype)
    call_cross_entropy(launchers, dtype)
    check(recorded, architecture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("dtype", [d for d in TYPES if d.is_floating_point], ids=str)
def test_lora_compiles_everything(
    dtype, architecture: int, launchers, recorded, tmp_path, monkeypatch
):
    tiles_of(architecture, launchers["lora_linear"], monkeypatch)
    for bits in (0, 8, 4):
        for ragged in (False, True):
            call_lora(launchers, dtype, bits, ragged)
    check(recorded, architecture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("dtype", [d for d in TYPES if d.is_floating_point], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_compiles_everything(name: str, dtype, architecture: int, launchers, recorded, tmp_path):
    kind, p = KINDS[name]
    for shape in SHAPES.values():
        call_pairs(launchers, kind, p, shape, dtype)
        call_loss(launchers, kind, p, shape, dtype)
        if name == "squares" and dtype in (torch.float32, torch.float64):
            call_others(launchers, shape, dtype)
    check(recorded, architecture, tmp_path)


ATTENTION = {  # B, H, Hk, Lq, Lk, D
    "short": (64, 12, 12, 32, 32, 32),
    "grouped": (8, 8, 2, 64, 64, 64),
    "long": (2, 4, 4, 512, 512, 128),
}
# Whole heads of 256 numbers, and of 128 doubles, fill the shared memory that sm_90 has, and more.
WIDE_SPILLS = {"forward_kernel": 256} | dict.fromkeys(
    ("rows_kernel", "keys_kernel", "second_rows_kernel", "second_keys_kernel"), 1 << 13
)


def call_attention(launchers, shape, dtype, options: bool) -> None:
    """Forward, backward and double backward, with a mask and dropout or without."""
    b, h, groups, queries, keys, width = shape

    def empty(*sizes, dtype=dtype):
        return torch.empty(sizes, dtype=dtype, device="meta")

    q, a, d_out = (empty(b, h, queries, width) for _ in range(3))
    k, v, kc, vc = (empty(b, groups, keys, width) for _ in range(4))
    mask = empty(b, 1, 1, keys, dtype=torch.bool) if options else None
    seed = empty(dtype=torch.int64) if options else None
    setting = (None, width**-0.5, -queries, 0 if options else keys, 0.1 if options else 0.0, b)
    _, stats = launchers["attention"](q, k, v, mask, seed, *setting)
    given = (d_out, q, k, v, stats, mask, seed, *setting)
    launchers["attention_backward"](*given, 7)
    launchers["attention_double_backward"](a, kc, vc, *given, 15)


@pytest.mark.parametrize("options", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attention_compiles(dtype, options: bool, launchers, recorded, tmp_path):
    call_attention(launchers, ATTENTION["short"], dtype, options)
    check(recorded, 90, tmp_path, {"second_rows_kernel": 192} if dtype == torch.float64 else None)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ATTENTION)
def test_all_attention_compiles(
    shape, dtype, architecture: int, launchers, recorded, tmp_path, monkeypatch
):
    tiles_of(architecture, launchers["attention"], monkeypatch)
    for options in (False, True):
        call_attention(launchers, ATTENTION[shape], dtype, options)
    check(recorded, architecture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_attention_compiles(dtype, architecture: int, launchers, recorded, tmp_path):
    call_attention(launchers, (2, 4, 4, 64, 64, 256), dtype, True)
    check(recorded, architecture, tmp_path, WIDE_SPILLS)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [90, 100])
def test_wide_attention_of_doubles_compiles(architecture: int, launchers, recorded, tmp_path):
    call_attention(launchers, ATTENTION["long"], torch.float64, True)
    check(recorded, architecture, tmp_path, WIDE_SPILLS)


def call_lstm(launchers, dtype, hidden: int, directions: bool) -> None:
    """Forward, gradient and its derivative, with every direction or those of the weights absent."""
    rows, features = 1_000_000, 2

    def empty(*sizes):
        return torch.empty(sizes, dtype=dtype, device="meta")

    x, state = empty(rows, features), empty(rows, hidden)
    weights = (empty(4 * hidden, features), empty(4 * hidden, hidden), empty(4 * hidden))
    given = (x, state, state, *weights)
    launchers["coordinate_lstm"](*given)
    launchers["coordinate_lstm_backward"](state, state, *given, 15)
    own = weights if directions else (None,) * 3
    launchers["coordinate_lstm_double_backward"](x, state, state, *own, state, state, *given, 31)


# The derivatives still spill: the weights of all gates are held in registers.
LSTM_SPILLS = {"gradient_kernel": 160, "weights_kernel": 640}


def test_lstm_compiles(launchers, recorded, tmp_path):
    x, state = (torch.empty(1_000_000, n, device="meta") for n in (2, 20))
    weights = (torch.empty(s, device="meta") for s in ((80, 2), (80, 20), (80,)))
    given = (x, state, state, *weights)
    launchers["coordinate_lstm"](*given)
    launchers["coordinate_lstm_backward"](state, state, *given, 15)
    check(recorded, 90, tmp_path, LSTM_SPILLS)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("dtype", [d for d in TYPES if d.is_floating_point], ids=str)
def test_lstm_compiles_everything(dtype, architecture: int, launchers, recorded, tmp_path):
    for hidden in (20, 32):
        for directions in (False, True):
            call_lstm(launchers, dtype, hidden, directions)
    check(recorded, architecture, tmp_path, dict.fromkeys(LSTM_SPILLS, 1 << 14))
