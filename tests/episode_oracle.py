"""The oracle of the engine: one task after another, in plain torch, through the user's own model.

Nothing here uses the engine: update rules, clipping, learned rates and losses are written again,
per tensor and per task. Tasks come unpadded, so ragged batches are compared with what each task
gives alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta as fm

Task = tuple[dict[str, Tensor], dict[str, Tensor], int | None]
"""Support set, query set (both ``[N_t, ...]``), number of classes or None for all."""

Named = dict[str, Tensor]


# -- models and tasks ------------------------------------------------------------------------


def with_varied_rates(learner: fm.MAML) -> fm.MAML:
    """Make the learned rates differ everywhere."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        values = learner.rates.values
        values.mul_(0.5 + torch.rand(values.shape, generator=g, dtype=values.dtype))
    return learner


def tiny_bert(
    seed: int = 0, layers: int = 1, dropout: float = 0.0, classes: int = 3, words: int = 20
) -> nn.Module:
    """A float64 BERT classifier of width 16, every parameter perturbed."""
    torch.manual_seed(seed)
    config = tf.BertConfig(
        vocab_size=words,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=classes,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = tf.BertForSequenceClassification(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train(dropout > 0)


def make_tasks(
    count: int = 3, *, ragged: bool = False, classes: int = 3, seed: int = 0, masked: bool = True
) -> list[Task]:
    """Random tasks; ragged ones differ in N, Q, L and number of classes."""
    g = torch.Generator().manual_seed(seed)
    tasks: list[Task] = []
    for t in range(count):
        ways = 2 + (t % (classes - 1)) if ragged else classes
        sets = []
        for rows in (3 + (t % 3 if ragged else 0), 4 - (t % 2 if ragged else 0)):
            length = 5 + (t % 2 if ragged else 0)
            ids = torch.randint(1, 20, (rows, length), generator=g)
            mask = torch.ones_like(ids)
            if masked:
                mask[0, -2:] = 0
            labels = torch.randint(0, ways, (rows,), generator=g)
            sets.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        tasks.append((sets[0], sets[1], ways if ragged else None))
    return tasks


def as_batch(tasks: Sequence[Task]) -> fm.TaskBatch:
    ways = None if tasks[0][2] is None else [t[2] for t in tasks]
    return fm.TaskBatch.collate([(t[0], t[1]) for t in tasks], ways=ways)


# -- update rules, per tensor: torch.optim's formulas ----------------------------------------


def _root(v: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0, as the library documents."""
    return torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)


def sgd(p, g, state, lr, k, weight_decay=0.0):
    return p - lr * (g + weight_decay * p), state


def momentum(p, g, state, lr, k, mu=0.9, dampening=0.0, nesterov=False, weight_decay=0.0):
    g = g + weight_decay * p
    buf = g if not state else mu * state[0] + (1 - dampening) * g
    return p - lr * (g + mu * buf if nesterov else buf), [buf]


def adam(p, g, state, lr, k, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False):
    if decoupled:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    m, v = state or (torch.zeros_like(p), torch.zeros_like(p))
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    bias1, bias2 = 1 - b1 ** (k + 1), 1 - b2 ** (k + 1)
    return p - lr * (m / bias1) / (_root(v) / bias2**0.5 + eps), [m, v]


def rmsprop(p, g, state, lr, k, alpha=0.99, eps=1e-8, weight_decay=0.0):
    g = g + weight_decay * p
    (v,) = state or (torch.zeros_like(p),)
    v = alpha * v + (1 - alpha) * g**2
    return p - lr * g / (_root(v) + eps), [v]


# -- the loop --------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, batch: dict[str, Tensor], ways: int | None) -> Tensor:
    return F.cross_entropy(logits[:, :ways], batch["labels"])


@dataclass
class Episode:
    """What the loop found.

    Attributes:
        losses: Query losses ``[T]``, in the graph.
        fast: Adapted parameters per task, name -> tensor.
        logits: Query logits per task.
        support_losses: ``[T][K]``.
        meta: The leaves that gradients are taken of: adapted, shared, ``"inner_lr.values"``.
    """

    losses: list[Tensor] = field(default_factory=list)
    fast: list[Named] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    support_losses: list[list[float]] = field(default_factory=list)
    meta: Named = field(default_factory=dict)

    def gradients(self, loss: Tensor | None = None) -> Named:
        """Meta-gradient of the mean loss (or of `loss`), zeros where it does not depend."""
        loss = torch.stack(self.losses).mean() if loss is None else loss
        found = torch.autograd.grad(
            loss, list(self.meta.values()), allow_unused=True, retain_graph=True
        )
        return {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(self.meta.items(), found, strict=True)
        }


def loop(
    learner: fm.MAML,
    tasks: Sequence[Task],
    *,
    rule: Callable = sgd,
    loss_fn: Callable = cross_entropy,
    proximal: float = 0.0,
) -> Episode:
    """The learner's episode, from its settings alone."""
    patched, model = learner.patched, learner.patched.model
    names = patched.layout.names
    meta = {n: p.detach().clone().requires_grad_() for n, p in learner.named_parameters()}
    out = Episode(meta=meta)
    shared = {n: p for n, p in out.meta.items() if n not in names and not n.startswith("inner_lr")}
    steps = learner.steps
    exact = 0 if learner.order == 1 else steps if learner.truncate is None else learner.truncate

    def run(fast: Named, batch: dict[str, Tensor]) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        weights = {**shared, **_merged(patched, fast, shared)}
        return torch.func.functional_call(model, weights, (), inputs).logits

    for t, (support, query, ways) in enumerate(tasks):
        theta = {n: out.meta[n] for n in names}
        fast, states = dict(theta), {n: [] for n in names}
        history = []
        for k in range(steps):
            differentiated = k >= steps - exact
            with sdpa_kernel(SDPBackend.MATH):
                at = fast
                if not differentiated:
                    at = {n: p.detach().requires_grad_() for n, p in fast.items()}
                loss = loss_fn(run(at, support), support, ways)
                total = loss
                if proximal:
                    total = loss + proximal / 2 * sum(
                        (at[n] - theta[n].detach()).square().sum() for n in names
                    )
                found = torch.autograd.grad(
                    total, [at[n] for n in names], create_graph=differentiated, allow_unused=True
                )
            history.append(float(loss.detach()))
            grads = {
                n: torch.zeros_like(fast[n]) if g is None else g
                for n, g in zip(names, found, strict=True)
            }
            if learner.clip_norm is not None:
                norm = torch.cat([g.flatten() for g in grads.values()]).norm()
                if norm > learner.clip_norm:
                    grads = {n: g * (learner.clip_norm / norm) for n, g in grads.items()}
            for i, n in enumerate(names):
                lr = _rate(learner, out.meta.get("inner_lr.values"), t, k, i)
                fast[n], states[n] = rule(fast[n], grads[n], states[n], lr, k)
        with sdpa_kernel(SDPBackend.MATH):
            logits = run(fast, query)
        out.losses.append(loss_fn(logits, query, ways))
        out.fast.append(fast)
        out.logits.append(logits)
        out.support_losses.append(history)
    return out


def _rate(learner: fm.MAML, values: Tensor | None, task: int, step: int, segment: int):
    """The rate of one tensor: a number, or a tensor that broadcasts against it."""
    rates, layout = learner.rates, learner.patched.layout
    if values is None:
        return rates.constant
    for axis in rates.axes:
        if axis == "step":
            values = values[min(step, len(values) - 1)]
        elif axis == "task":
            values = values[task]
        elif axis == "layer":
            values = values[segment]
        else:
            start = layout.offsets[segment]
            shape = layout.shapes[segment]
            values = values[start : start + layout.numels[segment]].view(shape)
    return values


def _merged(patched: fm.Patched, fast: Named, shared: Named) -> Named:
    """Parameters to run with: LoRA terms added to their weights."""
    found = {n: p for n, p in fast.items() if ".lora_" not in n}
    for name in fast:
        if name.endswith(".lora_A"):
            module = name.removesuffix(".lora_A")
            weight = f"{module}.weight"
            base = found.get(weight, shared.get(weight, patched.model.get_parameter(weight)))
            scale = patched.slots.owners[module].lora_scale
            found[weight] = base + scale * fast[f"{module}.lora_B"] @ fast[name]
    return found


# -- comparison ------------------------------------------------------------------------------


def gradients(learner: nn.Module, loss: Tensor, **kwargs) -> Named:
    """``.grad`` of every meta-parameter after ``loss.backward()``; cleared before and after."""
    learner.zero_grad()
    loss.backward(**kwargs)
    found = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in learner.named_parameters()
    }
    learner.zero_grad()
    return found


def assert_close(actual: Named, expected: Named, rtol: float = 1e-9) -> None:
    """Each tensor to `rtol` of its scale, or of a thousandth of the largest."""
    assert actual.keys() == expected.keys()
    actual = {n: t.detach() for n, t in actual.items()}
    expected = {n: t.detach() for n, t in expected.items()}
    largest = max(float(e.abs().max()) for e in expected.values())
    for name, want in expected.items():
        scale = max(float(want.abs().max()), 1e-3 * largest)
        error = float((actual[name] - want).abs().max())
        assert error <= rtol * scale, f"{name}: error {error:.1e} at scale {scale:.1e}"


def assert_same(
    learner: fm.MAML,
    out: fm.MetaOutput,
    episode: Episode,
    tasks: Sequence[Task],
    rtol: float = 1e-9,
) -> None:
    """Losses, logits, adapted parameters and the meta-gradient agree."""
    losses = torch.stack(episode.losses).detach()
    torch.testing.assert_close(out.task_losses.detach(), losses, rtol=rtol, atol=0)
    torch.testing.assert_close(out.loss.detach(), losses.mean(), rtol=rtol, atol=0)
    history = torch.tensor(episode.support_losses, dtype=torch.float64).t()
    torch.testing.assert_close(out.support_losses, history, rtol=rtol, atol=0)
    assert not out.diverged.any()
    for t, (_, query, ways) in enumerate(tasks):
        rows = query["labels"].shape[0]
        assert_close({"logits": out.logits[t, :rows]}, {"logits": episode.logits[t]}, rtol)
        assert_close(out.params.task(t), episode.fast[t], rtol)
        right = (episode.logits[t][:, :ways].argmax(-1) == query["labels"]).double().mean()
        assert float(out.accuracy[t]) == float(right.float())
    want = episode.gradients()
    assert max(float(g.abs().max()) for g in want.values()) > 1e-4
    assert_close(gradients(learner, out.loss), want, rtol)


def weighted(out: fm.MetaOutput) -> Tensor:
    """A loss whose gradient a chunk cannot take ahead: its tasks weigh differently."""
    losses = out.task_losses
    return (losses * torch.arange(1, len(losses) + 1).to(losses)).mean()
