"""Models that no rule fits: generic rungs, warned loops, and errors that name the module."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import families
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.patching import PatchError, PerformanceWarning
from fastmeta.testing.float64 import keep_float64


class WithPositions(nn.Module):
    """Looks positions up without a batch axis: ``[L]``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(8, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.positions(torch.arange(ids.shape[1]))
        return self.out(self.tokens(ids) + places).sin().mean(1)


class WithOwnParameters(nn.Module):
    """Reads parameters of its own: a vector and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.token = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x * self.gain], 1).tanh()


class WithRow(nn.Module):
    """A row of its own, as if it were one of the batch, that is used otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.rand(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.cat([self.row, torch.ones(4, 4, dtype=x.dtype)])


class WithToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.rand(1, 1, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), self.inner(x)], 1).tanh()


class ReadsChild(nn.Module):
    """Reads the weight of a child that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.other(x) @ self.child.weight).sin()


class ReadsParameters(nn.Module):
    """Reads values and the dtype of its children through `parameters()`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        size = sum(p.square().sum() for p in self.parameters())
        return (self.inner(x) / size).to(next(self.parameters()).dtype).sin()


class DataDependent(nn.Module):
    """Chooses rows by value, which vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        chosen = (x[..., 0] > 0).nonzero(as_tuple=True)
        out[chosen] = x[chosen] @ self.weight
        return out.sin() + x


class TwiceDifferently(nn.Module):
    """Calls one child with and without the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.table = nn.Linear(4, 4), nn.Parameter(torch.rand(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.child(x) @ self.child(self.table).t()).sin()


class Torch(nn.Module):
    """torch's own transformer layer, fused attention and all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)).mean(1)


class CallsFusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x).unsqueeze(1), self.k(x).unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(q, k, k).sin().mean((1, 2))


class CallsFusedAttentionAsItCan(CallsFusedAttention):
    """With a boolean mask, keys that heads share, another size of values, and three axes."""

    def forward(self, x: Tensor) -> Tensor:
        attention = nn.functional.scaled_dot_product_attention
        q, k = self.q(x).unflatten(-1, (2, 2)).transpose(1, 2), self.k(x)[..., None, :2]
        k, mask = k.transpose(1, 2), torch.ones(5, 5).tril().bool()
        out = attention(q, k, k, attn_mask=mask)
        out = out + attention(q, q, q.repeat(1, 1, 1, 2), is_causal=True)[..., 1:3]
        out = out + attention(q[:, :, :1], q, q, is_causal=True)
        return (out + attention(q[:, 0], q[:, 0], q[:, 1], mask).unsqueeze(1)).sin().mean((1, 2))


def floats() -> Tensor:
    return torch.randn(2, 3, 5, 4, dtype=torch.float64)


def ids() -> Tensor:
    return torch.randint(0, 9, (2, 3, 5))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(5, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )


# name -> model, input, expected modes other than "rule"
PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, str]]] = {
    "mlp": (mlp, floats, {}),
    "convolutional": (convolutional, floats, {}),
    "positions-without-batch": (WithPositions, ids, {"positions": "lift"}),
    "own-parameters": (WithOwnParameters, floats, {"": "loop"}),
    "own-row": (WithRow, floats, {"": "loop"}),
    "own-parameters-inside": (lambda: nn.Sequential(WithOwnParameters()), floats, {"0": "vmap"}),
    "class-token": (WithToken, floats, {"": "expand"}),
    "reads-child": (lambda: nn.Sequential(ReadsChild(), nn.Linear(4, 2)), floats, {"0": "vmap"}),
    "reads-parameters": (lambda: nn.Sequential(ReadsParameters()), floats, {"0": "vmap"}),
    "data-dependent": (lambda: nn.Sequential(DataDependent()), floats, {"0": "loop"}),
    "called-twice": (lambda: nn.Sequential(TwiceDifferently()), floats, {"0": "vmap"}),
    "fused-attention": (CallsFusedAttention, floats, {}),
    "fused-attention-as-it-can": (CallsFusedAttentionAsItCan, floats, {}),
    "torch-layer": (Torch, floats, {"layer.self_attn": "vmap"}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_any_module(name: str) -> None:
    """Positional tensors are passed by name; values and both gradients match each task alone."""
    torch.manual_seed(0)
    make, inputs, modes = PLAIN[name]
    model, x = make().double().eval(), inputs()
    key = "ids" if x.dtype == torch.int64 else "input" if isinstance(model, nn.Sequential) else "x"
    patched = fm.patch(model, fm.Params("*"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerformanceWarning)
        plan = patched.plan({key: x})
    assert {n: m for n, m in plan.modes.items() if m not in ("rule", "skip")} == modes
    packed = patched.init(2).packed.detach()
    packed = (packed + 0.1 * torch.randn_like(packed)).requires_grad_()
    params = fm.TaskParams(patched.layout, packed)
    together = patched(params, **{key: x})
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        alone = torch.stack(
            [torch.func.functional_call(model, params.task(t), (x[t],)) for t in range(2)]
        )
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    found = []
    for y in (together, alone):
        (first,) = torch.autograd.grad(y.sin().sum(), packed, create_graph=True)
        found.append((first, torch.autograd.grad(first.sin().sum(), packed)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_loop_is_warned_of() -> None:
    model = nn.Sequential(DataDependent(), nn.Linear(4, 2)).double()
    patched = fm.patch(model, fm.Params("*"))
    with pytest.warns(PerformanceWarning, match=r"module '0' \(DataDependent\) runs one task"):
        patched(patched.init(2), input=floats())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_routed_experts_loop_inside_the_experts_only(family: str) -> None:
    patched = fm.patch(families.build(family), fm.Params("*"))
    inputs = families.inputs(family, 2, 2)
    with keep_float64(), pytest.warns(PerformanceWarning, match=r"mlp.experts' \(.*Experts\)"):
        plan = patched.plan(inputs)
    loops = [n for n, mode in plan.modes.items() if mode == "loop"]
    assert loops == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def test_lora_leaves_routed_experts_shared_and_does_not_loop() -> None:
    patched = fm.patch(families.build("mixtral"), fm.LoRA(r=2, targets=("q_proj", "v_proj")))
    with keep_float64():
        plan = patched.plan(families.inputs("mixtral", 2, 2))
    assert set(plan.modes.values()) == {"rule"}


class Ragged(nn.Module):
    """Returns as many rows as pass a test: no two tasks alike."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y[y[..., 0] > 0.1]


def test_what_cannot_work_names_module_and_remedy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Ragged()).double()
    patched = fm.patch(model, fm.Params("*"))
    with pytest.raises(PatchError) as caught:
        patched(patched.init(2), input=floats())
    message = str(caught.value)
    assert "module '1' of Sequential (Ragged) cannot run with per-task parameters" in message
    assert "adapt parameters outside of it" in message
    # The remedy works.
    outside = fm.patch(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double(), fm.Params("0"))
    assert outside(outside.init(2), input=floats()).shape == (2, 3, 5, 4)


class Masking(nn.Module):
    """Reads half of its input, another half every time."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * (torch.rand_like(x) < 0.5))


def test_a_model_that_is_random_when_it_is_evaluated() -> None:
    patched = fm.patch(Masking().double().eval(), fm.Params("*"))
    with pytest.raises(fm.PatchError, match="Masking draws random numbers in evaluation mode"):
        patched(patched.init(2), x=floats())


def test_unit_arguments_are_told_apart_by_the_probe_not_by_their_size() -> None:
    """A shared table whose length happens to divide by T * N stays shared."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return (x * self.scale) @ table.t()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.table = Inner(), nn.Buffer(torch.rand(12, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, self.table)

    model = Outer().double()
    patched = fm.patch(model, fm.Params("*"))
    for tasks, rows in ((2, 3), (2, 2), (3, 4)):
        x = torch.randn(tasks, rows, 4, dtype=torch.float64)
        torch.testing.assert_close(patched(patched.init(tasks), x=x), model(x))


def different(patched: fm.Patched) -> fm.TaskParams:
    packed = patched.init(2).packed.detach()
    return fm.TaskParams(patched.layout, packed + 0.1 * torch.randn_like(packed))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("case", ["lora", "dora", "named-twice"])
def test_peft_model(case: str) -> None:
    """DoRA's own code fits no rule, and has modules inside; prefix tuning names the embeddings
    of words twice, of which one name never runs."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    if case == "named-twice":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        base = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=61, **sizes, **heads))
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        spec = fm.Params("*")
    else:
        base = families.build("bert")
        targets = {"target_modules": ["query", "value"], "lora_dropout": 0.0}
        config = peft.LoraConfig(r=2, use_dora=case == "dora", **targets)
        spec = fm.Bias() if case == "dora" else fm.Params("*lora_*") + fm.Params("*classifier*")
    model = peft.get_peft_model(base, config).double().eval()
    with torch.no_grad():
        for p in model.parameters():  # of which PEFT's are 0 or 1 at first
            p += 0.1 * torch.randn_like(p)
    patched = fm.patch(model, spec)
    expected = {"lora": "lora_A", "dora": "query.base_layer.bias", "named-twice": "embed_tokens"}
    assert any(expected[case] in n for n in patched.layout.names)
    inputs = families.inputs("bert", 2, 2, padding="right")
    params = different(patched)
    with keep_float64(), warnings.catch_warnings():
        if case == "dora":
            warnings.simplefilter("ignore", PerformanceWarning)
        got = patched(params, **inputs).logits
        for t in range(2):
            mine = {k: v[t] for k, v in inputs.items()}
            want = torch.func.functional_call(model, params.task(t), (), mine).logits
            rows = mine["attention_mask"].bool() if case == "named-twice" else slice(None)
            torch.testing.assert_close(got[t][rows], want[rows], rtol=1e-10, atol=1e-12)


class Doubles(torch.autograd.Function):
    """Of the kind that vmap refuses."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 2


class OtherInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.dropout(x * self.gain, 0.5, self.training)
        return Doubles.apply(y) if self.training else y * 2


class OtherForSome(OtherInTraining):
    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gain
        return y.index_fill(0, (x[:, 0] > 5).nonzero().flatten(), 0) if len(x) > 2 else y


@pytest.mark.parametrize("settings", [{}, {"memory": "recompute"}, {"compile": True}])
def test_what_vmap_refuses_in_training_alone_loops(settings: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OtherInTraining(), nn.Linear(4, 3)).double()
    patched = fm.patch(model, fm.Params("0.*"))
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    labels = torch.zeros(3, 2, dtype=torch.int64)
    learner = fm.MAML(patched, lr=0.1, steps=2, order=2, **settings).eval()
    batch = fm.TaskBatch({"input": x, "labels": labels}, {"input": x, "labels": labels})
    learner(batch)
    learner.train()
    torch.manual_seed(1)
    with pytest.warns(PerformanceWarning, match=r"'0'.*vmap, under which it ran before, raised"):
        first = learner(batch).loss  # its draws are those of a pass that loops at once
    first.backward()
    grads = [p.grad.clone() for p in learner.parameters() if p.grad is not None]
    learner.zero_grad()
    torch.manual_seed(1)
    again = learner(batch).loss  # and warns no more
    again.backward()
    assert first.item() == pytest.approx(again.item(), abs=1e-12)
    found = [p.grad for p in learner.parameters() if p.grad is not None]
    torch.testing.assert_close(grads, found, rtol=1e-9, atol=1e-9)


def test_what_vmap_refuses_for_later_inputs_loops() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OtherForSome(), nn.Linear(4, 3)).double()
    patched = fm.patch(model, fm.Params("0.*"))
    params = different(patched)
    patched(params, input=torch.randn(2, 2, 4, dtype=torch.float64))
    (plan,) = patched._plans.values()
    wrong = torch.randn(2, 3, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"size of tensor a \(5\) must match .* b \(4\)"):
        patched(params, input=wrong)
    assert not any(unit.loops for unit in plan.units)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    with pytest.warns(PerformanceWarning, match=r"'0' \(OtherForSome\) runs one task after"):
        got = patched(params, input=x)
    assert patched(params, input=x).equal(got)  # without another warning
    for t in range(2):
        want = torch.func.functional_call(model, dict(params.task(t)), x[t])
        torch.testing.assert_close(got[t], want, rtol=1e-9, atol=1e-9)
