"""What is computed, and in which precision: frozen weights, products in bfloat16."""

from __future__ import annotations

import episode_oracle as oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fastmeta as fm
from bench import flops
from fastmeta.engine import graphs

BATCH = oracle.as_batch(oracle.make_tasks(4))
ADAPTED = "bert.encoder.layer.0.attention.self.query.weight"


class Products(TorchDispatchMode):
    """Shapes of all matrices that products return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.add(tuple(sorted(out.shape)))
        return out


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("memory", ["unroll", "recompute"])
def test_weights_that_nobody_learns_have_no_gradient(
    memory: str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight gradients of the feed-forward layers would be 24 x 16; nothing else is: three tasks
    have 9 and 12 rows."""
    assert flops.counted
    monkeypatch.setattr(graphs, "written", lambda *a, **k: None)  # nobody sees what tapes run
    batch, found = BATCH[:3], {}
    for trained in (False, True):
        model = oracle.tiny_bert(layers=2).requires_grad_(trained)
        learner = fm.MAML(
            fm.patch(model, fm.Params(ADAPTED)), lr=0.1, steps=2, memory=memory, compile=compile
        )
        learner(batch).loss.backward()  # first use: plans and graphs
        with Products() as products:
            learner(batch).loss.backward()
        if memory == "unroll" and not compile:  # the counter's hooks refuse nested passes
            with FlopCounterMode(display=False) as counter:
                learner(batch).loss.backward()
            found[trained] = counter.get_total_flops()
        assert ((16, 24) in products.shapes) == trained
    assert not found or found[False] < 0.8 * found[True]


def gradient(model: torch.nn.Module, compute_dtype: torch.dtype | None, **settings) -> torch.Tensor:
    learner = fm.MAML(
        fm.patch(model, fm.Params("*")), lr=0.1, steps=3, compute_dtype=compute_dtype, **settings
    )
    out = learner(BATCH)
    assert out.params.packed.dtype == model.classifier.weight.dtype
    return torch.cat([g.flatten().double() for g in oracle.gradients(learner, out.loss).values()])


def rounding(steps: int) -> float:
    """What products in bfloat16 lose on the longest chain: the steps and the query pass, some 20
    products each, there and back."""
    return 2**-9 * (steps * 4 + 2) * 20**0.5


@pytest.mark.parametrize("memory", ["unroll", "recompute", "auto"])
def test_meta_gradients_in_bfloat16(memory: str) -> None:
    """Off by the rounding of the products, 2^-9 each, and that is not hidden: float32 is closer."""
    exact = gradient(oracle.tiny_bert(), None)
    single = gradient(oracle.tiny_bert().float(), None)
    half = gradient(oracle.tiny_bert().float(), torch.bfloat16, memory=memory)

    def error(g: torch.Tensor) -> float:
        return float((g - exact).norm() / exact.norm())

    print(f"relative error: float32 {error(single):.1e}, bfloat16 {error(half):.1e}")
    assert 10 * error(single) < error(half) < rounding(steps=3)


def test_layers_round_the_factors_of_their_products_alone() -> None:
    """Nothing of a model whose weights are all adapted is left to torch's autocast."""
    patched = fm.patch(oracle.tiny_bert().float(), fm.Params("*"))
    settings = {"memory": "unroll", "compute_dtype": torch.bfloat16}
    learner = fm.MAML(patched, lr=0.1, steps=2, **settings)
    learner(BATCH)  # plans
    with Results() as results:
        learner(BATCH).loss.backward()
    assert results.rounded and results.dtypes == {torch.float32}


class Results(TorchDispatchMode):
    """The dtypes of all floating-point results, and whether a product rounded its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.rounded = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.rounded |= func is torch.ops.fastmeta.batched_mms_.default and any(args[-1])
        found = tree_leaves(out)
        self.dtypes |= {
            t.dtype for t in found if isinstance(t, torch.Tensor) and t.is_floating_point()
        }
        return out


def test_compute_dtypes() -> None:
    patched = fm.patch(oracle.tiny_bert(), fm.Head())
    with pytest.raises(ValueError, match=r"needs a model in float32, got torch.float64"):
        fm.MAML(patched, compute_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"must be torch.bfloat16, torch.float16 or None, got 'bf"):
        fm.MAML(patched, compute_dtype="bf16")
    patched = fm.patch(oracle.tiny_bert().float(), fm.Head())
    assert fm.MAML(patched, compute_dtype="bfloat16").compute_dtype == torch.bfloat16


@pytest.mark.parametrize("steps", [0, 2])
def test_hypernetworks_in_bfloat16(steps: int) -> None:
    """The model's products only: fast weights are made in float32, to the same bits."""
    patched = fm.patch(oracle.tiny_bert().float(), fm.Head() + fm.Bias())
    labels = torch.arange(3).expand(BATCH.num_tasks, 3)
    batch = fm.TaskBatch({**BATCH.support, "labels": labels}, BATCH.query)
    made, gradients = [], []
    for dtype in (None, torch.bfloat16):
        learner = fm.HyperNetwork(patched, steps=steps, lr=0.1, compute_dtype=dtype)
        out = learner(batch)
        found = oracle.gradients(learner, out.loss)
        gradients.append(torch.cat([g.flatten().double() for g in found.values()]))
        made.append(out.params.packed)
        again = learner.adapt(batch.support)
        torch.testing.assert_close(again.packed, out.params.packed.detach())
        assert learner.predict(again, **BATCH.query).dtype == torch.float32
    assert torch.equal(*made) == (steps == 0)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 1e-5 < error < rounding(steps)


def test_adapting_in_bfloat16() -> None:
    patched = fm.patch(oracle.tiny_bert().float(), fm.Head())
    settings = {"lr": 0.1, "steps": 3}
    exact = fm.adapt(patched, BATCH.support, **settings)
    half = fm.adapt(patched, BATCH.support, compute_dtype=torch.bfloat16, **settings)
    assert half.params.packed.dtype == torch.float32
    start = patched.init(BATCH.num_tasks).packed
    moved = (exact.params.packed - start).norm()
    assert 0 < (half.params.packed - exact.params.packed).norm() < rounding(steps=3) * moved
    with pytest.raises(ValueError, match="compute_dtype must be"):
        fm.adapt(patched, BATCH.support, compute_dtype=torch.int8, **settings)
