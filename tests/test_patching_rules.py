"""Each leaf rule computes what vmap over per-task copies of the module computes, twice over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import episode_oracle as oracle
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

import fastmeta as fm
from fastmeta.patching.context import Call, running
from fastmeta.patching.rules import Adapted, rule_for
from fastmeta.testing.float64 import keep_float64

TASKS, ROWS = 3, 2


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(TASKS * ROWS, *shape, dtype=torch.float64)


def ids() -> Tensor:
    return torch.randint(0, 7, (TASKS * ROWS, 5))


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    adapt: tuple[str, ...]


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}

    def add(name: str, make, inputs, *subsets: str) -> None:
        for subset in subsets:
            found[f"{name}-{subset.replace(' ', '+')}"] = Case(make, inputs, tuple(subset.split()))

    both = ("weight", "bias", "weight bias")
    add("linear", lambda: nn.Linear(4, 6), floats(5, 4), *both)
    add("linear-flat", lambda: nn.Linear(4, 6), lambda: floats(5, 4)().flatten(0, 1), *both)
    add("linear-rank2", lambda: nn.Linear(4, 6), floats(4), *both)
    add("linear-rank4", lambda: nn.Linear(4, 6), floats(2, 3, 4), "weight bias")
    add("linear-no-bias", lambda: nn.Linear(4, 6, bias=False), floats(5, 4), "weight")
    add("conv1d-gpt2", lambda: Conv1D(6, 4), floats(5, 4), *both)
    add("conv1d-gpt2-square", lambda: Conv1D(4, 4), floats(5, 4), "weight bias")
    add("embedding", lambda: nn.Embedding(7, 4), ids, "weight")
    add("embedding-padded", lambda: nn.Embedding(7, 4, padding_idx=2), ids, "weight")
    add("layer-norm", lambda: nn.LayerNorm(4), floats(5, 4), *both)
    add("layer-norm-two-axes", lambda: nn.LayerNorm((5, 4)), floats(2, 5, 4), "weight bias")
    add("layer-norm-no-bias", lambda: nn.LayerNorm(4, bias=False), floats(5, 4), "weight")
    for kind in (LlamaRMSNorm, Gemma2RMSNorm, Olmo2RMSNorm, T5LayerNorm):
        add(kind.__name__, lambda kind=kind: kind(4), floats(5, 4), "weight")
    add("rms-norm", lambda: nn.RMSNorm(4), floats(5, 4), "weight")
    add("group-norm", lambda: nn.GroupNorm(2, 4), floats(4, 3, 3), *both)
    add("batch-norm-1d", lambda: nn.BatchNorm1d(4), floats(4), *both)
    add("batch-norm-2d", lambda: nn.BatchNorm2d(4), floats(4, 3, 3), "weight bias")
    add("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), floats(4, 5), *both)
    add("conv1d-grouped", lambda: nn.Conv1d(4, 6, 3, groups=2), floats(4, 5), "weight bias")
    add("conv2d", lambda: nn.Conv2d(4, 6, 2, stride=2), floats(4, 4, 4), *both)
    add("conv2d-no-bias", lambda: nn.Conv2d(4, 6, 3, bias=False), floats(4, 4, 4), "weight")
    return found


CASES = cases()


def perturbed(module: nn.Module) -> nn.Module:
    module = module.double()
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return module


def derivatives(run: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Value, gradient, and gradient of a function of the gradient."""
    y = run(*tensors)
    moving = [t for t in tensors if t.requires_grad]
    first = torch.autograd.grad(y.sin().sum(), moving, create_graph=True)
    second = torch.autograd.grad(
        sum(g.sin().sum() for g in first), moving, allow_unused=True, materialize_grads=True
    )
    return [y, *first, *second]


def check(module: nn.Module, adapted: dict[str, Tensor], x: Tensor, vmap: Callable) -> None:
    slots = Adapted("m", {name: i for i, name in enumerate(adapted)}, lora_scale=1.5)
    rule = rule_for(module, slots)
    assert rule is not None

    def by_rule(x: Tensor, *views: Tensor) -> Tensor:
        call = Call(list(views), TASKS, ROWS)
        with running(call):
            return rule(module, slots, call, x)

    tensors = [x.requires_grad_(x.is_floating_point()), *adapted.values()]
    with keep_float64():
        got, want = derivatives(by_rule, tensors), derivatives(vmap, tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_rule_is_vmap(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    module, x = perturbed(case.make()).eval(), case.inputs()
    adapted = {
        n: torch.randn(TASKS, *module.get_parameter(n).shape, dtype=torch.float64).requires_grad_()
        for n in case.adapt
    }

    def by_vmap(x: Tensor, *views: Tensor) -> Tensor:
        def one(x: Tensor, *mine: Tensor) -> Tensor:
            bound = dict(zip(case.adapt, mine, strict=True))
            return torch.func.functional_call(module, bound, (x,))

        stacked = x.unflatten(0, (TASKS, -1))
        if isinstance(module, nn.Embedding):
            # vmap is wrong here: only the first table's padding row is left without gradient.
            return torch.cat([one(x, *(v[t] for v in views)) for t, x in enumerate(stacked)])
        return torch.func.vmap(one)(stacked, *views).flatten(0, 1)

    check(module, adapted, x, by_vmap)


@pytest.mark.parametrize("base", ["", "weight", "bias"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Linear(4, 6), (6, 4)), (lambda: Conv1D(4, 4), (4, 4))],
    ids=["linear", "conv1d-gpt2-square"],
)
def test_lora_is_a_low_rank_weight(make: Callable, shape: tuple[int, int], base: str) -> None:
    torch.manual_seed(0)
    module, x = perturbed(make()), floats(5, 4)()
    transposed = isinstance(module, Conv1D)
    adapted = {
        "lora_A": torch.randn(TASKS, 2, 4, dtype=torch.float64).requires_grad_(),
        "lora_B": torch.randn(TASKS, shape[0], 2, dtype=torch.float64).requires_grad_(),
    }
    if base:
        own = module.get_parameter(base)
        adapted[base] = torch.randn(TASKS, *own.shape, dtype=torch.float64).requires_grad_()

    def by_vmap(x: Tensor, *views: Tensor) -> Tensor:
        def one(x: Tensor, a: Tensor, b: Tensor, *own: Tensor) -> Tensor:
            bound = {"weight": module.weight, **dict(zip([base] if base else [], own, strict=True))}
            delta = 1.5 * (b @ a)
            bound["weight"] = bound["weight"] + (delta.t() if transposed else delta)
            return torch.func.functional_call(module, bound, (x,))

        return torch.func.vmap(one)(x.unflatten(0, (TASKS, -1)), *views).flatten(0, 1)

    check(module, adapted, x, by_vmap)


def test_batch_norm_in_training_keeps_tasks_apart_and_statistics_unchanged() -> None:
    module = perturbed(nn.BatchNorm1d(4)).train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x = floats(4)()
    y = rule_for(module, Adapted("m"))(module, Adapted("m"), Call([], TASKS, ROWS), x)
    for t in range(TASKS):
        rows = slice(t * ROWS, (t + 1) * ROWS)
        want = nn.functional.batch_norm(
            x[rows], None, None, module.weight, module.bias, True, 0.0, module.eps
        )
        torch.testing.assert_close(y[rows], want)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_subclass_with_its_own_forward_has_no_rule() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert rule_for(Doubled(2, 2), Adapted("m", {"weight": 0})) is None
    assert rule_for(nn.Embedding(3, 2, max_norm=1.0), Adapted("m", {"weight": 0})) is None
    circular = nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")
    assert rule_for(circular, Adapted("m", {"weight": 0})) is None


def test_lora_around_a_linear_layer_with_its_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    module, x = perturbed(Doubled(4, 6)), floats(5, 4)()
    adapted = {
        "lora_A": torch.randn(TASKS, 2, 4, dtype=torch.float64).requires_grad_(),
        "lora_B": torch.randn(TASKS, 6, 2, dtype=torch.float64).requires_grad_(),
    }

    def by_vmap(x: Tensor, *views: Tensor) -> Tensor:
        def one(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return 2 * nn.functional.linear(x, module.weight, module.bias) + 1.5 * x @ a.t() @ b.t()

        return torch.func.vmap(one)(x.unflatten(0, (TASKS, -1)), *views).flatten(0, 1)

    check(module, adapted, x, by_vmap)


class Normed(nn.Module):
    """A mean of normalised words, with a head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(20, 6), norm, nn.Linear(6, 3)

    def forward(self, input_ids: Tensor) -> SequenceClassifierOutput:
        states = self.norm(self.words(input_ids))
        return SequenceClassifierOutput(logits=self.head(states.tanh().mean(1)))


def test_a_norm_of_two_axes_that_does_not_adapt() -> None:
    torch.manual_seed(0)
    model = Normed(nn.LayerNorm((5, 6))).double()
    nn.init.normal_(model.norm.weight)
    learner = fm.MAML(fm.patch(model, fm.Params("head")), lr=0.3, steps=2)
    tasks = [
        (*({k: v for k, v in rows.items() if k != "attention_mask"} for rows in task[:2]), None)
        for task in oracle.make_tasks()
    ]
    oracle.assert_same(learner, learner(oracle.as_batch(tasks)), oracle.loop(learner, tasks), tasks)


def test_words_under_autocast_are_not_rounded() -> None:
    """Few of them, which adapt: a product with one-hot rows would round what it copies."""
    torch.manual_seed(0)
    model = Normed(nn.Identity())
    patched = fm.patch(model, fm.Params("words"))
    ids, seen = torch.arange(8).view(1, 2, 4), []
    norm = patched.plan({"input_ids": ids}).structure.norm
    norm.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        patched(patched.init(1), input_ids=ids)
    assert torch.equal(seen[0].flatten(0, 1), model.words.weight[:8])


@pytest.mark.parametrize(
    ("given", "hint"),
    [("rank", " (did you mean 'r'?)"), ("lora_alpha", "'alpha'"), ("target_modules", "'targets'")],
)
def test_lora_by_the_names_of_others(given: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"LoRA has no setting '{given}'") as caught:
        fm.LoRA(**{given: 8})
    assert hint in str(caught.value)
