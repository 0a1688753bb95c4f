"""One task's adapted weights as files: a PEFT folder for LoRA, else safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from fastmeta.patching import Head, Patched, TaskParams
from fastmeta.training.files import whole_folder

WEIGHTS, ABOUT = "adapted.safetensors", "fastmeta.json"


def export_task(
    patched: Patched,
    params: TaskParams,
    folder: str | Path,
    *,
    labels: Sequence[str] = (),
    base: str | None = None,
    tokenizer: Any = None,
    details: Mapping[str, Any] | None = None,
    task: int = 0,
) -> str:
    """Write one task's adapted weights to a new folder, whole or not at all.

    With LoRA in the specification the folder is one that ``peft.PeftModel.from_pretrained`` reads:
    low-rank factors, and the head and every other adapted module in ``modules_to_save``. Without,
    or where a soft prefix or a module is adapted in both ways, ``adapted.safetensors`` holds the
    parameters by their names in the model. ``fastmeta.json`` says what is what.

    Args:
        patched: The model.
        params: Fast weights of T tasks.
        folder: Must not exist, or be empty.
        labels: Class names in the order of the logits.
        base: Name or folder of the model as it was loaded; None writes the model itself to
            ``folder/base``, as is needed where its shared weights were trained.
        tokenizer: Written beside the model in ``folder/base``, where given.
        details: JSON values to keep in ``fastmeta.json``, too.
        task: Which of the T tasks.

    Returns:
        ``"peft"`` or ``"safetensors"``.

    Raises:
        FileExistsError: `folder` holds something.
    """
    folder = check_new(folder)
    weights = {n: t.detach().cpu().contiguous().clone() for n, t in params.task(task).items()}
    peft = _as_peft(patched, weights)
    source = str(folder.resolve() / "base") if base is None else base
    about = {
        "format": "safetensors" if peft is None else "peft",
        "base_model": source,
        "model_class": type(patched.model).__name__,
        "spec": repr(patched.spec),
        "labels": list(labels),
        **(details or {}),
    }
    with whole_folder(folder) as temporary:
        if base is None:
            with quiet_transformers():
                patched.model.save_pretrained(temporary / "base")
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary / "base")
        if peft is None:
            save_file(weights, temporary / WEIGHTS)
        else:
            config, tensors = peft
            save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
            _write_json(
                temporary / "adapter_config.json", config | {"base_model_name_or_path": source}
            )
        _write_json(temporary / ABOUT, about)
    return about["format"]


def export_state(
    model: nn.Module,
    params: TaskParams,
    added: Mapping[str, Tensor],
    folder: str | Path,
    *,
    labels: Sequence[str] = (),
    base: str | None = None,
    tokenizer: Any = None,
    details: Mapping[str, Any] | None = None,
    task: int = 0,
) -> str:
    """Write what one task's support set became to a new folder, whole or not at all.

    ``adapted.safetensors`` holds a metric learner's tensors (for example ``prototypes``) and, under
    their names, the parameters that it adds to the model.

    Args:
        model: The user's model, written to ``folder/base`` unless `base` names it.
        params: What T support sets became, from ``learner.adapt`` or ``out.params``.
        added: Further tensors by name.
        folder, labels, base, tokenizer, details, task: As for `export_task`.

    Returns:
        ``"safetensors"``.

    Raises:
        FileExistsError: `folder` holds something.
    """
    folder = check_new(folder)
    tensors = {**params.task(task), **added}
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    about = {
        "format": "safetensors",
        "base_model": str(folder.resolve() / "base") if base is None else base,
        "model_class": type(model).__name__,
        "labels": list(labels),
        **(details or {}),
    }
    with whole_folder(folder) as temporary:
        if base is None:
            with quiet_transformers():
                model.save_pretrained(temporary / "base")
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary / "base")
        save_file(tensors, temporary / WEIGHTS)
        _write_json(temporary / ABOUT, about)
    return "safetensors"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bar for loading and saving, and no report of a head that is new, as it must be."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def check_new(folder: str | Path) -> Path:
    """Return the path of a folder that does not exist yet or is empty.

    Raises:
        FileExistsError: It holds something.
    """
    path = Path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already: expected a new or an empty folder")
    return path


def _as_peft(
    patched: Patched, weights: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """PEFT's configuration and tensors, or None where PEFT has no way to say it."""
    owners = patched.slots.owners
    lora = {n: a for n, a in owners.items() if "lora_A" in a.slots}
    mixed = any(len(adapted.slots) > 2 for adapted in lora.values())
    if not lora or mixed or patched.slots.prefixes:
        return None
    saved = _modules_to_save(patched.model, [n for n in owners if n not in lora])
    if any(n == s or n.startswith(s + ".") for n in lora for s in saved):
        return None
    ranks = {n: weights[f"{n}.lora_A"].shape[0] for n in lora}
    alphas = {n: a.lora_scale * ranks[n] for n, a in lora.items()}
    first = next(iter(lora))
    modules = dict(patched.model.named_modules())
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": isinstance(modules[first], Conv1D),
        "target_modules": list(lora),
        "modules_to_save": saved or None,
        "rank_pattern": {n: r for n, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alphas[first]},
    }
    tensors = {}
    for name in lora:
        for factor in ("lora_A", "lora_B"):
            tensors[f"base_model.model.{name}.{factor}.weight"] = weights[f"{name}.{factor}"]
    for name in saved:
        for key, value in modules[name].state_dict(prefix=f"{name}.").items():
            value = weights.get(key, value).detach().cpu().contiguous().clone()
            tensors[f"base_model.model.{key}"] = value
    return config, tensors


def _modules_to_save(model: nn.Module, adapted: list[str]) -> list[str]:
    """The head, which is new in every model, and the modules of other adapted parameters."""
    try:
        head = {r.name.split(".")[0] for r in Head().resolve(model)}
    except ValueError:  # a model without a head
        head = set()
    return sorted(head | {n for n in adapted if n.split(".")[0] not in head})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
