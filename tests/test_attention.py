"""What the operator table does not say of attention: torch's own, dropout, long rows, errors."""

from __future__ import annotations

import pytest
import second_order
import torch
from torch.nn import functional as F

from fastmeta import ops
from fastmeta.ops import use_impl
from fastmeta.patching import attention as patched
from fastmeta.testing.attention import laid_out, mask_of, operands

pytestmark = pytest.mark.usefixtures("_seed")


def made(*shape: int, dtype: torch.dtype = torch.float64, layout: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [laid_out(t, layout).to(dtype) for t in operands(shape, generator)]


def all_orders(q, k, v, **options) -> list[torch.Tensor]:
    return second_order.by_cotangents(lambda *inputs: ops.attention(*inputs, **options), (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [None, "padding", "rows", "heads"])
def test_values_are_those_of_torch(kind, causal):
    shape = (3, 4, 2, 9, 13, 8, 8)
    q, k, v = made(*shape)
    mask = None if kind is None else mask_of(kind, shape, torch.Generator().manual_seed(2))
    band = torch.ones(9, 13, dtype=torch.bool).tril(0 if causal else 13)
    both = band
    if mask is not None:
        boolean = mask.dtype == torch.bool
        both = mask & band if boolean else mask.masked_fill(~band, float("-inf"))
    expected = F.scaled_dot_product_attention(q, k, v, both, enable_gqa=True)
    got = ops.attention(q, k, v, mask, causal=causal)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_rows_without_a_key_are_zero():
    q, k, v = made(2, 2, 2, 4, 5, 8, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1] = False
    for got in all_orders(q, k, v, mask=mask):
        assert not got[1].any() and got[0].any() and bool(got.isfinite().all())


def test_band_of_window_and_offset():
    q, k, v = made(1, 2, 1, 6, 9, 4, 4)
    ahead = torch.arange(9) - (torch.arange(6).unsqueeze(1) + 3)
    for window, allowed in ((2, ahead.abs() <= 2), ((1, 3), (ahead >= -1) & (ahead <= 3))):
        got = ops.attention(q, k, v, window=window, offset=3, causal=True)
        expected = ops.attention(q, k, v, allowed & (ahead <= 0))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_long_rows_agree_with_plain_torch(impl):
    """Several blocks of queries, heads in one group, and a band that leaves keys out."""
    shape = (1, 2, 1, 140, 300, 16, 16)
    given = made(*shape, layout=1)
    mask = mask_of("padding", shape, torch.Generator().manual_seed(2))
    options = {"mask": mask, "causal": True, "window": (150, 20), "offset": 90}
    with use_impl("reference"):
        expected = all_orders(*given, **options)
    with use_impl(impl):
        got = all_orders(*given, **options)
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


def test_softcap():
    q, k, v = made(2, 2, 1, 4, 5, 8, 8)
    scores = torch.tanh(q @ k.mT * 0.5 / 3) * 3
    expected = torch.softmax(scores, -1) @ v
    got = ops.attention(q, k, v, scale=0.5, softcap=3.0)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


# ---- dropout


def dropped(seed: int, p: float, shape=(2, 3, 40, 50), impl: str = "cpp") -> torch.Tensor:
    """Which weights are dropped: with equal scores and one-hot values the result shows each."""
    batch, heads, queries, keys = shape
    q = torch.zeros(batch, heads, queries, 1)
    k = torch.zeros(batch, heads, keys, 1)
    v = torch.eye(keys).expand(batch, heads, keys, keys)
    with use_impl(impl):
        out = ops.attention(q, k, v, dropout_p=p, seed=seed)
    expected = torch.where(out == 0, 0, 1 / (keys * (1 - p)))
    torch.testing.assert_close(out, expected)
    return out == 0


def test_dropout_is_a_function_of_the_seed():
    mine = dropped(-5, 0.3)
    assert torch.equal(mine, dropped(-5, 0.3, impl="reference"))
    assert not torch.equal(mine, dropped(-6, 0.3))
    assert not torch.equal(mine, dropped(-5 + 2**40, 0.3))
    # of the indices alone: more rows, heads, queries or keys change nothing
    assert torch.equal(dropped(-5, 0.3, (3, 5, 60, 70))[:2, :3, :40, :50], mine)
    assert bool((dropped(-5, 0.3) <= dropped(-5, 0.4)).all())


def test_dropout_statistics():
    p, shape = 0.3, (4, 6, 64, 64)
    out = dropped(11, p, shape).double()
    deviation = (p * (1 - p) / out.numel()) ** 0.5
    assert abs(out.mean().item() - p) < 5 * deviation
    for axis in range(4):  # neighbours along every axis are independent
        x, y = out.narrow(axis, 0, shape[axis] - 1), out.narrow(axis, 1, shape[axis] - 1)
        covariance = ((x - p) * (y - p)).mean().item()
        assert abs(covariance) < 5 * p * (1 - p) / x.numel() ** 0.5, axis


def test_dropout_of_float64_and_float32_is_the_same():
    given = made(2, 2, 2, 5, 40, 8, 8)
    wide = ops.attention(*given, dropout_p=0.5, seed=3)
    narrow = ops.attention(*(t.float() for t in given), dropout_p=0.5, seed=3)
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-5)


def test_samples_of_vmap_see_the_same_dropout():
    q, k, v = made(2, 2, 1, 3, 4, 8, 8)
    got = torch.func.vmap(lambda q: ops.attention(q, k, v, dropout_p=0.5, seed=3))(
        torch.stack([q, 2 * q])
    )
    for factor, g in zip((1, 2), got, strict=True):
        expected = ops.attention(factor * q, k, v, dropout_p=0.5, seed=3)
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="seed must be shared"):
        seeds = torch.arange(2)
        torch.func.vmap(lambda s: ops.attention(q, k, v, dropout_p=0.5, seed=s))(seeds)


# ---- as models call it


def test_a_mask_alone_says_what_is_seen():
    """Transformers passes ``is_causal`` beside a mask that has it already, or that does not."""
    q, k, v = made(1, 2, 2, 3, 3, 4, 4)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    found, expected = (
        patched.attention(None, q, k, v, mask, is_causal=causal)[0] for causal in (True, False)
    )
    torch.testing.assert_close(found, expected)


def test_one_query_is_the_last_word_where_the_model_says_causal():
    q, k, v = made(1, 2, 2, 1, 3, 4, 4)
    found, expected = (
        patched.attention(None, q, k, v, None, is_causal=causal)[0] for causal in (True, False)
    )
    torch.testing.assert_close(found, expected)


def test_one_query_is_the_first_word_as_torch_has_it():
    q, k, v = made(1, 2, 2, 1, 3, 4, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(patched._in_place_of_torch(q, k, v, is_causal=True), expected)


def test_dropout_differs_from_row_to_row():
    q = torch.randn(1, 1, 6, 4).expand(4, 1, 6, 4).contiguous()
    out, _ = patched.attention(None, q, q, q, None, dropout=0.5, is_causal=False)
    assert all(not torch.equal(out[0], row) for row in out[1:])


# ---- everything else


@pytest.mark.parametrize("learned", [False, True])
def test_third_order(learned):
    def derivatives():
        given = [t.requires_grad_() for t in made(1, 2, 1, 2, 3, 2, 2)]
        bias = torch.linspace(-1, 1, 3, dtype=torch.float64).view(1, 1, 1, 3).requires_grad_()
        of = [*given, bias] if learned else given
        total = ops.attention(*given, bias if learned else None, causal=True, offset=1).pow(3).sum()
        found = []
        for _ in range(3):
            found.append(torch.autograd.grad(total, of, create_graph=True))
            total = sum(g.pow(3).sum() for g in found[-1])
        return [g for order in found for g in order]

    got = derivatives()
    with use_impl("reference"):
        expected = derivatives()
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_mask_is_learned_under_func():
    """There the forward pass is the kernel's; the gradient of the mask is a composition."""
    q, k, v = made(2, 2, 1, 3, 4, 2, 2)
    bias = torch.randn(1, 2, 3, 4, dtype=torch.float64)

    def gradient(bias):
        return torch.func.grad(lambda b: ops.attention(q, k, v, b).pow(3).sum())(bias)

    def second(bias):
        return torch.func.grad(lambda b: gradient(b).pow(2).sum())(bias)

    with use_impl("reference"):
        expected = gradient(bias), second(bias)
    for got, e in zip((gradient(bias), second(bias)), expected, strict=True):
        torch.testing.assert_close(got, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_mask_of_another_dtype(dtype):
    q, k, v = made(2, 2, 2, 4, 4, 8, 8, dtype=torch.float32)
    mask = torch.randn(2, 1, 4, 4).to(dtype)
    with use_impl("reference"):
        expected = ops.attention(q, k, v, mask)
    torch.testing.assert_close(ops.attention(q, k, v, mask), expected)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_what_is_wanted(wanted):
    given = made(2, 2, 1, 5, 6, 8, 8)
    whole = [t.clone().requires_grad_() for t in given]
    some = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(given)]

    def penalty(inputs, of):
        out = ops.attention(*inputs)
        first = torch.autograd.grad(out.pow(2).sum(), of, create_graph=True)
        return torch.autograd.grad(sum(g.pow(3).sum() for g in first), of)

    got = penalty(some, [some[i] for i in wanted])
    expected = penalty(whole, [whole[i] for i in wanted])
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_number_of_threads_changes_nothing():
    given = made(5, 4, 2, 33, 40, 16, 16, dtype=torch.float32)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append(all_orders(*given, dropout_p=0.2, seed=1))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_nan_stays_in_its_row_of_the_result():
    q, k, v = made(1, 2, 2, 4, 5, 8, 8)
    q[0, 0, 1, 0] = float("nan")
    got = ops.attention(q, k, v)
    assert bool(got[0, 0, 1].isnan().all()) and int(got.isnan().sum()) == 8


def test_results_lie_as_the_inputs_do():
    """Projections give heads within rows; the gradients have them there too, without a copy."""
    q, k, v = (t.requires_grad_() for t in made(2, 3, 3, 4, 5, 8, 8, layout=1))
    grads = torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v))
    assert all(g.transpose(1, 2).is_contiguous() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential_over_its_whole_range(dtype):
    """Two keys with scores 0 and x: the weight of the second is ``exp(x) / (1 + exp(x))``."""
    least = -87.0 if dtype == torch.float32 else -708.0
    x = torch.linspace(least, 0, 4001, dtype=dtype)
    q = x.view(1, 1, -1, 1)
    k = torch.tensor([0.0, 1.0], dtype=dtype).view(1, 1, 2, 1)
    got = ops.attention(q, k, torch.eye(2, dtype=dtype).view(1, 1, 2, 2), scale=1.0)[0, 0, :, 1]
    expected = torch.sigmoid(x.double())
    eps = torch.finfo(dtype).eps
    # one and a bit for exp, half each for the sum, its inverse and the product
    assert bool(((got.double() - expected).abs() <= 3 * eps * expected).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 3, 4)}, r"q must be a floating-point tensor \[B, H, L, D\], got float32"),
        ({"k": (2, 2, 5, 7)}, r"k must be \[2, Hk, Lk, 8\] as q is .*got float32 \[2, 2, 5, 7\]"),
        ({"v": (2, 2, 6, 8)}, r"v must be \[2, 2, 5, E\] as k is .*got float32 \[2, 2, 6, 8\]"),
        ({"q": (2, 3, 4, 8)}, "multiple of those of k, got H = 3 and Hk = 2"),
        ({"q": (2, 2, 4, 0), "k": (2, 2, 5, 0)}, "head size D must be at least 1, got float32"),
        ({"mask": (2, 1, 1, 4)}, r"broadcast to \[B, H, Lq, Lk\] = \[2, 2, 4, 5\], got float32"),
        ({"mask": (2, 2, 2, 4, 5)}, "mask must broadcast"),
        ({"dropout_p": 1.0, "seed": 0}, "dropout_p must be finite and >= 0 and < 1, got 1.0"),
        ({"dropout_p": 0.1}, "dropout needs a seed, .* got NoneType None"),
        ({"window": -1}, "window must be an integer >= 0 or two of them"),
        ({"window": (1, -1)}, "window must be an integer >= 0 or two of them"),
        ({"softcap": 0.0}, "softcap must be finite and > 0, got 0.0"),
        ({"scale": float("inf")}, "scale must be a finite number"),
        ({"offset": 1.5}, "offset must be an integer"),
        ({"dtype": torch.float64}, "k must have the dtype and device of q, float64"),
    ],
)
def test_errors(change, message):
    shapes = {"q": (2, 2, 4, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 8)}
    shapes |= {name: change.pop(name) for name in ("q", "k", "v") if name in change}
    q, k, v = (torch.zeros(shape) for shape in shapes.values())
    if "dtype" in change:
        q = q.to(change.pop("dtype"))
    if "mask" in change:
        change["mask"] = torch.zeros(change["mask"])
    with pytest.raises(ValueError, match=message):
        ops.attention(q, k, v, **change)
    mask = torch.zeros(1, 1, 1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="mask must be a bool or floating-point tensor"):
        ops.attention(*(torch.zeros(s) for s in ((2, 2, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8))), mask)
