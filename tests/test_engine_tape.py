"""Tapes do what their graphs do; graphs hold what functions do."""

from __future__ import annotations

import gc
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from transformers.utils import import_utils

from fastmeta._library import has_extension
from fastmeta._recorder import record, recording
from fastmeta.engine import graphs
from fastmeta.engine.fused_additions import fuse_additions
from fastmeta.engine.tape_writer import written
from fastmeta.ops.batched_linear import product, together

needs_tapes = pytest.mark.skipif(not has_extension("cpu"), reason="the extension is not built")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TABLE = random(6, 3)


def views(x: Tensor, y: Tensor) -> list[Tensor]:
    a, b, c = x.split([1, 2, 1], dim=1)
    first, second = y.unbind(0)
    looked = b[:, 1:].transpose(0, 1).unsqueeze(0).expand(2, -1, -1)
    return [
        looked * 2.0, a.reshape(-1) + c.squeeze(1), x.view(2, -1).t().contiguous(),
        first.diagonal().exp(), second[1].sum(), x.permute(1, 0)[2:],
    ]  # fmt: skip


def numbers(x: Tensor, y: Tensor) -> list[Tensor]:
    y = y[0]
    scaled = torch.add(x, y, alpha=0.5) - torch.sub(y, x, alpha=3)
    return [
        scaled, x + 1.5, 2 * x, x / 3, x**2, -x, x.clamp_min(0.1), (x > 0.2).double(),
        x.masked_fill(y < 0, 7.0), torch.where(x < 0, x, 0.0), F.relu(x),
        F.gelu(x, approximate="tanh"), x.exp().rsqrt(),
    ]  # fmt: skip


def memory(x: Tensor, y: Tensor) -> list[Tensor]:
    made = torch.zeros_like(x)
    made[:, 1:] += x[:, :-1]
    made.mul_(y[0])
    other = x.new_empty(4, 4)
    other.copy_(y[1])
    other[0].add_(made[0], alpha=2.0)
    return [made, other, x.clone(), x.float(), torch.cat([x, y[0]], 1), x.new_ones(2) * 3]


def integers(x: Tensor, y: Tensor) -> list[Tensor]:
    ids = (x > 0).long().cumsum(1).clamp_min(1)
    small = (x > 0).int()
    places = torch.arange(4) + 2
    return [
        ids + 1, 5 - ids, ids - places, (small + small) * 2, y[0].gather(1, ids - 1), x[ids[0] - 1],
        F.embedding(ids, TABLE), ids.eq(2), F.one_hot(ids, 6).sum((0, 1)),
    ]  # fmt: skip


def several(x: Tensor, y: Tensor) -> list[Tensor]:
    values, places = x.max(1)
    logits = F.log_softmax(y, -1)
    return [
        values, places, F.layer_norm(x, (4,)), logits, F.nll_loss(logits[0], places),
        torch.stack([x, x]).mean((0, 2)), x.sum(0, dtype=torch.float32),
    ]  # fmt: skip


def by_python(x: Tensor, y: Tensor) -> list[Tensor]:
    """What C++ cannot call, for numbers that are no tensors."""
    written = x.clone()
    written.sub_(y[0], alpha=2.0)
    written[1:].div_(2.0, rounding_mode="floor")
    return [
        torch.baddbmm(x, y, y, beta=2.0), torch.addmm(x, y[0], y[1].t(), alpha=0.5), written,
        torch.linalg.vector_norm(x, 2, [1], True), x.to(torch.complex64).abs(),
        (x > 0).long() - 3 * (x > 1).int(), torch.addmm(x[0], y[0], y[1].t()),
    ]  # fmt: skip


FUNCTIONS = {f.__name__: f for f in (views, numbers, memory, integers, several, by_python)}


def run(graph: fx.Graph, *inputs: Tensor):
    return fx.GraphModule(torch.nn.Module(), graph)(*inputs)


def recorded(function, inputs) -> tuple[fx.Graph, list[Tensor]]:
    if function is integers:  # one_hot asks for the largest word

        def function(x: Tensor, y: Tensor) -> list[Tensor]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    F, "one_hot", lambda ids, n: (ids.unsqueeze(-1) == torch.arange(n)).long()
                )
                return integers(x, y)

    with torch.no_grad():
        return record(function, inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_graphs_hold_for_other_values(name: str) -> None:
    graph, constants = recorded(FUNCTIONS[name], [random(4, 4), random(2, 4, 4, seed=1)])
    inputs = [random(4, 4, seed=2), random(2, 4, 4, seed=3)]
    torch.testing.assert_close(run(graph, *inputs, *constants), FUNCTIONS[name](*inputs))


@needs_tapes
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tapes_do_what_graphs_do(name: str) -> None:
    graph, constants = recorded(FUNCTIONS[name], [random(4, 4), random(2, 4, 4, seed=1)])
    tape = written(graph)
    for seed in (2, 4):
        inputs = [random(4, 4, seed=seed), random(2, 4, 4, seed=seed + 1), *constants]
        found, frame = tape.run(inputs)
        assert frame is None
        torch.testing.assert_close(found, list(run(graph, *inputs)), rtol=0, atol=1e-15)


@needs_tapes
def test_sums_of_another_layout_are_no_bases() -> None:
    """Who looks at a sum goes by its strides, which are those of its first operand."""

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        turned = x.mT.exp()  # strides of x^T
        summed = turned + product(x, y)
        return [summed.as_strided((1, 9), (9, 1)) * 2, summed * 2]

    graph, _ = record(function, [random(1, 3, 3), random(1, 3, 3, seed=1)])
    fuse_additions(graph)
    inputs = [random(1, 3, 3, seed=2), random(1, 3, 3, seed=3)]
    torch.testing.assert_close(written(graph).run(inputs)[0], function(*inputs))


def test_masks_are_read_again_after_captures_of_several_threads() -> None:
    before = import_utils.is_jit_tracing
    first, second = graphs.masks_unread(-1), graphs.masks_unread()
    with ExitStack() as outer:
        outer.enter_context(first)
        assert not import_utils.is_jit_tracing()  # in another thread only
        second.__enter__()
        assert import_utils.is_jit_tracing()
    second.__exit__(None, None, None)
    assert import_utils.is_jit_tracing is before and not import_utils.is_jit_tracing()


@needs_tapes
def test_derivatives() -> None:
    """Of a function and of its gradient, as they are captured."""
    weight = random(4, 4, seed=5).requires_grad_()

    def function(x: Tensor, cotangent: Tensor) -> list[Tensor | None]:
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad((x @ weight).tanh().sum(), x, create_graph=True)
        return [g.detach(), *torch.autograd.grad(g, [x, weight], cotangent)]

    x, cotangent = random(3, 4), random(3, 4, seed=1)
    expected = function(x, cotangent)
    pair = graphs.capture(function, [x], [cotangent], 1, None)
    assert isinstance(pair, graphs.TapePair)
    assert [id(t) for t in pair.constants] == [id(weight)]
    with torch.no_grad():
        tensors = [x, *pair.constants]
        outputs, saved = pair.run(tensors)
        torch.testing.assert_close(outputs, expected[:1])
        kept = [tensors[i] for i in pair.kept]
        for keep in (True, True, False):
            found = pair.pull(kept, saved, [cotangent], keep)
            torch.testing.assert_close(found, expected[1:])
        with pytest.raises(RuntimeError, match="a tape or its frame is not there any more"):
            pair.pull(kept, saved, [cotangent], False)


@needs_tapes
def test_outputs_are_not_the_constants_of_a_tape() -> None:
    graph, _ = record(lambda x: [torch.zeros_like(x), x.new_ones(2, 1).expand(2, 3)], [random(2)])
    tape = written(graph)
    for _ in range(2):
        zeros, ones = tape.run([random(2)])[0]
        assert zeros.tolist() == [0, 0] and ones.tolist() == [[1, 1, 1]] * 2
        zeros.add_(1.0)
        ones.mul_(2.0)


@needs_tapes
def test_outputs_are_not_what_is_saved() -> None:
    """Else a graph that is given to an output would hold itself."""
    pair = graphs.capture(lambda x, c: [(y := x.exp()), y * c], [random(2)], [random(2)], 1, None)
    (output,), saved = pair.run([random(2)])
    output.requires_grad_()
    assert not pair.pull([], saved, [random(2)], False)[0].requires_grad


@needs_tapes
def test_wrong_number_of_inputs() -> None:
    graph, _ = record(lambda x: [x.exp()], [random(2)])
    with pytest.raises(RuntimeError, match="a tape reads 1 tensors, got 2"):
        written(graph).run([random(2), random(2)])


@needs_tapes
def test_tapes_and_frames_end_with_their_objects() -> None:
    def function(x: Tensor, cotangent: Tensor) -> list[Tensor]:
        y = x.exp()
        return [y, y.sin() * cotangent]

    pair = graphs.capture(function, [random(2)], [random(2)], 1, None)
    _, frame = pair.run([random(2)])
    tape, number, backward = pair.forward.number, frame.number, pair.backward
    del pair, frame
    gc.collect()
    for gone in ((tape, 0), (backward.number, number)):
        with pytest.raises(RuntimeError, match="is not there any more"):
            torch.ops.fastmeta.tape_run(*gone, False, [random(2)])


@needs_tapes
@pytest.mark.parametrize("ended", [0, 1])
def test_calls_of_python_live_as_long_as_a_tape(ended: int) -> None:
    """Whichever of two that make the same ends first."""
    graph, _ = record(lambda x: [torch.linalg.vector_norm(x, 3.0)], [random(4)])
    tapes = [written(graph), written(graph)]
    del tapes[ended]
    gc.collect()
    x = random(4, seed=1)
    torch.testing.assert_close(tapes[0].run([x])[0][0], torch.linalg.vector_norm(x, 3.0))


@needs_tapes
def test_what_a_tape_cannot_hold() -> None:
    """Several results of an operator that Python has to call."""
    graph, _ = record(lambda x: [*torch.var_mean(x, correction=0.5)], [random(1, 2, 2)])
    assert written(graph) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x if bool((x > 0).all()) else -x],
        lambda x: [x * float(x.sum())],
        lambda x: [x[x > 0]],
        lambda x: [x.nonzero()],
    ],
)
def test_graphs_do_not_know_values(function) -> None:
    with pytest.raises(RuntimeError, match="asks for values, which a graph cannot know"):
        record(function, [random(3)])
    assert not recording()


def test_values_of_constants_are_known() -> None:
    scale = torch.tensor(2.0)
    graph, constants = record(lambda x: [x * float(scale)], [random(3)])
    assert not constants
    torch.testing.assert_close(run(graph, random(3)), [2 * random(3)])


def test_one_tensor_in_two_places() -> None:
    x = random(3)
    graph, _ = record(lambda a, b: [a - 2 * b], [x, x])
    torch.testing.assert_close(run(graph, x, random(3, seed=1)), [x - 2 * random(3, seed=1)])


# -- additions ---------------------------------------------------------------------------------


def sums_of_products(x: Tensor, w: Tensor, other: Tensor) -> list[Tensor]:
    """What autograd adds up: products that ran alone or together, and what is there. Of two that
    ran together one can take the sum before."""
    alone = product(x, w)
    a, b = x.new_empty(x.shape), x.new_empty(x.shape)
    together([(a, x, w, None, False), (b, w, x, None, False)])
    total = other + alone.view(x.shape)
    return [total + a.view(x.shape) + b]


def read_twice(x: Tensor, w: Tensor, other: Tensor) -> list[Tensor]:
    y = product(x, w)
    return [y + other, y]


def later(x: Tensor, w: Tensor, other: Tensor) -> list[Tensor]:
    y = product(x, w)
    return [y + y.sin() * other]


def written_to(x: Tensor, w: Tensor, other: Tensor) -> list[Tensor]:
    other = other.clone()
    y = product(x, w)
    other.mul_(2.0)
    return [y + other]


@pytest.mark.parametrize(
    ("function", "left"), [(sums_of_products, 1), (read_twice, 1), (later, 1), (written_to, 1)]
)
def test_products_take_additions_over(function, left: int) -> None:
    inputs = [random(2, 3, 3, seed=i) for i in range(3)]
    graph, constants = record(function, inputs)
    fuse_additions(graph)
    added = [n for n in graph.nodes if n.target is torch.ops.aten.add.Tensor]
    assert len(added) == left and not constants
    torch.testing.assert_close(run(graph, *inputs), function(*inputs))


def test_products_that_have_a_base_keep_it() -> None:
    x, w, base = (random(2, 3, 3, seed=i) for i in range(3))
    graph, _ = record(lambda x, w, base: [product(x, w, base) + x], [x, w, base])
    fuse_additions(graph)
    torch.testing.assert_close(run(graph, x, w, base), [x @ w + base + x])
