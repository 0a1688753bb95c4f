"""Learned update rules, one task and one tensor after another, in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm

TASKS, ROWS, WIDTH, CLASSES = 3, 6, 5, 3


class Small(nn.Module):
    """Two layers, so that tensors have one and two axes and padding follows each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.body = nn.Linear(WIDTH, 4, dtype=torch.float64)
        self.head = nn.Linear(4, CLASSES, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def batch(seed: int = 0, tasks: int = TASKS) -> fm.TaskBatch:
    generator = torch.Generator().manual_seed(seed)

    def part() -> dict[str, Tensor]:
        x = torch.randn(tasks, ROWS, WIDTH, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, CLASSES, (tasks, ROWS), generator=generator)
        return {"x": x, "labels": labels}

    return fm.TaskBatch(part(), part())


def preprocessed(x: Tensor, p: float = 10.0) -> Tensor:
    """Andrychowicz et al. 2016, appendix A."""
    large = (x.abs() >= math.exp(-p)).unsqueeze(-1)
    one = torch.stack([x.abs().clamp_min(1e-300).log() / p, x.sign()], -1)
    return torch.where(large, one, torch.stack([torch.full_like(x, -1), math.exp(p) * x], -1))


class TensorRule:
    """A rule on one tensor of one task; remembers its own state."""

    def __init__(self, own: dict[str, Tensor], kind: str, layers: int) -> None:
        self.own, self.kind, self.layers, self.state = own, kind, layers, {}

    def __call__(self, theta: Tensor, grad: Tensor, loss: Tensor, lr: float, step: int) -> Tensor:
        return getattr(self, self.kind)(theta, grad, loss, lr, step)

    def cell(self, name: str, x: Tensor) -> Tensor:
        w = self.own[f"{name}_weight_hh"]
        zero = x.new_zeros(x.shape[0], w.shape[1])
        h, c = self.state.get(name, (zero, zero))
        bias = self.own[f"{name}_bias"]
        new = torch.lstm_cell(x, (h, c), self.own[f"{name}_weight_ih"], w, bias, 0 * bias)
        self.state[name] = new
        return new[0]

    def lstm(self, theta, grad, loss, lr, step):
        x = preprocessed(grad.flatten())
        for i in range(self.layers):
            x = self.cell(f"lstm{i}", x)
        out = F.linear(x, self.own["out_weight"], self.own["out_bias"])
        return theta - lr * out.view_as(theta)

    def gated(self, theta, grad, loss, lr, step):
        flat, g = theta.flatten(), grad.flatten()
        of_loss = preprocessed(loss.detach().expand(g.shape))
        h = self.cell("lstm", torch.cat([preprocessed(g), of_loss], -1))
        gates = []
        for name in ("forget", "rate"):
            bias = self.own[f"{name}_bias"]
            last = self.state.get(name, torch.full_like(flat, START[name]))
            x = torch.cat([h, flat[:, None], last[:, None]], -1)
            self.state[name] = torch.sigmoid(F.linear(x, self.own[f"{name}_weight"], bias))[:, 0]
            gates.append(self.state[name])
        return (gates[0] * flat - lr * gates[1] * g).view_as(theta)

    def mlp(self, theta, grad, loss, lr, step):
        s = self.state
        for b in (0.5, 0.9, 0.99):
            s[b] = b * s.get(b, 0) + (1 - b) * grad
        matrix = grad.square().reshape(grad.shape[0], -1)
        for key, value in (("v", grad.square()), ("r", matrix.mean(1)), ("c", matrix.mean(0))):
            s[key] = 0.99 * s.get(key, 0) + 0.01 * value
        factored = (s["r"][:, None] * s["c"] / s["r"].mean()).view_as(grad)
        root, other = (s["v"] + 1e-10) ** -0.5, (factored + 1e-10) ** -0.5
        features = [theta, grad, s[0.5], s[0.9], s[0.99], root, other]
        features += [grad * root, s[0.9] * root, grad * other, s[0.9] * other]
        x = torch.stack([f / (f.square().mean() + 1e-10).sqrt() for f in features], -1)
        times = torch.tensor([1.0, 3, 10, 30, 100, 300], dtype=x.dtype)
        x = torch.cat([x, torch.tanh((step + 1) / times).expand(*x.shape[:-1], 6)], -1)
        for i in range(self.layers):
            x = F.linear(x, self.own[f"layer{i}_weight"], self.own[f"layer{i}_bias"]).relu()
        d, m = F.linear(x, self.own["out_weight"], self.own["out_bias"]).unbind(-1)
        return theta - lr * d * torch.exp(0.1 * m)


START = {"forget": 0.999, "rate": 0.01}


def oracle(model: Small, own, kind: str, layers: int, given: fm.TaskBatch, steps, lr, order):
    """Query losses ``[T]`` of a per-task loop, differentiable to the model's and the rule's own."""
    own = {n: p.double() for n, p in own.items()}
    losses = []
    for t in range(given.num_tasks):
        fast = dict(model.named_parameters())
        rules = {n: TensorRule(own, kind, layers) for n in fast}
        for step in range(steps):
            logits = torch.func.functional_call(model, fast, (given.support["x"][t],))
            loss = F.cross_entropy(logits, given.support["labels"][t])
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=order == 2)
            fast = {
                n: rules[n](p, g, loss, lr, step)
                for (n, p), g in zip(fast.items(), grads, strict=True)
            }
        logits = torch.func.functional_call(model, fast, (given.query["x"][t],))
        losses.append(F.cross_entropy(logits, given.query["labels"][t]))
    return torch.stack(losses)
