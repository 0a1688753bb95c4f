"""Write a winner: a smaller transformers checkpoint, and its recipe for `fastmeta train`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from fastmeta.models import SentenceClassifier
from fastmeta.search.custom_code import write_code
from fastmeta.search.evaluation import Evaluator
from fastmeta.search.healing import heal
from fastmeta.search.proposal import Proposal
from fastmeta.search.pruning import prune, why_not_stock
from fastmeta.search.space import Space
from fastmeta.training.export import check_new, quiet_transformers
from fastmeta.training.files import check_writable, whole_folder

RECIPE, ABOUT = "recipe.yaml", "search.json"


def export(
    evaluator: Evaluator,
    proposal: Proposal,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    overwrite: bool = False,
    **healing: Any,
) -> Path:
    """Write a candidate to a new folder, whole or not at all.

    The folder is a transformers checkpoint without the layers, heads and units that the candidate
    does not have. Depth and one feed-forward width for all layers are part of every configuration,
    the number of heads of those that name the size of a head (Llama, Qwen, Mistral, ...), and then
    ``from_pretrained`` of the stock class loads it. Other shapes (per-layer widths, fewer heads in
    BERT) come with a short ``modeling_pruned.py``, by which ``from_pretrained(folder,
    trust_remote_code=True)`` of `AutoModel` and `AutoModelForSequenceClassification` loads them.

    ``recipe.yaml`` is a configuration that ``fastmeta train --config`` takes; ``search.json`` has
    every decision.

    Args:
        evaluator: Of the search.
        proposal: The candidate.
        folder: Must not exist, or be empty, but for `overwrite`.
        tokenizer: Written beside the model, where given.
        texts: Where given, what is left of the model first learns to give the whole model's states
            on these, see `fm.search.heal`; `tokenizer` is needed.
        overwrite: Whether a folder that holds something is replaced, once the new one is complete.
        **healing: Settings of `fm.search.heal`.

    Returns:
        The folder.

    Raises:
        FileExistsError: `folder` holds something, without `overwrite`.
        ValueError: `texts` without a tokenizer, or `healing` without texts.
    """
    folder = check_writable(folder) if overwrite else check_new(folder)
    if texts is not None and tokenizer is None:
        raise ValueError("healing on texts needs their tokenizer, got tokenizer=None")
    if healing and texts is None:
        raise ValueError(f"{', '.join(healing)}: settings of healing, which needs texts, got none")
    space = evaluator.space
    model = prune(evaluator.net.model, space.anatomy, proposal)
    if texts is not None:
        heal(model, space.model, texts, tokenizer, **healing)
    reason = why_not_stock(space.model, space.anatomy, proposal.shape)
    with whole_folder(folder) as temporary:
        with quiet_transformers():
            model.save_pretrained(temporary)
        if reason is not None:
            write_code(model, space.anatomy, proposal, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        lines = [f"# {proposal}"]
        if proposal.batch_size is not None:
            lines.append(
                f"# found with batches of {proposal.batch_size} support texts per inner step; "
                "fastmeta train reads all of them"
            )
        table = yaml.safe_dump(recipe(space, model, proposal, folder), sort_keys=False)
        (temporary / RECIPE).write_text("\n".join([*lines, table]), encoding="utf-8")
        about = {"decisions": dict(proposal.decisions), "needs_code": reason}
        (temporary / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return folder


def recipe(space: Space, model: nn.Module, proposal: Proposal, folder: Path) -> dict[str, Any]:
    """A candidate as keys of a configuration of `fastmeta train`.

    Args:
        space: Of the candidate.
        model: The candidate's own model.
        folder: Where the model is written.
    """
    kept = [i for i, k in enumerate(proposal.kept) if k]
    stack = space.anatomy.stack
    by_rank: dict[int, list[str]] = {}
    for target, modules in space.targets.items():
        for name in modules:
            layer = space.layer_of(name)
            if proposal.ranks[target] and layer in proposal.adapted:
                own = name.replace(f"{stack}.{layer}.", f"{stack}.{kept.index(layer)}.")
                by_rank.setdefault(proposal.ranks[target], []).append(own)
    terms = [
        f"lora:r={rank},alpha={space.lora_scale * rank:g},targets={'+'.join(names)}"
        for rank, names in by_rank.items()
    ]
    found: dict[str, Any] = {"model": str(folder.resolve())}
    if isinstance(model, SentenceClassifier):
        found |= {"pooling": "mean", "pooling_scale": model.scale}  # the saved head says which
    return found | {
        "ways": int(model.config.num_labels),
        "method": "maml",
        "spec": [*terms, "head"],
        "inner_steps": proposal.steps,
        "inner_lr": float(proposal.lr),
        "inner_optimizer": proposal.optimizer,
        "inner_weight_decay": float(proposal.weight_decay),
    }
