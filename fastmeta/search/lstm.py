"""`fm.search.LSTMController`: a policy that takes one decision after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta._settings import integers
from fastmeta.search.controller import Controller
from fastmeta.search.proposal import Proposal
from fastmeta.search.space import Space

_ROLLS = 16  # of which all may lie beyond what is allowed


class Policy(nn.Module):
    """``pi(a) = prod_d pi(a_d | a_1 .. a_{d-1}, task)``, an LSTM over the decisions.

    Args:
        options: Number of options of each decision.
        hidden: Width of the LSTM.
        context: Width of the task embedding, 0 for none.
    """

    def __init__(self, options: Sequence[int], hidden: int, context: int) -> None:
        super().__init__()
        self.options = tuple(options)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.first = nn.Parameter(torch.zeros(hidden))
        self.embeddings = nn.ModuleList(nn.Embedding(n, hidden) for n in options)
        self.heads = nn.ModuleList(nn.Linear(hidden, n) for n in options)
        for head in self.heads:  # every option equally likely at first
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.read = nn.Linear(context, hidden) if context else None

    def begin(self, count: int, context: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Input and state before the first decision; context ``[D]`` or ``[n, D]``."""
        x = self.first.expand(count, -1)
        if self.read is not None and context is not None:
            context = F.layer_norm(context, context.shape[-1:])
            x = x + torch.tanh(self.read(context))
        zero = x.new_zeros(count, x.shape[1])
        return x, (zero, zero)

    def step(self, number: int, x: Tensor, state: tuple[Tensor, Tensor]):
        """Log probabilities ``[n, options]`` of one decision, and the state."""
        state = self.cell(x, state)
        return F.log_softmax(self.heads[number](state[0]), -1), state

    def forward(self, taken: Tensor, free: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log probability and entropy ``[n]`` of candidates.

        Args:
            taken: Options, int64 ``[n, decisions]``.
            free: Which decisions had a choice, bool ``[n, decisions]``.
            context: ``[D]``, ``[n, D]`` or None.
        """
        x, state = self.begin(len(taken), context)
        total, entropy = x.new_zeros(len(taken)), x.new_zeros(len(taken))
        for d in range(len(self.options)):
            logs, state = self.step(d, x, state)
            chosen = logs.gather(1, taken[:, d : d + 1]).squeeze(1)
            total = total + chosen * free[:, d]
            entropy = entropy - (logs.exp() * logs).sum(1) * free[:, d]
            x = self.embeddings[d](taken[:, d])
        return total, entropy


class LSTMController(Controller):
    """An autoregressive policy over the decisions, trained by policy gradients.

    All candidates of a step are drawn in one batch and share a baseline: the reward of each is
    compared with the mean of the others' (leave-one-out). One epoch is REINFORCE; more of them are
    PPO's, with clipped ratios. Ranges are divided into `decisions.BINS` parts, of which the policy
    chooses one.

    Args:
        space, seed, allowed: As for `Controller`.
        hidden: Width of the LSTM.
        lr, eps: Of Adam; a larger eps keeps steps small where rewards have come to agree.
        epochs: Passes over each step's candidates, at least 1.
        clip: PPO's bound on the change of a ratio, above 0.
        entropy: Weight of the entropy bonus, per decision, at least 0.
        elites: Size of a memory of the best candidates so far, whose probability is raised at every
            step as well (Abolafia et al. 2018); 0 for none.
        elite_weight: Weight of that.
        context: Width D of the task embeddings that the policy reads, or 0.

    Sources: Zoph and Le 2017, https://arxiv.org/abs/1611.01578; Schulman et al. 2017,
    https://arxiv.org/abs/1707.06347; Abolafia et al. 2018, https://arxiv.org/abs/1801.03526
    """

    def __init__(
        self,
        space: Space,
        *,
        hidden: int = 64,
        lr: float = 0.02,
        eps: float = 1e-2,
        epochs: int = 4,
        clip: float = 0.2,
        entropy: float = 0.03,
        elites: int = 8,
        elite_weight: float = 0.5,
        context: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(space, **settings)
        integers(1, hidden=hidden, epochs=epochs)
        integers(0, elites=elites, context=context)
        if not lr > 0 or not clip > 0 or not entropy >= 0 or not elite_weight >= 0:
            raise ValueError(
                "lr and clip must be positive, entropy and elite_weight at least 0, "
                f"got {lr}, {clip}, {entropy} and {elite_weight}"
            )
        self.decisions = space.free
        if not self.decisions:
            raise ValueError("the space has a single candidate: there is nothing to learn")
        self.epochs, self.clip, self.entropy = epochs, clip, entropy
        self.elites, self.elite_weight, self.context = elites, elite_weight, context
        self.best: list[tuple[float, Proposal]] = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            self.policy = Policy([d.options for d in self.decisions], hidden, context)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr, eps=eps)

    @torch.no_grad()
    def propose(self, count: int, context: Tensor | None = None) -> list[Proposal]:
        context = self._read(context)
        return self.gather(count, lambda: self._roll(count, context), _ROLLS)

    def _roll(self, count: int, context: Tensor | None) -> list[Proposal]:
        """Candidates of the policy, drawn in one batch."""
        x, state = self.policy.begin(count, context)
        taken: list[dict[str, Any]] = [{} for _ in range(count)]
        learned = {d.name: i for i, d in enumerate(self.decisions)}
        for d in self.space.decisions:
            number = learned.get(d.name)
            if number is None:
                for mine in taken:
                    mine[d.name] = d.default
                continue
            logs, state = self.policy.step(number, x, state)
            drawn = torch.multinomial(logs.exp(), 1, generator=self.generator).squeeze(1)
            options = drawn.tolist()
            for i, mine in enumerate(taken):
                if d.free(mine):
                    mine[d.name] = d.option(options[i], self.rng)
                else:
                    mine[d.name] = d.default
                    options[i] = d.number(d.default)
            x = self.policy.embeddings[number](torch.tensor(options))
        return [self.space.proposal(mine) for mine in taken]

    def observe(self, proposals, rewards, context=None) -> None:
        """One step of the policy.

        Args:
            proposals, rewards: As for `Controller`.
            context: ``[D]``, or ``[n, D]`` for each candidate its own task; those of one task are
                compared with each other.

        Raises:
            ValueError: As many rewards as candidates were expected, two or more.
        """
        if len(proposals) != len(rewards):
            raise ValueError(
                f"expected one reward for each of {len(proposals)} candidates, got {len(rewards)}"
            )
        context = self._read(context)
        taken, free = self._coded(proposals)
        advantage = torch.tensor(rewards, dtype=torch.float32)
        if context is None or context.dim() == 1:
            advantage = leave_one_out(advantage)
        else:
            _, tasks = torch.unique(context, dim=0, return_inverse=True)
            for task in range(int(tasks.max()) + 1):
                advantage[tasks == task] = leave_one_out(advantage[tasks == task])
        with torch.no_grad():
            before, _ = self.policy(taken, free, context)
        self._remember(proposals, rewards)
        for _ in range(self.epochs):
            after, entropy = self.policy(taken, free, context)
            ratio = (after - before).exp()
            bounded = ratio.clamp(1 - self.clip, 1 + self.clip)
            gain = torch.minimum(ratio * advantage, bounded * advantage).mean()
            loss = -gain - self.entropy * entropy.mean()
            if self.best and self.elite_weight and not self.context:
                own, _ = self.policy(*self._coded([p for _, p in self.best]), None)
                loss = loss - self.elite_weight * own.mean() / len(self.decisions)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()

    @torch.no_grad()
    def best_guess(self, context: Tensor | None = None, count: int = 32) -> Proposal:
        """The most probable of `count` candidates of the policy, for a new task at once."""
        proposals = self.propose(count, context)
        logs, _ = self.policy(*self._coded(proposals), self._read(context))
        return proposals[int(logs.argmax())]

    def _remember(self, proposals: Sequence[Proposal], rewards: Sequence[float]) -> None:
        pool = {p.key: (r, p) for r, p in self.best}
        pool |= {p.key: (float(r), p) for p, r in zip(proposals, rewards, strict=True)}
        ranked = sorted(pool.values(), key=lambda pair: -pair[0])
        self.best = ranked[: self.elites]

    def _coded(self, proposals: Sequence[Proposal]) -> tuple[Tensor, Tensor]:
        taken = [[d.number(p.decisions[d.name]) for d in self.decisions] for p in proposals]
        free = [[d.free(p.decisions) for d in self.decisions] for p in proposals]
        return torch.tensor(taken), torch.tensor(free)

    def _read(self, context: Tensor | None) -> Tensor | None:
        """Task embeddings as the policy reads them, wherever the model is that gave them."""
        if context is None:
            return None
        if context.shape[-1] != self.context:
            raise ValueError(
                f"the policy reads task embeddings of width {self.context}, got {context.shape[-1]}"
            )
        return context.to(self.policy.first)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "best": [[r, dict(p.decisions)] for r, p in self.best],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.best = [(r, self.space.proposal(d)) for r, d in state["best"]]


def leave_one_out(rewards: Tensor) -> Tensor:
    """``(r_i - mean of the others) / std``; zeros where all are equal or there is only one."""
    n = len(rewards)
    if n < 2:
        return torch.zeros_like(rewards)
    others = (rewards.sum() - rewards) / (n - 1)
    difference = rewards - others
    scale = difference.std()
    return difference / scale if scale > 0 else torch.zeros_like(rewards)
