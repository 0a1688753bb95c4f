"""Where a transformer keeps its layers, attention heads and feed-forward units."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from fastmeta.models import SentenceClassifier

# Relative names of query, key, value, output, by family; and of what widens, and what narrows.
_ATTENTIONS = (
    (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ),
    ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
)
_FEED_FORWARDS = (
    (("intermediate.dense",), "output.dense"),
    (("ffn.lin1",), "ffn.lin2"),
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("fc1",), "fc2"),
)


@dataclass(frozen=True)
class Layer:
    """One layer; module names are relative to it.

    Attributes:
        name: Its name in the model.
        heads: Attention heads, 0 where they cannot be told apart or not be exchanged.
        head_size: Columns of one head.
        width: Feed-forward units, 0 where they were not found or not be exchanged.
        projections: Query, key, value: their outputs are divided by heads.
        output: Reads the heads.
        widening: Their outputs are the units.
        narrowing: Reads the units.
    """

    name: str
    heads: int
    head_size: int
    width: int
    projections: tuple[str, ...] = ()
    output: str = ""
    widening: tuple[str, ...] = ()
    narrowing: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of its known linear modules."""
        names = (*self.projections, self.output, *self.widening, self.narrowing)
        return tuple(dict.fromkeys(n for n in names if n))

    def sizes(self, heads: int, width: int) -> dict[str, tuple[int | None, int | None]]:
        """Module -> (rows, columns) of its weight that are left; None for all of them."""
        found: dict[str, tuple[int | None, int | None]] = {}
        if heads < self.heads:
            found |= {n: (heads * self.head_size, None) for n in self.projections}
            found[self.output] = (None, heads * self.head_size)
        if width < self.width:
            found |= {n: (width, None) for n in self.widening}
            found[self.narrowing] = (None, width)
        return found


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model that a search may change.

    Attributes:
        stack: Name of the module list that holds the layers.
        layers: From the bottom.
        poolings: What may summarise the token states, the model's own first.
    """

    stack: str
    layers: tuple[Layer, ...]
    poolings: tuple[str, ...]


def anatomy_of(model: nn.Module) -> Anatomy:
    """Find the layers of a classifier.

    Raises:
        ValueError: No stack of layers, several, or something more between the layers.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    stacks = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == count and len({type(x) for x in m}) == 1
    ]
    stacks = [s for s in stacks if not any(s != o and s.startswith(o + ".") for o in stacks)]
    if len(stacks) != 1:
        raise ValueError(
            f"a search needs a model with one stack of layers, as BERT or Llama have, and "
            f"{type(model).__name__} has {len(stacks)}"
        )
    layers = model.get_submodule(stacks[0])
    if getattr(model.get_submodule(stacks[0].rpartition(".")[0]), "conv", None) is not None:
        raise ValueError(
            f"a search needs a model whose layers follow one another, and {type(model).__name__} "
            "has a convolution between them"
        )
    poolings = ("mean", "cls") if isinstance(model, SentenceClassifier) else ("model",)
    return Anatomy(
        stacks[0],
        tuple(_layer(model, f"{stacks[0]}.{i}", m) for i, m in enumerate(layers)),
        poolings,
    )


def matrices(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (outputs, inputs) of every linear map in a module, of GPT-2's kind too."""
    found = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            found[name] = (part.out_features, part.in_features)
        elif isinstance(part, Conv1D):
            found[name] = (part.weight.shape[1], part.weight.shape[0])
    return found


def _layer(model: nn.Module, name: str, layer: nn.Module) -> Layer:
    projections: tuple[str, ...] = ()
    output, heads, size = "", 0, 0
    for *qkv, out in _ATTENTIONS:
        linears = [_linear(layer, n) for n in (*qkv, out)]
        if all(linears):
            projections, output = tuple(qkv), out
            size = _head_size(model, layer.get_submodule(qkv[0].rpartition(".")[0]))
            rows = linears[0].out_features
            # Grouped keys and values belong to several heads: such heads stay together.
            alike = all(m.out_features == rows for m in linears[:3]) and rows % size == 0
            if alike and not _tied(layer, (*qkv, out), {rows // size, rows}):
                heads = rows // size
            break
    widening: tuple[str, ...] = ()
    narrowing, width = "", 0
    for ups, down in _FEED_FORWARDS:
        if all(_linear(layer, n) for n in (*ups, down)):
            widening, narrowing = ups, down
            units = _linear(layer, down).in_features
            width = 0 if _tied(layer, (*ups, down), {units}) else units
            break
    return Layer(name, heads, size, width, projections, output, widening, narrowing)


def _head_size(model: nn.Module, attention: nn.Module) -> int:
    """Columns of a head; their number may be smaller than the configuration says, if pruned."""
    config = model.config
    for owner, name in ((attention, "attention_head_size"), (attention, "head_dim")):
        if isinstance(getattr(owner, name, None), int):
            return getattr(owner, name)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _tied(layer: nn.Module, names: tuple[str, ...], sizes: set[int]) -> bool:
    """Whether the module around the first of these has other parameters of one of these sizes.

    They may belong to single heads or units, as those of a norm over all heads do, which then
    can neither change places nor be left out.
    """
    around = names[0].rpartition(".")[0]
    if not around or 1 in sizes:
        return False
    return any(
        sizes & set(p.shape) and f"{around}.{name}".rpartition(".")[0] not in names
        for name, p in layer.get_submodule(around).named_parameters()
    )


def _linear(layer: nn.Module, name: str) -> nn.Linear | None:
    try:
        module = layer.get_submodule(name)
    except AttributeError:
        return None
    return module if type(module).forward is nn.Linear.forward else None
