"""Captured steps for other numbers of tokens: what two tell and a third confirms."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import episode_oracle as oracle
import pytest
import torch
from torch import Tensor
from unpadded_texts import masks, texts

import fastmeta as fm
from fastmeta._library import has_extension
from fastmeta.engine import graphs
from fastmeta.engine.graph_function import GraphFunction
from fastmeta.engine.tape import Tape
from fastmeta.engine.tape_family import Family, place_on_line

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
    again.capture.families.clear()
    again(batch)
    (told, *_), (traced, *_) = (programs(m) for m in (learner, again))
    assert told == traced


def programs(learner: fm.MAML) -> list[list[str]]:
    """Of the tapes made last for every kind of pass, the last ones first."""
    steps = {own: step.function.pair for own, step in learner.capture.steps.items()}
    last = {own.fixed: pair for own, pair in steps.items()}
    return [[p.forward.program, p.backward.program] for p in last.values()]


def test_places_on_a_line() -> None:
    assert place_on_line((3, 6, 5), (5, 10, 5), (4, 8, 5)) == Fraction(1, 2)
    assert place_on_line((3, 6, 5), (5, 10, 5), (9, 18, 5)) == 3
    assert place_on_line((3, 6, 5), (5, 10, 5), (4, 9, 5)) is None
    assert place_on_line((3, 6, 5), (5, 10, 5), (4, 8, 6)) is None


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
    family = family_of(NOT_TOLD[name], (3, 5, 7))
    assert not family.confirmed and family.find((6, 1)) is None


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
    assert masks(torch.tensor([[3]])).sum() == 3
