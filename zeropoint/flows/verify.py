"""Is a checkpoint what was written, and is it of the model it should be of?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from zeropoint.checkpoints import foreign, native
from zeropoint.errors import CheckpointError
from zeropoint.flows.against import Likeness, likeness
from zeropoint.progress import OnStep, no_progress

CHECKED = (
    "manifest",
    "size and SHA-256 of every file",
    "presence, shape and dtype of every tensor",
    "scales are positive and every float is finite",
    "recipe",
)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found. method: whose format it is. problems: in words; none when it is sound.
    checked, unchecked: what was looked at, and what could not be. known: whether the method is;
    of another one hardly anything can be said. files, tensors: how many there are, a quantized
    weight of ours being one; None where the manifest is too damaged. likeness: to the source, where
    one was given and the checkpoint is sound.
    """

    method: str
    problems: tuple[str, ...]
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]
    files: int | None
    tensors: int | None
    known: bool = True
    likeness: Likeness | None = None

    @property
    def sound(self) -> bool | None:
        """Whether no problem was found; None when that says nothing, as the method is unknown."""
        return False if self.problems else self.known or None

    @property
    def not_checked(self) -> tuple[str, ...]:
        """What could not be looked at, as people read it."""
        return tuple(f"not checked: {what}" for what in self.unchecked)


def verify(
    path: str | Path, *, against: str | Path | None = None, on_step: OnStep = no_progress
) -> list[str]:
    """Every problem of a checkpoint, in words; an empty list when it is sound.

    Of a zeropoint checkpoint: manifest, sizes and SHA-256 of all files, files nobody listed, every
    tensor's presence, shape and dtype, scales and other floats finite, scales positive, the
    configuration's recipe. Of another library's: what `examine` says; of a method that nobody here
    knows also what was not checked, so that the list is not empty. against: the float model it
    was made of, as `zp.compress` takes it: nothing is missing, every weight is as near to its
    source as its scheme and algorithm bring it, every other tensor has its bits.
    Raises CheckpointError (no quantized checkpoint; against= of another library's), SourceError,
    StreamError.
    """
    found = examine(path, against=against, on_step=on_step)
    return [*found.problems, *(() if found.known else found.not_checked)]


def examine(
    path: str | Path, *, against: str | Path | None = None, on_step: OnStep = no_progress
) -> Verification:
    """As `verify`, with what was checked and what was not."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    if not native.is_checkpoint(path) and foreign.method_of(path) is not None:
        return _foreign(path, against, on_step)
    problems = native.verify(path, on_step=on_step)
    alike = None
    if against is not None and not problems:
        alike = likeness(path, against, on_step=on_step)
        problems = list(alike.problems)
    files, tensors = _sizes(path / native.MANIFEST)
    return Verification(
        method=native.QUANT_METHOD,
        problems=tuple(problems),
        checked=CHECKED if alike is None else (*CHECKED, f"every tensor against {against}"),
        unchecked=() if alike is None or not alike.balanced else (_BALANCED,),
        files=files,
        tensors=tensors,
        likeness=alike,
    )


_BALANCED = "norms and biases that the algorithm balanced with the layers behind them"


def _foreign(path: Path, against: str | Path | None, on_step: OnStep) -> Verification:
    if against is not None:
        raise CheckpointError(
            f"{path} is of {foreign.method_of(path)}; only zeropoint checkpoints can be compared "
            f"with their source ({against}); leave against out (--against)"
        )
    found = foreign.verify(path, on_step=on_step)
    return Verification(
        method=found.method,
        problems=found.problems,
        checked=found.checked,
        unchecked=found.unchecked,
        files=found.files,
        tensors=found.tensors,
        known=found.known,
    )


def _sizes(manifest: Path) -> tuple[int | None, int | None]:
    """Numbers of files and tensors that the manifest lists; None where it is too damaged."""
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))
        return len(listed["files"]), len(listed["weights"]) + len(listed["tensors"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, None
