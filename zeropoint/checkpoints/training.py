"""The state of a training run in one file: tensors, and what else there is to say as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zeropoint.errors import CheckpointError

FILE = "training.safetensors"
_STATE = "zeropoint_training"


def make_folder(folder: Path) -> None:
    """The folder for a run's state. Raises CheckpointError when there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CheckpointError(f"{folder} cannot be made: {e.strerror}") from e


def write_state(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Replace the state in a folder in one step: a kill at any moment leaves the old or the new.

    state: JSON data. Raises CheckpointError when it cannot be written.
    """
    temporary = folder / f".{FILE}.partial"
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            temporary,
            {_STATE: json.dumps(state)},
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(folder / FILE)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{folder / FILE} cannot be written: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `write_state` wrote there, None when there is nothing. Raises CheckpointError."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = json.loads((file.metadata() or {})[_STATE])
            return {name: file.get_tensor(name) for name in file.keys()}, state
    except (OSError, SafetensorError, KeyError, ValueError) as e:
        raise CheckpointError(
            f"{path} is not the state of a training run ({e}); start over with fresh=True "
            "(--fresh), or choose another folder"
        ) from e
