"""Fast weights as a service keeps them: tasks put together, picked, moved."""

from __future__ import annotations

import episode_oracle as oracle
import families
import pytest
import torch

import fastmeta as fm
from fastmeta.patching.narrow_params import NarrowParams

WORDS = 100  # so many that fast weights hold what is added to a table's rows
SPECS = [fm.LoRA(r=2) + fm.Head(), fm.Params("*")]


def patched(spec: fm.Spec) -> fm.Patched:
    return fm.patch(oracle.tiny_bert(words=WORDS, classes=4), spec)


def adapted(model: fm.Patched, tasks: int = 1, length: int = 5, seed: int = 0) -> fm.TaskParams:
    """Fast weights of customers who come together, after two steps."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (tasks, 4, length), generator=g)
    support = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    support["labels"] = torch.arange(4).expand(tasks, 4)
    return fm.adapt(model, support, steps=2, lr=0.1).params


def logits(model: fm.Patched, params: fm.TaskParams, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(params, input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 7, 4)])
def test_a_mixed_batch_answers_as_each_customer_alone(spec: fm.Spec, lengths: tuple) -> None:
    model = patched(spec)
    customers = [adapted(model, 2, length, seed=i) for i, length in enumerate(lengths)]
    everyone = fm.TaskParams.joined(customers)
    same_places = len(set(lengths)) == 1
    assert everyone.num_tasks == 6
    narrow = isinstance(spec, fm.Params) and same_places
    assert isinstance(everyone, NarrowParams) == narrow
    wanted = [5, 0, 3, 3, 2]
    requests = torch.randint(3, WORDS, (len(wanted), 1, 6))
    mixed = everyone.select(wanted)
    assert isinstance(mixed, NarrowParams) == narrow
    found = logits(model, mixed, requests)
    for i, customer in enumerate(wanted):
        own = customers[customer // 2].select(customer % 2)
        torch.testing.assert_close(found[i : i + 1], logits(model, own, requests[i : i + 1]))


def test_parts_that_started_from_other_weights_keep_them() -> None:
    models = [patched(fm.Params("*")) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].model.parameters():
            parameter.add_(1)
    parts = [adapted(model) for model in models]
    assert all(isinstance(part, NarrowParams) for part in parts)
    found = fm.TaskParams.joined(parts)
    assert torch.equal(found.packed, torch.cat([part.packed for part in parts]))


def test_initial_and_adapted_weights_join() -> None:
    model = patched(SPECS[0])
    part = adapted(model)
    found = fm.TaskParams.joined([model.initial(2), part])
    assert torch.equal(found.packed, torch.cat([model.init(2).packed, part.packed]))
    assert fm.TaskParams.joined([part]) is part


@pytest.mark.parametrize("spec", SPECS)
def test_tasks_are_picked_by_any_index(spec: fm.Spec) -> None:
    params = adapted(patched(spec), 3)
    for index, rows in (
        ([2, 0, 2], [2, 0, 2]),
        (torch.tensor([1, 1]), [1, 1]),
        (torch.tensor([True, False, True]), [0, 2]),
        (slice(1, None), [1, 2]),
        (1, [1]),
        (-1, [2]),
        ((1, 0), [1, 0]),
        (torch.tensor(1), [1]),
        (range(2), [0, 1]),
    ):
        found = params.select(index)
        assert found.num_tasks == len(rows) and type(found) is type(params)
        assert torch.equal(found.packed, params.packed[rows])
    with pytest.raises(IndexError, match="out of bounds"):
        params.select([3])
    assert all(torch.equal(t, params[n][2]) for n, t in params.task(2).items())
    with pytest.raises(IndexError, match="expected the number of one of 3 tasks, got 3"):
        params.task(3)


@pytest.mark.parametrize("spec", SPECS)
def test_they_move_to_a_device(spec: fm.Spec) -> None:
    params = adapted(patched(spec), 2)
    assert params.to("cpu") is params
    moved = params.to("meta")
    assert moved.device == torch.device("meta") and moved.packed.shape == params.packed.shape


def test_what_does_not_join() -> None:
    model = patched(SPECS[0])
    params = adapted(model)
    joined = fm.TaskParams.joined
    with pytest.raises(ValueError, match="at least one task, got none"):
        joined([])
    with pytest.raises(TypeError, match=r"expected fast weights .* got Tensor"):
        joined([params, params.packed])
    with pytest.raises(ValueError, match=r"part 1 is of another .* expected .*lora_A, .* got none"):
        joined([params, adapted(patched(fm.Head()))])
    with pytest.raises(ValueError, match=r"part 2 is of .* of shape \[2, 16\], got \[3, 16\]"):
        joined([params, params, adapted(patched(fm.LoRA(r=3) + fm.Head()))])
    backwards = fm.ParamLayout(model.layout.names[::-1], model.layout.shapes[::-1])
    with pytest.raises(ValueError, match="expected parameters in the order of"):
        joined([params, fm.TaskParams(backwards, params.packed)])
    with pytest.raises(ValueError, match="all parts of one device, got cpu, meta"):
        joined([params, params.to("meta")])
    low = fm.TaskParams(params.layout, params.packed.float())
    with pytest.raises(ValueError, match=r"one dtype, got torch\.float32, torch\.float64"):
        joined([params, low])


def test_weights_of_other_modules_are_refused_whatever_their_shapes() -> None:
    model = fm.patch(families.build("bert"), fm.LoRA(r=2, targets="query"))
    other = fm.patch(model.model, fm.LoRA(r=2, targets="value"))
    with pytest.raises(ValueError, match=r"expected .*query\.lora_A, .* got .*value"):
        logits(model, other.init(1), torch.ones(1, 1, 4, dtype=torch.int64))


def test_adaptation_goes_on_only_from_its_own_weights() -> None:
    model = fm.patch(families.build("bert"), fm.Head())
    other = fm.patch(families.build("bert"), fm.LoRA(r=2)).init(1)
    support = families.inputs("bert", 1, 3) | {"labels": torch.arange(3).unsqueeze(0)}
    with pytest.raises(ValueError, match="params are of another model or specification"):
        fm.adapt(model, support, steps=1, lr=0.1, params=other)
    with pytest.raises(TypeError, match=r"expected fast weights .* got Adapted"):
        fm.adapt(model, support, steps=1, lr=0.1, params=fm.adapt(model, support, steps=1, lr=0.1))
