"""Captured steps for other numbers of tokens: what some tell and another one confirms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction

import episode_oracle as oracle
import pytest
import torch
from torch import Tensor
from unpadded_texts import texts

import fastmeta as fm
from fastmeta._library import has_extension
from fastmeta.engine import capture, graphs
from fastmeta.engine.capture import Capture
from fastmeta.engine.graph_function import GraphFunction
from fastmeta.engine.tape import Tape
from fastmeta.engine.tape_family import Family, Step, weights_of

pytestmark = pytest.mark.skipif(not has_extension("cpu"), reason="needs the C++ extension")

SPECS = {
    "everything": fm.Params("*"),
    "LoRA and head": fm.LoRA(r=2) + fm.Head(),
    "LoRA": fm.LoRA(r=2),
    "last layer": fm.Params("bert.encoder.layer.1", "classifier"),
}


def batch_of(tokens: int, seed: int) -> fm.TaskBatch:
    """Two tasks of three texts with so many tokens in each set's fullest task, of 24 positions."""
    longest = min(8, tokens - 2)
    lengths = torch.tensor([[longest, min(8, tokens - 1 - longest), 1], [1, 2, 3]])
    lengths[0, 2] = tokens - int(lengths[0, :2].sum())
    labels = {"labels": torch.tensor([[0, 1, 2]] * 2)}
    sets = [texts(lengths, "holes", seed=seed + s) | labels for s in (0, 1)]
    return fm.TaskBatch(*sets)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("spec", SPECS)
def test_other_numbers_of_tokens(
    spec: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three all are told, the gradient is that of eager code, and tapes are those that would
    have been captured."""
    monkeypatch.setattr(Capture, "widths", 24)  # of so many positions: none is rounded
    captured, original = [], graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *args: captured.append(1) or original(*args))
    model = oracle.tiny_bert(layers=2)
    settings = {"lr": 0.1, "steps": 2, "memory": "unroll", "optimizer": optimizer}
    learner, again = (
        fm.MAML(fm.patch(model, SPECS[spec]), compile=True, **settings) for _ in range(2)
    )
    eager = fm.MAML(fm.patch(model, SPECS[spec]), **settings)
    for i, tokens in enumerate((10, 14, 12, 7, 18, 9, 20)):
        count, batch = len(captured), batch_of(tokens, seed=2 * i)
        found = oracle.gradients(learner, learner(batch).loss)
        assert (len(captured) == count) == (i > 2)
        oracle.assert_close(found, oracle.gradients(eager, eager(batch).loss))
    again(batch)
    told = {programs(step) for family in families(learner) for step in family.told.values()}
    traced = {programs(step) for step in again.capture.steps.values()}
    assert traced and traced <= told


def families(learner: fm.MAML) -> Iterable[Family]:
    return learner.capture.families.values()


def programs(step: Step) -> tuple[str, ...]:
    pair = step.function.pair
    return pair.forward.program, pair.backward.program


def test_two_numbers_of_tokens() -> None:
    """Where rows of the support set are kept, the query losses depend on them too."""
    model = oracle.tiny_bert(layers=2)
    learner, eager = (
        fm.MAML(fm.patch(model, fm.Params("*query*")), lr=0.1, steps=1, memory="unroll", compile=c)
        for c in (True, False)
    )
    pairs = [(10, 8), (14, 8), (10, 16), (12, 12), (18, 10), (8, 20)]
    for i, (support, query) in enumerate(pairs):
        found = batch_of(support, seed=i).support, batch_of(query, seed=i).query
        batch = fm.TaskBatch(*found)
        found = oracle.gradients(learner, learner(batch).loss)
        oracle.assert_close(found, oracle.gradients(eager, eager(batch).loss))
    assert sum(len(family.told) for family in families(learner)) >= 4


def test_shapes_that_seldom_repeat_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_FREE", 3)
    monkeypatch.setattr(capture, "_USES", 4)
    learner = fm.MAML(fm.patch(oracle.tiny_bert(), SPECS["LoRA"]), steps=1, compile=True)

    def rows(n: int) -> fm.TaskBatch:
        sets = batch_of(12, seed=0)
        return fm.TaskBatch(
            *({k: v[:, :n] for k, v in s.items()} for s in (sets.support, sets.query))
        )

    learner(rows(1))
    with pytest.warns(RuntimeWarning, match="shapes of batches seldom repeat; pad texts and sets"):
        learner(rows(2))
    count = len(learner.capture.steps)
    learner(rows(3))
    assert len(learner.capture.steps) == count == 3
    for _ in range(5):
        learner(rows(1))
    learner(rows(3))
    assert len(learner.capture.steps) > count


def test_weights() -> None:
    line = [(3, 6, 5), (5, 10, 5)]
    assert weights_of(line, (4, 8, 5)) == {0: Fraction(1, 2), 1: Fraction(1, 2)}
    assert weights_of(line, (9, 18, 5)) == {0: -2, 1: 3}
    assert weights_of(line, (5, 10, 5)) == {1: 1}
    assert weights_of(line, (4, 9, 5)) is None and weights_of(line, (4, 8, 6)) is None
    plane = [*line, (3, 6, 9)]
    assert weights_of(plane, (5, 10, 9)) == {0: -1, 1: 1, 2: 1}
    assert weights_of(plane, (3, 7, 5)) is None
    assert weights_of(line[:1], (3, 6, 5)) == {0: 1} and weights_of([], (3,)) is None


# -- what is not told --------------------------------------------------------------------------


class Captured:
    """A function of one vector, as a step."""

    outline = None

    def __init__(self, function: GraphFunction) -> None:
        self.function = function

    @classmethod
    def of(cls, compute: Callable[[Tensor], Tensor], size: int) -> Captured:
        pair = graphs.capture(lambda x: [compute(x)], [torch.rand(size)], [], 1, None)
        return cls(GraphFunction(pair, 1, [], [], 1, []))

    def with_pair(self, pair: graphs.Pair) -> Captured:
        return Captured(self.function.with_pair(pair))

    def __call__(self, x: Tensor) -> Tensor:
        return self.function([x], {}, {})[0]


def family_of(compute: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> Family:
    family = Family()
    for size in sizes:
        family.add((size, 1), Captured.of(compute, size))
    return family


def rounded_up(x: Tensor) -> Tensor:
    padded = x.new_zeros(-(-len(x) // 4) * 4)
    padded[: len(x)] = x
    return padded.sum()


TOLD = {
    "views": lambda x: x.view(1, -1).t()[1:].sum() + torch.cat([x, x])[len(x) - 1 :].sum(),
    "ones": lambda x: x @ torch.ones(1).expand(len(x)),
}
NOT_TOLD = {
    "not linear": rounded_up,
    "a number": lambda x: x * (1 / len(x)),
    "values of constants": lambda x: x + torch.arange(len(x)),
    "other operators": lambda x: x.sin() if len(x) > 4 else x.cos(),
    "Python": lambda x: torch.linalg.vector_norm(x, len(x)),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_is_told(name: str) -> None:
    found = family_of(TOLD[name], (3, 5, 7)).find((6, 1))
    x = torch.rand(6)
    torch.testing.assert_close(found(x), TOLD[name](x))


@pytest.mark.parametrize("name", NOT_TOLD)
def test_what_is_not_told(name: str) -> None:
    assert family_of(NOT_TOLD[name], (3, 5, 7)).find((6, 1)) is None


def test_two_alone_tell_nothing() -> None:
    assert family_of(TOLD["views"], (3, 5)).find((4, 1)) is None


def test_no_view_looks_beyond_its_memory() -> None:
    tape = Tape("slots 2\ninputs 1 0\nview 1 0 1 1 1 4 1 1 0\noutputs 1 1", [], [0])
    assert tape.run([torch.arange(6.0)[1:]])[0][0].tolist() == [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="a tape looks at element 4 of memory that holds 4"):
        tape.run([torch.arange(4.0)[1:]])


def test_masks_have_as_many_tokens() -> None:
    for tokens in (7, 10, 20):
        batch = batch_of(tokens, seed=0)
        assert int(batch.support["attention_mask"].flatten(1).sum(1).max()) == tokens
