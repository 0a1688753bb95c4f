"""A controller whose choices are relaxed and trained by exact second-order gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.batch import TaskBatch
from fastmeta.engine.inner import InnerLoop, Support, inner_step, task_losses
from fastmeta.engine.losses import WAYS, classification
from fastmeta.engine.optimizers import RULES
from fastmeta.patching import TaskParams
from fastmeta.patching.task_axes import is_input
from fastmeta.search.controller import Controller
from fastmeta.search.decisions import Decision, Range
from fastmeta.search.lstm import leave_one_out
from fastmeta.search.proposal import Proposal
from fastmeta.search.relaxed import Relaxation, SoftPass
from fastmeta.search.space import Space

_NOT_RELAXED = ("optimizer", "batch_size")


@dataclass(frozen=True)
class _Rate:
    """One learning rate for all tasks and steps, differentiable."""

    value: Tensor
    segments: None = None

    def at(self, step: int, tasks: Tensor | None = None) -> Tensor:
        return self.value.view(1, 1)


class DifferentiableController(Controller):
    """Independent distributions over every decision's options, learned through the inner loop.

    Every step adapts one batch of tasks with all parts kept in proportion to their probabilities
    and follows the exact gradient of ``sum_k p(k) L_query(phi_k) + cost_weight C`` to the logits:
    through all inner steps (not by differences), with k the numbers of steps to choose from and C
    the expected arithmetic over that of the whole model. Optimizer, batch size and a range of steps
    have no relaxation: their logits follow the rewards of evaluated candidates (REINFORCE,
    leave-one-out), and the relaxed inner loop takes the most probable optimizer, all support rows
    and the expected number of steps.

    Args:
        space, seed, allowed: As for `Controller`.
        lr: Rate of Adam on the logits.
        cost_weight: Weight of the expected arithmetic, at least 0.
        passes: Gradient steps for every batch of tasks, at least 1.

    Source: Liu et al. 2019 (DARTS), https://arxiv.org/abs/1806.09055, there with approximate
    gradients.
    """

    def __init__(
        self,
        space: Space,
        *,
        lr: float = 0.1,
        cost_weight: float = 0.1,
        passes: int = 2,
        **settings: Any,
    ) -> None:
        super().__init__(space, **settings)
        if not lr > 0 or not cost_weight >= 0 or passes < 1:
            raise ValueError(
                "lr must be positive, cost_weight at least 0 and passes at least 1, "
                f"got {lr}, {cost_weight} and {passes}"
            )
        if not space.free:
            raise ValueError("the space has a single candidate: there is nothing to learn")
        like = next(space.model.parameters())
        self.decisions = space.free
        self.logits = nn.ParameterList(
            nn.Parameter(torch.zeros(d.options, dtype=like.dtype, device=like.device))
            for d in self.decisions
        )
        self.cost_weight, self.passes = cost_weight, passes
        self.generator = torch.Generator().manual_seed(self.seed)
        self.optimizer = torch.optim.Adam(self.logits.parameters(), lr=lr)

    def shares(self) -> dict[str, Tensor]:
        """Probabilities of every decision's options."""
        pairs = zip(self.decisions, self.logits, strict=True)
        return {d.name: logits.softmax(0) for d, logits in pairs}

    def objective(self, evaluator: Any, batch: TaskBatch) -> Tensor:
        """What the logits minimise on one batch of tasks; differentiable twice."""
        net, relaxation = evaluator.net, Relaxation(self.space, self.shares())
        batch = batch.to(net.device)
        extra = {} if batch.ways is None else {WAYS: batch.ways}
        support, query = {**batch.support, **extra}, {**batch.query, **extra}
        inputs = {k: v for k, v in batch.support.items() if is_input(k)}
        gates = SoftPass(net.layers(net.plan(inputs)), relaxation)
        domains = relaxation.domains
        if isinstance(domains["steps"], Range):
            share: dict[int, Any] = {round(float(relaxation.mean("steps").detach())): 1.0}
        else:
            share = dict(zip(domains["steps"], relaxation.share("steps"), strict=True))
        steps = max(share)
        name = domains["optimizer"][int(relaxation.share("optimizer").argmax())]
        loop = InnerLoop(
            patched=net,
            rule=RULES[name](weight_decay=relaxation.mean("weight_decay")),  # type: ignore[call-arg]
            rates=_Rate(relaxation.mean("lr")),  # type: ignore[arg-type]
            steps=steps,
            loss_fn=classification,
            second_order=steps,
        )
        params = net.init(batch.num_tasks).packed.detach().requires_grad_()
        state = loop.rule.init(params)
        active = torch.ones(len(params), dtype=torch.bool, device=params.device)
        total = self.cost_weight * relaxation.arithmetic()
        for step in range(steps):
            params, state, active, _ = inner_step(
                loop, step, params, state, Support(support, gates), active, create_graph=True
            )
            if step + 1 in share:
                after = TaskParams(net.layout, params)
                losses, _ = task_losses(loop, after, query, gates)
                good = active & torch.isfinite(losses.detach())
                mean = losses.masked_fill(~good, 0.0).sum() / good.sum().clamp_min(1)
                total = total + share[step + 1] * mean
        return total

    def learn(self, evaluator: Any, batch: TaskBatch) -> None:
        for _ in range(self.passes):
            with torch.enable_grad():
                loss = self.objective(evaluator, batch)
                self.optimizer.zero_grad()
                loss.backward()
            for logits in self.logits:
                if logits.grad is not None:
                    logits.grad.nan_to_num_(0.0, 0.0, 0.0)
            nn.utils.clip_grad_norm_(self.logits.parameters(), 1.0)
            self.optimizer.step()

    @torch.no_grad()
    def propose(self, count: int, context: Tensor | None = None) -> list[Proposal]:
        shares = self.shares()

        def choose(d: Decision) -> Any:
            share = shares[d.name].float().cpu()
            option = int(torch.multinomial(share, 1, generator=self.generator))
            return d.option(option, self.rng)

        return self.gather(count, lambda: [self.space.decide(choose)], 100 * count)

    def observe(self, proposals, rewards, context=None) -> None:
        places = [
            i
            for i, d in enumerate(self.decisions)
            if d.name in _NOT_RELAXED or (d.name == "steps" and isinstance(d.domain, Range))
        ]
        if not places:
            return
        advantage = leave_one_out(torch.tensor(rewards, dtype=torch.float32))
        with torch.enable_grad():
            total = self.logits[places[0]].new_zeros(())
            for i in places:
                d, logs = self.decisions[i], self.logits[i].log_softmax(0)
                taken = [d.number(p.decisions[d.name]) for p in proposals]
                # No credit to what was not chosen.
                free = logs.new_tensor([d.free(p.decisions) for p in proposals])
                total = total - (logs[taken] * advantage.to(logs) * free).mean()
            self.optimizer.zero_grad()
            total.backward()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "logits": [p.detach().clone() for p in self.logits],
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            for mine, saved in zip(self.logits, state["logits"], strict=True):
                mine.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
