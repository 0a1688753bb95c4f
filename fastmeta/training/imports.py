"""One task's adapted weights from a folder, as fast weights of a patched model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fastmeta.patching import ParamLayout, Patched, TaskParams
from fastmeta.training import peft_format
from fastmeta.training.checkpoint import read_pair
from fastmeta.training.errors import CheckpointError
from fastmeta.training.export import ABOUT, WEIGHTS


def import_task(patched: Patched, folder: str | Path) -> TaskParams:
    """Read the fast weights of one task that `export_task`, or PEFT for LoRA, wrote.

    Args:
        patched: The model that the task was adapted on, with the same specification: the names,
            shapes and LoRA scales of what adapts are compared; the weights that all tasks share
            are not in the folder.
        folder: With ``adapted.safetensors`` and ``fastmeta.json``, or ``adapter_model.safetensors``
            and ``adapter_config.json``.

    Returns:
        Fast weights of one task, in the model's dtype and on its device, for
        ``patched(params, ...)`` with inputs ``[1, N, ...]``. `fm.TaskParams.joined` puts those of
        several tasks into one batch.

    Raises:
        CheckpointError: A file is missing or damaged, or of another specification; says what
            differs.
    """
    folder = Path(folder)
    if (folder / peft_format.CONFIG).exists():
        config, tensors = read_pair(folder, peft_format.CONFIG, peft_format.WEIGHTS)
        try:
            weights, scales = peft_format.from_peft(patched, config, tensors)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None
    elif (folder / ABOUT).exists():
        about, weights = read_pair(folder, ABOUT, WEIGHTS)
        if not isinstance(about, Mapping):
            raise CheckpointError(f"{folder}: {ABOUT} is damaged (it holds {about!r})")
        scales = about.get("lora_scales", {})
    else:
        raise CheckpointError(
            f"{folder} holds no adapted weights: expected a folder with {ABOUT}, or with PEFT's "
            f"{peft_format.CONFIG}"
        )
    difference = _difference(patched, weights, scales)
    if difference is not None:
        raise CheckpointError(f"{folder} is of another model or specification: {difference}")
    initial = patched.slots.initial[0]
    ordered = [weights[name].to(initial) for name in patched.layout.names]
    return TaskParams(patched.layout, patched.layout.pack(ordered).unsqueeze(0))


def _difference(
    patched: Patched, weights: Mapping[str, Tensor], scales: Mapping[str, float]
) -> str | None:
    """What differs from the specification, as a clause, or None."""
    names = sorted(weights, key=lambda name: patched.layout.index.get(name, len(weights)))
    return patched.layout.difference(
        ParamLayout(names, [weights[name].shape for name in names], scales)
    )
