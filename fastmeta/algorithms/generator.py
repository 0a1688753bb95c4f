"""What a hypernetwork is made of: a set encoder, and a generator of every adapted tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta import ops
from fastmeta.batch import IGNORE_INDEX
from fastmeta.patching import ParamLayout

_DIRECT = 8192  # entries of a tensor that is generated whole; a larger one is a product of factors


class SetEncoder(nn.Module):
    """Features and labels of a support set to one vector per task, whatever the order of the rows.

    ``z = LayerNorm(mean_n phi([e_n, mean of its class, mean of all]))``: labels enter by way of
    the classes' means, so that renaming classes changes nothing. A description's feature is added.

    Args:
        width: Length of a feature.
        latent: Length of z.
        hidden: Width of phi.
        rows: Whether there are support rows.
        description: Whether there is a description.
    """

    def __init__(
        self, width: int, latent: int, hidden: int, *, rows: bool, description: bool
    ) -> None:
        super().__init__()
        if rows:
            self.phi = nn.Sequential(
                nn.Linear(3 * width, hidden), nn.GELU(), nn.Linear(hidden, latent)
            )
        if description:
            self.described = nn.Linear(width, latent)
        self.norm = nn.LayerNorm(latent)

    def forward(
        self,
        features: Tensor | None,
        labels: Tensor | None,
        means: Tensor | None,
        text: Tensor | None,
    ) -> Tensor:
        """``[T, latent]``.

        Args:
            features: ``[T, N, D]``, or None.
            labels: ``[T, N]``, -100 for rows that do not count.
            means: Of the classes, ``[T, C, D]``.
            text: Of the description, ``[T, D]``, or None.
        """
        z = 0.0
        if features is not None:
            valid = (labels != IGNORE_INDEX).to(features.dtype).unsqueeze(-1)
            count = valid.sum(1, keepdim=True).clamp_min(1)
            whole = (features * valid).sum(1, keepdim=True) / count
            own = F.one_hot(labels.clamp_min(0), means.shape[1]).to(features.dtype) @ means
            rows = self.phi(torch.cat([features, own, whole.expand_as(features)], dim=-1))
            z = (rows * valid).sum(1) / count.squeeze(1)
        if text is not None:
            z = z + self.described(text)
        return self.norm(z)


def row_labels(labels: Tensor) -> Tensor:
    """Classes ``[T, N]`` of examples; where their labels are no classes, all are of one.

    Args:
        labels: ``[T, N, ...]``; an example with none but ignored ones (-100, of numbers NaN) does
            not count.
    """
    if labels.dim() == 2 and labels.dtype == torch.int64:
        return labels
    ignored = labels.isnan() if labels.is_floating_point() else labels == IGNORE_INDEX
    return torch.where(ignored.unsqueeze(2).flatten(2).all(2), IGNORE_INDEX, 0)


class Generator(nn.Module):
    """A task's vector to what is added to the initial value of every adapted tensor.

    The input of a tensor is ``[z, embedding of its layer, embedding of its kind]``; one
    trunk serves all of them in one pass, and a linear head per kind turns its output into the
    entries: all of them, or for more than 8192 the factors of a product of low rank. The kind is
    the name without the layer's number. Every head starts at zero: nothing is generated at first.

    Args:
        layout: The adapted tensors.
        skip: Slots that something else generates.
        latent: Length of z.
        hidden: Width of the trunk.
        embedding: Length of the embeddings.
        rank: Of generated products, at least 1.
        scale: Factor of what the heads return.
    """

    def __init__(
        self,
        layout: ParamLayout,
        skip: Sequence[int],
        *,
        latent: int,
        hidden: int,
        embedding: int,
        rank: int,
        scale: float,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.slots = [i for i in range(len(layout)) if i not in skip]
        self.names = [layout.names[i] for i in self.slots]
        self.shapes = [layout.shapes[i] for i in self.slots]
        self.rank = rank
        places = [_place(name) for name in self.names]
        layers = sorted({layer for layer, _ in places})
        kinds = sorted(
            {(kind, shape) for (_, kind), shape in zip(places, self.shapes, strict=True)}
        )
        self.groups: list[list[int]] = [[] for _ in kinds]
        for i, ((_, kind), shape) in enumerate(zip(places, self.shapes, strict=True)):
            self.groups[kinds.index((kind, shape))].append(i)
        kind_of = {i: k for k, group in enumerate(self.groups) for i in group}
        where = torch.tensor(
            [[layers.index(layer), kind_of[i]] for i, (layer, _) in enumerate(places)]
        ).reshape(-1, 2)
        self.register_buffer("where", where, persistent=False)
        self.layer = nn.Embedding(len(layers), embedding)
        self.kind = nn.Embedding(len(kinds), embedding)
        width = latent + 2 * embedding
        self.start = nn.Linear(width, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.GELU(),
                nn.Linear(2 * hidden, hidden),
            )
            for _ in range(2)
        )  # fmt: skip
        self.norm = nn.LayerNorm(hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, self._outputs(s)) for _, s in kinds)
        for head, (_, shape) in zip(self.heads, kinds, strict=True):
            with torch.no_grad():
                head.bias.zero_()
                zero = (
                    head.weight if math.prod(shape) <= _DIRECT else head.weight[: rank * shape[0]]
                )
                zero.zero_()

    def _outputs(self, shape: tuple[int, ...]) -> int:
        count = math.prod(shape)
        return count if count <= _DIRECT else self.rank * (shape[0] + count // shape[0])

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """Name -> ``[T, *shape]`` from ``[T, latent]``."""
        where = torch.cat([self.layer(self.where[:, 0]), self.kind(self.where[:, 1])], dim=-1)
        tasks, segments = z.shape[0], len(self.slots)
        x = torch.cat(
            [z.unsqueeze(1).expand(-1, segments, -1), where.unsqueeze(0).expand(tasks, -1, -1)], -1
        )
        x = self.start(x)
        for block in self.blocks:
            x = x + block(x)
        x = self.norm(x)
        found: dict[str, Tensor] = {}
        for group, head in zip(self.groups, self.heads, strict=True):
            values = self.scale * head(x[:, group])  # [T, tensors of this kind, outputs]
            shape = self.shapes[group[0]]
            if math.prod(shape) > _DIRECT:
                u, v = values.split(
                    [self.rank * shape[0], values.shape[-1] - self.rank * shape[0]], -1
                )
                u = u.unflatten(-1, (shape[0], self.rank))
                v = v.unflatten(-1, (self.rank, -1))
                values = u @ v
            values = values.reshape(*values.shape[:2], *shape)
            found |= {self.names[i]: values[:, g] for g, i in enumerate(group)}
        return found


class ClassHead(nn.Module):
    """A linear head of which every class is made from that class's examples, any number of them.

    ``w_c = gain P m_c + net([m_c, z])`` and ``b_c`` likewise without the first term, where m_c is
    the unit-length mean feature of the class and P the identity, or a matrix where the head reads
    another width than features have. The network's last layer starts at zero: the head is first
    that of the nearest class mean.

    Args:
        width: Length of a feature.
        latent: Length of z.
        hidden: Width of the network.
        reads: Width of the head.
        gain: Where the gain starts.
        scale: Factor of what the network returns.
    """

    def __init__(
        self, width: int, latent: int, hidden: int, reads: int, *, gain: float, scale: float
    ) -> None:
        super().__init__()
        self.scale = scale
        self.project = nn.Identity() if reads == width else nn.Linear(width, reads, bias=False)
        self.gain = nn.Parameter(torch.tensor(float(gain)))
        self.net = nn.Sequential(
            nn.Linear(width + latent, hidden), nn.GELU(), nn.Linear(hidden, reads + 1)
        )
        for parameter in self.net[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, means: Tensor, present: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Weight ``[T, C, reads]`` and bias ``[T, C]``; zeros for classes that are not present."""
        unit = F.normalize(means, dim=-1)
        more = self.scale * self.net(
            torch.cat([unit, z.unsqueeze(1).expand(-1, unit.shape[1], -1)], dim=-1)
        )
        weight = self.gain * self.project(unit) + more[..., :-1]
        here = present.to(weight.dtype)
        return weight * here.unsqueeze(-1), more[..., -1] * here


def class_means(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Means ``[T, C, D]`` of the classes, and bool ``[T, C]``: who has rows."""
    means, counts = ops.class_means(features, labels, classes)
    return means.to(features.dtype), counts > 0


def check_generated(found: Mapping[str, Tensor], layout: ParamLayout, tasks: int) -> None:
    """Raise unless what a generator returned fits the specification."""
    if not isinstance(found, Mapping):
        raise TypeError(
            f"the generator must return a mapping name -> [T, *shape], got {type(found).__name__}"
        )
    for name, value in found.items():
        if name not in layout.index:
            raise ValueError(
                f"the generator returned {name!r}, which the specification does not adapt; it "
                f"adapts, for example, {', '.join(layout.names[:3])}"
            )
        expected = (tasks, *layout.shapes[layout.index[name]])
        if not isinstance(value, Tensor) or tuple(value.shape) != expected:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the generator must return {list(expected)} for {name!r}, got {got}")


def _place(name: str) -> tuple[str, str]:
    """The layer's number in a parameter's name, empty where there is none, and the rest."""
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return (match[1], name.replace(match[0], ".*.", 1)) if match else ("", name)
