"""One task's adapted weights as a folder: PEFT's for LoRA, else safetensors and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from fastmeta.engine.adaptation import Adapted
from fastmeta.models import SentenceClassifier
from fastmeta.patching import Patched, TaskParams
from fastmeta.training import peft_format
from fastmeta.training.files import whole_folder
from fastmeta.training.trees import apart

WEIGHTS, ABOUT = "adapted.safetensors", "fastmeta.json"


def export_task(
    patched: Patched,
    params: TaskParams | Adapted,
    folder: str | Path,
    *,
    labels: Sequence[str] = (),
    base: str | None = None,
    tokenizer: Any = None,
    details: Mapping[str, Any] | None = None,
    task: int = 0,
) -> str:
    """Write one task's adapted weights to a new folder, whole or not at all.

    With LoRA in the specification the folder is one that ``peft.PeftModel.from_pretrained`` and
    ``peft.AutoPeftModelFor...`` read: low-rank factors, and in ``modules_to_save`` every other
    adapted module, and a head that `base` lacks. Of a `fm.models.SentenceClassifier` they want
    ``num_labels=`` and ``import_allowlist=["fastmeta.models"]``, too. Without LoRA, or where a soft
    prefix or a module is adapted in both ways, ``adapted.safetensors`` holds the parameters by
    their names in the model. ``fastmeta.json`` says what is what; `import_task` reads either.

    Args:
        patched: The model.
        params: Fast weights of T tasks, or what `fm.adapt` returned.
        folder: Must not exist, or be empty.
        labels: Class names in the order of the logits; logits beyond them are of no class, and
            readers leave them out.
        base: Name or folder of the model as it was loaded, where that holds every weight but those
            adapted and those of a classifier's new head (whose ``num_labels=`` is then given to
            ``AutoPeftModelFor...``, too). None writes the model itself to ``folder/base``, as is
            needed where its shared weights were trained; so is a `fm.models.SentenceClassifier`
            whose scale or pooling is not what loading `base` gives it.
        tokenizer: Written beside the model in ``folder/base``, where given.
        details: JSON values to keep in ``fastmeta.json``, too.
        task: Which of the T tasks.

    Returns:
        ``"peft"`` or ``"safetensors"``.

    Raises:
        FileExistsError: `folder` holds something.
        IndexError: There is no such task.
        ValueError: `params` are of another model or specification, or more labels than classes.
    """
    folder = check_new(folder)
    if isinstance(params, Adapted):
        params = params.params
    patched.check_params(params)
    outputs = getattr(getattr(patched.model, "config", None), "num_labels", len(labels))
    if len(labels) > outputs:
        raise ValueError(f"the model tells {outputs} classes apart, got {len(labels)} labels")
    weights = params.task(task)
    if base is not None and not names_all(patched.model, base):
        base = None
    peft = peft_format.to_peft(patched, weights, named_base=base is not None)
    about = _about(patched.model, folder, base, labels, details) | {
        "format": "safetensors" if peft is None else "peft",
        "spec": repr(patched.spec),
        "lora_scales": patched.layout.scales,
    }
    with whole_folder(folder) as temporary:
        if base is None:
            write_base(patched.model, tokenizer, temporary)
        if peft is None:
            save_file(apart(weights), temporary / WEIGHTS)
        else:
            config, tensors = peft
            save_file(apart(tensors), temporary / peft_format.WEIGHTS, {"format": "pt"})
            source = {"base_model_name_or_path": about["base_model"]}
            _write_json(temporary / peft_format.CONFIG, config | source)
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
    tensors = {**added, **params.task(task)}
    about = _about(model, folder, base, labels, details) | {"format": "safetensors"}
    with whole_folder(folder) as temporary:
        if base is None:
            write_base(model, tokenizer, temporary)
        save_file(apart(tensors), temporary / WEIGHTS)
        _write_json(temporary / ABOUT, about)
    return "safetensors"


def names_all(model: nn.Module, base: str) -> bool:
    """Whether loading `base` gives a classifier of ours the settings that are no weights."""
    if not isinstance(model, SentenceClassifier):
        return True
    folder = Path(base).expanduser()
    scale, pooling = SentenceClassifier.saved_settings(folder if folder.is_dir() else base)
    # a head's file has its scale in float32
    return pooling == model.pooling and math.isclose(scale, model.scale, rel_tol=1e-6)


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


def _about(
    model: nn.Module,
    folder: Path,
    base: str | None,
    labels: Sequence[str],
    details: Mapping[str, Any] | None,
) -> dict[str, Any]:
    if base is None:
        base = str(folder.resolve() / "base")
    elif Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().resolve())  # for readers that run elsewhere
    about = {"base_model": base, "model_class": type(model).__name__, "labels": list(labels)}
    return about | dict(details or {})


def write_base(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write the model, and a tokenizer where given, to ``folder/base``."""
    with quiet_transformers():
        model.save_pretrained(folder / "base")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "base")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
