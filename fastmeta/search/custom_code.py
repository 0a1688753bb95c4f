"""Checkpoints of shapes that no stock configuration describes: with a class of their own."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from fastmeta.models import SentenceClassifier
from fastmeta.search.anatomy import Anatomy
from fastmeta.search.proposal import Proposal

MODULE = "modeling_pruned"

_CODE = '''"""{name} with fewer heads or units in some layers; written by fastmeta."""

from torch import nn
from transformers import {name}


class Pruned{name}({name}):
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for name, (rows, columns) in config.pruned_linears.items():
            old = self.get_submodule(name)
            new = nn.Linear(columns, rows, bias=old.bias is not None)
            parent, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(parent), leaf, new)
'''


def write_code(model: nn.Module, anatomy: Anatomy, proposal: Proposal, folder: Path) -> None:
    """Add to a saved checkpoint the class that gives its linear layers their sizes.

    Args:
        model: As saved, with linear modules of their real sizes.
        anatomy: Of the whole model.
        proposal: The candidate.
        folder: Where it was saved.
    """
    saved = model.encoder if isinstance(model, SentenceClassifier) else model
    auto = "AutoModel" if saved is not model else "AutoModelForSequenceClassification"
    prefix = anatomy.stack.removeprefix("encoder.") if saved is not model else anatomy.stack
    names = set()
    for layer in anatomy.layers:
        names |= set(layer.linears)
    sizes = {}
    for number in range(sum(proposal.kept)):
        for name in sorted(names):
            full = f"{prefix}.{number}.{name}"
            sizes[full] = list(saved.get_submodule(full).weight.shape)
    name = type(saved).__name__
    (folder / f"{MODULE}.py").write_text(_CODE.format(name=name), encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"auto_map": {auto: f"{MODULE}.Pruned{name}"}, "pruned_linears": sizes}
    config["architectures"] = [f"Pruned{name}"]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
