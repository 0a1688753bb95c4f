"""Inner loops by leaf: the same numbers as the general loop, whichever way a weight is kept."""

from __future__ import annotations

import gc
import weakref

import episode_oracle as oracle
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import fastmeta as fm
from fastmeta import ops
from fastmeta.engine import episode
from fastmeta.engine.tape import Frame
from fastmeta.patching.adapted_linear import Descent, Gate, adapted_linear, descend
from fastmeta.patching.fast_weights import FastMatrix, FastTable
from fastmeta.patching.leaf_params import LeafParams

T, N, L, WAYS = 3, 2, 4, 3


def batch(vocabulary: int = 20, rows: int = N) -> fm.TaskBatch:
    generator = torch.Generator().manual_seed(3)

    def task_set() -> dict[str, Tensor]:
        ids = torch.randint(0, vocabulary, (T, rows, L), generator=generator)
        ids[:, :, -1] = 0  # the padding word of BERT
        labels = torch.randint(0, WAYS, (T, rows), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return fm.TaskBatch(task_set(), task_set())


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, num_labels=WAYS, pad_token_id=0
    )
    return GPT2ForSequenceClassification(config).double().eval()


def run(make, monkeypatch, by_leaf: bool, given: fm.TaskBatch, **settings) -> dict[str, Tensor]:
    """Results and meta-gradients of one meta-step."""
    with monkeypatch.context() as patch:
        if not by_leaf:
            patch.setattr(episode, "may_serve", lambda *_: False)
        patched = fm.patch(make(), fm.Params("*"))
        learner = fm.MAML(patched, memory="unroll", **settings)
        out = learner(given)
        assert isinstance(out.params, LeafParams) is by_leaf
        found = oracle.gradients(learner, out.loss)
    fast = {f"fast {name}": t.detach() for name, t in out.params.items()}
    return {"logits": out.logits.detach(), "losses": out.support_losses, **fast, **found}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(actual[name], want, rtol=1e-9, atol=1e-12)


RATES = {
    "number": lambda: 0.1,
    "learned": lambda: fm.LearnedRate(per=("task", "step"), init=0.1, num_tasks=T),
}


@pytest.fixture(autouse=True)
def _small_tables_too(monkeypatch) -> None:
    """Keep the tests' small vocabularies by leaf as well."""
    monkeypatch.setattr("fastmeta.patching.rules.FEW_WORDS", 4)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("make", [oracle.tiny_bert, gpt2])
def test_same_as_the_general_loop(make, order: int, rate: str, monkeypatch) -> None:
    found = [
        run(make, monkeypatch, by_leaf, batch(), lr=RATES[rate](), steps=3, order=order)
        for by_leaf in (True, False)
    ]
    assert_same(*found)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("make", [oracle.tiny_bert, gpt2])
def test_captured(make, rate: str, monkeypatch) -> None:
    settings = {"lr": RATES[rate](), "steps": 3}
    found = run(make, monkeypatch, True, batch(), compile=True, **settings)
    assert_same(found, run(make, monkeypatch, False, batch(), **settings))


@pytest.mark.parametrize("make", [oracle.tiny_bert, gpt2])
def test_without_kernels(make, monkeypatch) -> None:
    found = run(make, monkeypatch, True, batch(), lr=0.1, steps=3)
    with ops.use_impl("reference"):
        assert_same(run(make, monkeypatch, True, batch(), lr=0.1, steps=3), found)


@pytest.mark.parametrize("compile", [False, True])
def test_chunks_are_kept_by_leaf_too(compile: bool, monkeypatch) -> None:
    """Also where their graphs are built again, for a loss that reads the fast weights."""
    served, original = [], episode.unroll_by_leaf

    def by_leaf(loop, start, support):
        served.append(start.num_tasks)
        return original(loop, start, support)

    monkeypatch.setattr(episode, "unroll_by_leaf", by_leaf)
    found = []
    for chunk in (None, 2):
        patched = fm.patch(oracle.tiny_bert(), fm.Params("*"))
        settings = {
            "memory": "unroll",
            "task_chunk": chunk,
            "compile": compile and chunk is not None,
        }
        learner = fm.MAML(patched, lr=0.1, steps=2, **settings)
        out = learner(batch())
        weighted = (out.task_losses * torch.arange(1, T + 1)).sum()
        found.append(
            oracle.gradients(learner, out.loss + weighted + out.params.packed.tanh().sum())
        )
    assert served == [T, 2, 1, 2, 1]  # forward, and backward
    assert_same(*found)


def test_tables_of_many_tokens(monkeypatch) -> None:
    """A small vocabulary and many rows: tasks have tables of their own."""
    monkeypatch.setattr("fastmeta.patching.words._WORTH", 0.0)
    found = [
        run(oracle.tiny_bert, monkeypatch, by_leaf, batch(), lr=0.1, steps=3)
        for by_leaf in (True, False)
    ]
    assert_same(*found)


@pytest.mark.parametrize("nt", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rows", [1, 7])
def test_matrix_is_what_its_steps_add(rows: int, heads: int, nt: bool) -> None:
    """Few rows stay factors, many are written out; either way the same weights."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = random(6 * heads, 8)
    matrix = FastMatrix(weight, T, 3, Gate())
    expected = weight.expand(T, -1, -1).unflatten(1, (heads, 6)).flatten(0, 1)
    ins, outs = (8, 6) if nt else (6, 8)
    matrix.recording = True
    for _ in range(3):
        x, base, g = (
            random(T * heads, rows, ins),
            random(T * heads, 1, outs),
            random(T * heads, rows, outs),
        )
        y = matrix(x, base, nt=nt, heads=heads)
        torch.testing.assert_close(y, base + x @ (expected.mT if nt else expected))
        matrix.descend(g, True)
        matrix.calls.clear()
        expected = expected + (g.mT @ x if nt else x.mT @ g)
    assert (matrix.own is None) is (rows == 1)
    torch.testing.assert_close(matrix.written_out(), expected.reshape(T, 6 * heads, 8))
    matrix.recording = False
    x = random(T, 2, 8)  # as a whole
    torch.testing.assert_close(matrix(x, None, nt=True), x @ expected.reshape(T, 6 * heads, 8).mT)


def test_table_is_what_its_steps_add() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 9, (T * 2, 3), generator=generator)
    table = FastTable(weight, T, padding_idx=0)
    table.recording = True
    expected = weight.repeat(T, 1, 1)
    for _ in range(2):
        torch.testing.assert_close(
            table(ids), torch.stack([expected[i // 2][row] for i, row in enumerate(ids)])
        )
        g = torch.randn(T, 6, 4, generator=generator, dtype=torch.float64)
        table.descend(g, True)
        table.calls.clear()
        for t in range(T):
            for token, row in zip(ids.view(T, 6)[t], g[t], strict=True):
                if token != 0:
                    expected[t, token] += row
    torch.testing.assert_close(table.written_out(), expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("low_rank", [True, False])
def test_operators_differentiate_to_any_order(low_rank: bool, shared: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    weight = random(1 if shared else 2, 3, 4)
    factors = (random(2, 1, 4), random(2, 1, 3)) if low_rank else ()
    inputs = (random(2, 2, 4), weight, random(2, 1, 3), random(2, 2, 3), *factors)

    def step(x: Tensor, weight: Tensor, base: Tensor, g: Tensor, *factors: Tensor) -> Tensor:
        a, b = factors or (None, None)
        y = adapted_linear(x, weight, a, b, base, nt=True, gate=Gate())
        after, landing = descend(weight, x, g, nt=True, gate=Gate(), landing=None)
        return adapted_linear(
            y.tanh() @ weight.new_ones(3, 4),
            after,
            a,
            b,
            base,
            nt=True,
            gate=Gate(),
            landing=landing,
        )

    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradgradcheck(step, inputs)


@pytest.mark.parametrize("compile", [False, True])
def test_backward_passes_of_any_part(compile: bool) -> None:
    """A pass that asks for some gradients only, or comes twice, leaves nothing behind."""
    patched = fm.patch(oracle.tiny_bert(), fm.Params("*"))
    rate = fm.LearnedRate(per=(), init=0.1)
    learner = fm.MAML(patched, lr=rate, steps=3, memory="unroll", compile=compile)
    out = learner(batch())
    parameters = list(learner.parameters())
    first = torch.autograd.grad(out.loss, parameters, retain_graph=True)
    (rate,) = torch.autograd.grad(out.loss, [learner.rates.values], retain_graph=True)
    again = torch.autograd.grad(out.loss, parameters)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(rate, first[[p is learner.rates.values for p in parameters].index(True)])


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("nt", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_steps_that_inner_passes_take(shared: bool, nt: bool, impl: str) -> None:
    """Two steps on a weight, each taken while the gradient passes its layer; to any order."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    weight = random(1 if shared else 2, *((3, 4) if nt else (4, 3)))
    inputs = (random(2, 2, 4), weight, random(2, 1, 3), random(2, 2, 3))

    def run(by_pass: bool, x: Tensor, weight: Tensor, base: Tensor, goal: Tensor) -> Tensor:
        gate, landing, after = Gate(), None, []
        for _ in range(2):
            here, descent = x.tanh(), Descent(landing)
            y = adapted_linear(
                here, weight, None, None, base, nt=nt, gate=gate, landing=landing,
                descent=descent if by_pass else None,
            )  # fmt: skip
            gate.inner = True
            wanted = [x, base, y]
            g = torch.autograd.grad((y.tanh() * goal).sum(), wanted, create_graph=True)
            gate.inner = False
            if by_pass:
                assert descent.taken is not None
                weight, landing = descent.taken
            else:
                weight, landing = descend(weight, here, g[2], nt=nt, gate=gate, landing=landing)
            x, base = x + g[0], base + g[1]
            after.append(weight.flatten(1).sum(1) ** 2)
        y = adapted_linear(x, weight, None, None, base, nt=nt, gate=gate, landing=landing)
        return torch.cat([y.flatten(), *after])

    with ops.use_impl(impl):
        found, want = (run(by_pass, *inputs) for by_pass in (True, False))
        torch.testing.assert_close(found, want)
        grads = [torch.autograd.grad(y.sin().sum(), inputs) for y in (found, want)]
        torch.testing.assert_close(*grads)
        assert torch.autograd.gradcheck(lambda *args: run(True, *args), inputs)
        assert torch.autograd.gradgradcheck(lambda *args: run(True, *args), inputs)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("backward", [True, False])
def test_nothing_outlives_its_meta_step(backward: bool, compile: bool) -> None:
    """Weights after a step are made in the graph of the step, which must not hold them."""
    patched = fm.patch(oracle.tiny_bert(), fm.Params("*"))
    learner = fm.MAML(patched, lr=0.1, steps=2, memory="unroll", compile=compile)
    out = learner(batch())
    seen = [
        weakref.ref(leaf.weight)
        for leaf in out.params.leaves.values()
        if isinstance(leaf, FastMatrix) and leaf.own is not None
    ]
    if backward:
        out.loss.backward()
    del out
    assert seen and not any(ref() is not None for ref in seen)
    assert not any(type(thing) is Frame for thing in gc.get_objects())


class TableTwice(nn.Module):
    """Looks up all words, and the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(100, 6), nn.Linear(12, 3)

    def forward(self, input_ids: Tensor) -> SequenceClassifierOutput:
        first, every = self.words(input_ids[:, :1]).mean(1), self.words(input_ids).mean(1)
        return SequenceClassifierOutput(logits=self.head(torch.cat([every, first], -1).tanh()))


class LayerTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mid, self.head = nn.Embedding(20, 32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, input_ids: Tensor) -> SequenceClassifierOutput:
        x = self.mid(self.mid(self.words(input_ids)).tanh())
        return SequenceClassifierOutput(logits=self.head(x.mean(1)))


@pytest.mark.parametrize("kind", [TableTwice, LayerTwice])
def test_what_runs_twice(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    learner = fm.MAML(fm.patch(kind().double(), fm.Params("*")), lr=0.3, steps=2, memory="unroll")
    tasks = [
        (*({k: v for k, v in rows.items() if k != "attention_mask"} for rows in task[:2]), None)
        for task in oracle.make_tasks()
    ]
    expected = oracle.loop(learner, tasks)
    oracle.assert_same(learner, learner(oracle.as_batch(tasks)), expected, tasks)


def test_a_backward_pass_within_another() -> None:
    """Each gathers gradients of its own, as those of several threads do."""
    model, seen, inner = oracle.tiny_bert(layers=2), [], []
    model.bert.encoder.layer[1].output.register_forward_hook(lambda *call: seen.append(call[2]))
    learner = fm.MAML(fm.patch(model, fm.Params("*")), lr=0.1, steps=2, memory="unroll")
    out, weights = learner(batch()), list(learner.parameters())

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
        return nn.utils.parameters_to_vector(found)

    def meanwhile(_: Tensor) -> None:
        if not inner:
            inner.append(None)
            inner[0] = gradient(first)

    first = out.task_losses[0]
    expected = [gradient(loss) for loss in (out.loss, first)]
    seen[-1].register_hook(meanwhile)
    found = gradient(out.loss)
    torch.testing.assert_close(found, expected[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(inner[0], expected[1], rtol=1e-9, atol=1e-12)
