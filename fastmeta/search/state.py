"""A search's state on disk: whole or not there, and checked before it is used."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmeta.search.errors import SearchError
from fastmeta.training.files import whole_file

NAME, VERSION = "search.pt", 2
_KEYS = {"version", "settings", "records", "controller", "cost"}


def checksum(tensors: Iterable[Tensor | object]) -> str:
    """Eight hexadecimal digits that tell tensors from others, by their values and shapes; what is
    no tensor, as the state of some quantised layers, does not count."""
    found = 0
    for t in tensors:
        if not isinstance(t, Tensor):
            continue
        found = zlib.crc32(f"{t.dtype}{tuple(t.shape)}".encode(), found)
        flat = t.detach().cpu().contiguous().flatten().view(torch.uint8)
        found = zlib.crc32(flat.numpy(), found)
    return f"{found:08x}"


def save_state(folder: Path, state: dict[str, Any]) -> Path:
    """Write the state, replacing the one before."""
    with whole_file(folder / NAME) as temporary:
        torch.save({"version": VERSION} | state, temporary)
    return folder / NAME


def load_state(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read a state.

    Args:
        folder: Of the search.
        settings: Of the search that is to go on, which must be those that it began with.

    Raises:
        SearchError: No state, a damaged one, or one of another search.
    """
    path = folder / NAME
    if not path.is_file():
        raise SearchError(f"{folder} holds no search to go on with: {NAME} is not there")
    try:
        state = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise SearchError(
            f"{path} is damaged and the search cannot go on ({reason}); begin anew in another "
            "folder, or with overwrite"
        ) from error
    if not isinstance(state, dict) or not state.keys() >= _KEYS or state["version"] != VERSION:
        raise SearchError(f"{path} is not the state of a search of this version of fastmeta")
    for key, value in settings.items():
        if state["settings"].get(key) != value:
            raise SearchError(
                f"{path} is of a search with {key}={state['settings'].get(key)!r}, got {value!r}"
            )
    return state
