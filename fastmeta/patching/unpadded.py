"""Layers of a transformer without padding.

Texts of several tasks have one width, that of the longest: in few-shot data more than half of the
positions are padding, which every layer computes and nothing reads. Here the first of a run of
layers is given each task's real tokens in a row, ``[T, M, D]`` with M those of the fullest task,
and the last one's result is put back, zero where padding was. Attention alone needs to know which
text a token is of, and gets the padded form. Results are the same; whether nothing in a model reads
its padding is checked on real inputs before this is used (see `search`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastmeta._recorder import recording
from fastmeta.batch import IGNORE_INDEX
from fastmeta.ops.take_rows import rearranged
from fastmeta.patching.bind import install
from fastmeta.patching.context import current_call

MASK = "attention_mask"
IDS = "input_ids"
_WORTH = 15 / 16
"""Share of the positions above which leaving out the others costs more than it saves."""


class Tokens:
    """Which positions of a padded batch are computed.

    Args:
        mask: ``[B, L]``, nonzero at real tokens; the B rows are those of T tasks in turn. A row's
            first position is always kept.
        tasks: T.
        multiple: M is rounded up to a multiple of it, where there are as many positions.

    Attributes:
        index: int64 ``[T * M]``: the position ``b * L + l`` of every token. Tasks with fewer real
            tokens than M are filled up with some of their padding.
        fullest: Real tokens of the fullest task.
        place: int64 ``[B * L]``: where each real position's token is, -1 for padding.
    """

    are_operands = False  # of a trace, which then holds for others

    def __init__(self, mask: Tensor, tasks: int, multiple: int = 1) -> None:
        self.tasks, self.shape = tasks, tuple(mask.shape)
        kept = mask != 0
        kept[:, :1] = True
        kept = kept.view(tasks, -1)  # [T, N * L]
        each = kept.sum(1)
        self.fullest = int(each.max())
        self.width = min(-(-self.fullest // multiple) * multiple, kept.shape[1])
        # real ones first, in their order
        index = kept.logical_not().to(torch.int8).sort(dim=1, stable=True).indices[:, : self.width]
        offsets = torch.arange(tasks, device=mask.device).unsqueeze(1) * kept.shape[1]
        self.index = (index + offsets).flatten()
        real = torch.arange(self.width, device=mask.device) < each.unsqueeze(1)
        rows = torch.arange(tasks * self.width, device=mask.device).view(tasks, -1)
        self.place = torch.full((kept.numel(),), -1, device=mask.device)
        self.place[self.index] = torch.where(real, rows, -1).flatten()
        # filling tokens are computed and never put back, so nothing comes back to them
        self.read = torch.where(real.flatten(), self.index, -1)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What differs between batches of the same shapes and M."""
        return self.index, self.place, self.read

    def traced(self, tensors: Sequence[Tensor]) -> Tokens:
        """These positions with :attr:`tensors` that are operands of a trace."""
        other = copy.copy(self)
        other.index, other.place, other.read = tensors
        other.are_operands = True
        return other

    @property
    def share(self) -> float:
        """Of the positions, those that need to be computed; the same however M is rounded."""
        return self.tasks * self.fullest / max(self.place.numel(), 1)

    def are_rows_of(self, t: object) -> bool:
        """Whether a tensor has entries for every position, ``[B or 1, L, D]``."""
        rows, length = self.shape
        return (
            isinstance(t, Tensor)
            and t.dim() == 3
            and t.shape[1] == length
            and t.shape[0] in (1, rows)
        )

    def packed(self, x: Tensor) -> Tensor:
        """``[B or 1, L, ...]`` -> ``[T, M, ...]``."""
        rows, length = self.shape
        tail = x.shape[2:]
        x = x.expand(rows, length, *tail).reshape(rows * length, -1)
        return rearranged(x, self.index, self.place).view(self.tasks, self.width, *tail)

    def padded(self, x: Tensor) -> Tensor:
        """``[T, M, ...]`` -> ``[B, L, ...]``, zero at padding."""
        tail = x.shape[2:]
        x = x.reshape(self.tasks * self.width, -1)
        return rearranged(x, self.place, self.read).view(*self.shape, *tail)


@dataclass
class Unpadded:
    """A call without padding.

    Attributes:
        tokens: Its positions.
        active: Whether the layer that runs is given tokens.
        others: Packed forms of tensors that layers are given besides their input.
    """

    tokens: Tokens
    active: bool = False
    others: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def argument(self, value: Any) -> Any:
        """A layer's argument: what has entries for every position has them for every token."""
        if isinstance(value, tuple) and value and all(map(self.tokens.are_rows_of, value)):
            return tuple(self.argument(v) for v in value)
        if not self.tokens.are_rows_of(value):
            return value
        if id(value) not in self.others:
            self.others[id(value)] = value, self.tokens.packed(value)
        return self.others[id(value)][1]


def tokens_of(mask: Tensor, widths: int = 0) -> Tokens | None:
    """The positions of ``[T, N, L]`` that count, or None where all or nearly all do.

    Args:
        widths: Round M up to one of so many, up to all positions, so that batches of the same
            shapes have few; 0: do not.
    """
    if mask.dim() != 3 or mask.is_floating_point() or not mask.numel():
        return None
    multiple = -(-mask[0].numel() // widths) if widths else 1
    tokens = Tokens(mask.flatten(0, 1), mask.shape[0], multiple)
    return tokens if tokens.share <= _WORTH else None


def is_traced(mask: Tensor) -> bool:
    """Whether code is recorded or transformed rather than run: nothing may depend on a mask."""
    return (
        recording()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(mask)
    )


def ignored_by(labels: object, mask: Tensor) -> bool:
    """Whether labels ``[T, N, L]`` leave out the padding of a mask of that shape, as that of the
    word itself and as that of the word before."""
    if not isinstance(labels, Tensor) or labels.shape != mask.shape:
        return False
    padding = mask == 0
    counted = labels != IGNORE_INDEX
    after = counted[..., 1:] & padding[..., :-1]
    return not bool((counted & padding).any() | after.any())


def at_tokens(outputs: Any, mask: Tensor) -> Any:
    """A model's outputs with zeros for padding, in whatever is ``[B, L, ...]``."""

    def kept(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.shape[:2] != mask.shape:
            return t
        return t.masked_fill((mask == 0).view(*mask.shape, *(1,) * (t.dim() - 2)), 0)

    return tree_map(kept, outputs)


def with_padding(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """A model's inputs ``[B, ...]`` with rows in turn whole, padded on the right, on the left, and
    in the middle; None where there is no mask or nothing to mask. Two rows of one task have an odd
    number of tokens."""
    mask = inputs.get(MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < 2:
        return None
    if mask.is_floating_point():
        return None
    changed, length = torch.ones_like(mask), mask.shape[1]
    changed[1::4, max(1, length - 1 - length // 2 // 2 * 2) :] = 0
    changed[2::4, : length // 2] = 0
    changed[3::4, 1 : 1 + length // 2] = 0
    return {**inputs, MASK: changed}


def with_words(inputs: Mapping[str, Any], config: Any) -> list[tuple[dict[str, Any], int | None]]:
    """Padded inputs whose padding holds some word and, where that shows, the configuration's
    padding word; and that word, if it is to be there.

    Models that look for a text's last word by its id show the padding that holds any other.
    """
    word, ids = getattr(config, "pad_token_id", None), inputs.get(IDS)
    same = isinstance(ids, Tensor) and ids.shape == inputs[MASK].shape
    if not isinstance(word, int) or not same:
        return [(dict(inputs), None)]
    padding = inputs[MASK] == 0

    def filled(by: int) -> dict[str, Any]:
        return {**inputs, IDS: ids.masked_fill(padding, by)}

    return [(filled(0 if word else 1), None), (filled(word), word)]


def runs_of_layers(structure: nn.Module, order: list[str]) -> list[list[str]]:
    """Names of layers that follow each other, of every list whose layers all run once, in turn.

    Args:
        order: Module names in the order in which they were entered.
    """
    if any(getattr(m, "layerdrop", 0) for m in structure.modules()):
        return []  # in training any layer may be left out, the first or the last too
    found = []
    for name, module in structure.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            layers = [f"{name}.{i}" for i in range(len(module))]
            if [n for n in order if n in layers] == layers:
                found.append(layers)
    return found


def install_in(structure: nn.Module, layers: list[str]) -> None:
    """Make a run of layers of a copied structure work on tokens, in calls that have them."""
    for name in layers:
        module = structure.get_submodule(name)
        forward = _on_tokens(module.forward, name == layers[0], name == layers[-1])
        install(module, "forward", forward)


def _on_tokens(original: Callable, first: bool, last: bool) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = current_call().unpadded
        if call is None:
            return original(*args, **kwargs)
        states, *others = args  # where they come by name this fails, and layers stay padded
        call.active = True
        states = call.tokens.packed(states) if first else states
        others = map(call.argument, others)
        kwargs = {k: call.argument(v) for k, v in kwargs.items()}
        out = original(states, *others, **kwargs)
        if last:
            call.active = False
            if isinstance(out, Tensor):
                return call.tokens.padded(out)
            return (call.tokens.padded(out[0]), *out[1:])
        return out

    return forward
