"""Checkpoints: one folder with ``tensors.safetensors`` and ``state.json``, never pickle."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmeta.training.errors import CheckpointError
from fastmeta.training.files import whole_folder
from fastmeta.training.trees import apart, pack, unpack

TENSORS, STATE = "tensors.safetensors", "state.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d+)")
_SAMPLES = 64  # entries of a frozen weight that its fingerprint reads


def write_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write ``folder/step-N`` whole or not at all, and keep the newest `keep` checkpoints.

    Args:
        folder: Where checkpoints are.
        step: N.
        state: Nested state of tensors and JSON values.
        keep: Number of checkpoints to keep, at least 1.

    Returns:
        The new checkpoint's folder.
    """
    tensors: dict[str, Tensor] = {}
    tree = {"format": FORMAT, "step": step, **pack(state, "state", tensors)}
    target = folder / f"step-{step:08d}"
    with whole_folder(target) as temporary:
        save_file(apart(tensors), temporary / TENSORS)
        text = json.dumps(tree, indent=1, allow_nan=False)
        (temporary / STATE).write_text(text, encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in found if _NAME.fullmatch(p.name)), key=step_of)


def remove_later(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for checkpoint in list_checkpoints(folder):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def holds_run(folder: Path) -> bool:
    """Whether a folder has checkpoints in it: a run without any cannot go on."""
    return bool(list_checkpoints(folder / "checkpoints"))


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that `path` is, or the newest one of the run whose folder it is.

    Raises:
        CheckpointError: There is none.
    """
    path = Path(path)
    if (path / STATE).exists() or (path / TENSORS).exists():
        return path
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        what = "holds no checkpoint" if path.is_dir() else "is no folder"
        raise CheckpointError(
            f"{path} {what}: expected a run's folder, or a checkpoint with {TENSORS} and {STATE}"
        )
    return found[-1]


def read_pair(folder: Path, state: str, tensors: str) -> tuple[Any, dict[str, Tensor]]:
    """Read a JSON file and a safetensors file of a folder, tensors on the CPU.

    Raises:
        CheckpointError: One of them is missing, truncated or damaged.
    """
    tree = _read_json(folder, state)
    try:
        return tree, load_file(folder / tensors)
    except OSError as error:
        raise _unreadable(folder, tensors, error) from None
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: {tensors} is truncated or damaged ({error})") from None


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(folder, name, error) from None
    except ValueError as error:  # of json and of decoding
        raise CheckpointError(f"{folder}: {name} is damaged ({error})") from None


def _unreadable(folder: Path, name: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{folder}: {name} cannot be read ({error.strerror or error})")


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's state, tensors on the CPU.

    Raises:
        CheckpointError: A file is missing, truncated or damaged, or of another format.
    """
    tree, tensors = read_pair(folder, STATE, TENSORS)
    _check_format(tree, folder)
    try:
        return unpack(tree, tensors)
    except KeyError as error:
        raise CheckpointError(f"{folder}: {TENSORS} lacks {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The `config` that a trainer keeps in its checkpoints, without reading any tensor.

    Raises:
        CheckpointError: As for :func:`read_checkpoint`.
    """
    tree = _read_json(folder, STATE)
    _check_format(tree, folder)
    return unpack(tree.get("config"), {})


def _check_format(tree: Any, folder: Path) -> None:
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        got = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
        raise CheckpointError(f"{folder}: expected a checkpoint of format {FORMAT}, got {got!r}")


def fingerprint(learner: nn.Module) -> dict[str, Any]:
    """Describe the model behind a learner, so that a checkpoint can tell it from another.

    Frozen weights are not stored in checkpoints; a few entries of each are hashed.
    """
    embedding = getattr(learner, "embedding", None)  # of a metric learner
    patched = getattr(learner if embedding is None else embedding, "patched", None)
    model = getattr(patched, "model", learner if embedding is None else embedding.source)
    learned = {id(p) for p in learner.parameters()}
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) in learned:
            continue
        flat = parameter.detach().flatten()
        stride = max(1, flat.numel() // _SAMPLES)
        sample = flat[::stride][:_SAMPLES].to("cpu", torch.float64)
        sha.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        sha.update(sample.numpy().tobytes())
    return {
        "learner": type(learner).__name__,
        "model": type(model).__name__,
        "adapts": repr(patched.spec) if patched is not None else None,
        "frozen weights": sha.hexdigest()[:16],
    }


def check_fingerprint(saved: dict[str, Any], own: dict[str, Any], folder: Path) -> None:
    """Raise a CheckpointError unless both describe the same model and specification."""
    for key, value in own.items():
        if saved.get(key) == value:
            continue
        if key == "frozen weights":
            raise CheckpointError(f"{folder} is of another model: its frozen weights differ")
        raise CheckpointError(
            f"{folder} is of another {'specification' if key == 'adapts' else key}: "
            f"expected {value}, got {saved.get(key)}"
        )


def load_learner(learner: nn.Module, state: dict[str, Any], folder: Path) -> None:
    """Copy the meta-parameters of a checkpoint into `learner`.

    Args:
        state: From `read_checkpoint`.
        folder: The checkpoint's folder, for messages.

    Raises:
        CheckpointError: The checkpoint is of another model or specification.
    """
    check_fingerprint(state["fingerprint"], fingerprint(learner), folder)
    try:
        learner.load_state_dict(state["meta"])
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
