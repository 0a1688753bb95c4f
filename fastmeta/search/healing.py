"""Heal a pruned model: it learns to give the states of the whole one again, from texts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from fastmeta._settings import above_0, integer
from fastmeta.data import tokenize
from fastmeta.models import SentenceClassifier


def heal(
    pruned: nn.Module,
    whole: nn.Module,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    steps: int = 800,
    batch_size: int = 64,
    lr: float = 3e-4,
    max_length: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Distil the whole model's states into a pruned one, in place; no label is read.

    ``loss = mean(1 - cos(h, h'))`` over the embeddings of a `SentenceClassifier`, over the token
    states of any other model. Adam, whose rate rises over a tenth of the steps and then falls to 0.
    The head stays as it is. Both models run in evaluation mode, without dropout, and get their own
    modes back.

    Args:
        pruned: What `fm.search.prune` or an exported folder gives; its hidden size is the whole
            model's.
        whole: The model that was pruned; unchanged.
        texts: Of the kind that the model will read, at least one.
        tokenizer: Of the model.
        steps: Updates, at least 1.
        batch_size: Texts of an update, drawn with replacement, at least 1.
        lr: The highest rate, above 0.
        max_length: Longer texts are cut to this many tokens.
        seed: Of the draws.
        progress: Show a bar.

    Returns:
        The loss of every step.

    Raises:
        ValueError: A setting out of its range, or no texts.

    Source: Hinton, Vinyals and Dean (2015), "Distilling the Knowledge in a Neural Network"; states
    instead of predictions as in Sun et al. (2019), "Patient Knowledge Distillation".
    """
    steps, batch_size = integer("steps", steps), integer("batch_size", batch_size)
    lr = above_0("lr", lr)
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts must be a sequence of at least one text, got {texts!r}")
    tokens = tokenize(list(texts), tokenizer, max_length=max_length)
    body = pruned.get_submodule(pruned.base_model_prefix)
    wanted = {p: p.requires_grad for p in body.parameters()}
    device = next(iter(wanted)).device
    optimizer = torch.optim.Adam(wanted, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, 10 * (i + 1) / steps) * (1 - i / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    modes = {part: part.training for model in (whole, pruned) for part in model.modules()}
    body.requires_grad_(True)
    try:
        for part in modes:
            part.training = False
        for _ in (bar := trange(steps, desc="healing", disable=not progress)):
            chosen = torch.randint(len(texts), (batch_size,), generator=generator).numpy()
            rows = {k: torch.from_numpy(v).to(device) for k, v in tokens.rows(chosen).items()}
            with torch.no_grad():
                target = _states(whole, rows)
            loss = _distance(_states(pruned, rows), target, rows["attention_mask"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    finally:
        for part, mode in modes.items():
            part.training = mode
        for p, grad in wanted.items():
            p.grad = None
            p.requires_grad_(grad)
    return losses


def _states(model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """``[B, D]`` of a sentence encoder, ``[B, L, D]`` of any other model."""
    if isinstance(model, SentenceClassifier):
        return model.embed(**rows)
    return model.get_submodule(model.base_model_prefix)(**rows).last_hidden_state


def _distance(states: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    away = 1 - F.cosine_similarity(states, target, dim=-1)  # [B] or [B, L]
    if away.dim() == 1:
        return away.mean()
    mask = mask.to(away.dtype)
    return (away * mask).sum() / mask.sum()
