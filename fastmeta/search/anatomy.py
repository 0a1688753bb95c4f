"""Where a transformer keeps its layers, attention heads and feed-forward units."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

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
        heads: Attention heads, 0 where they cannot be told apart.
        head_size: Columns of one head.
        width: Feed-forward units, 0 where they were not found.
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
        ValueError: No stack of layers, or several.
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
    poolings = ("mean", "cls") if isinstance(model, SentenceClassifier) else ("model",)
    return Anatomy(
        stacks[0],
        tuple(_layer(model, f"{stacks[0]}.{i}", m) for i, m in enumerate(layers)),
        poolings,
    )


def _layer(model: nn.Module, name: str, layer: nn.Module) -> Layer:
    projections: tuple[str, ...] = ()
    output, heads, size = "", 0, 0
    for *qkv, out in _ATTENTIONS:
        linears = [_linear(layer, n) for n in (*qkv, out)]
        if all(linears):
            # Grouped keys and values belong to several heads: such heads stay together.
            if len({m.out_features for m in linears[:3]}) == 1:
                heads = model.config.num_attention_heads
                size = linears[0].out_features // heads
                projections, output = tuple(qkv), out
            break
    widening: tuple[str, ...] = ()
    narrowing, width = "", 0
    for ups, down in _FEED_FORWARDS:
        if all(_linear(layer, n) for n in (*ups, down)):
            widening, narrowing, width = ups, down, _linear(layer, down).in_features
            break
    return Layer(name, heads, size, width, projections, output, widening, narrowing)


def _linear(layer: nn.Module, name: str) -> nn.Linear | None:
    try:
        module = layer.get_submodule(name)
    except AttributeError:
        return None
    return module if type(module).forward is nn.Linear.forward else None
