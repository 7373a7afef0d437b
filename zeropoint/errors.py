"""Every error a user can cause. Each message names the value, the limit and the remedy.

ZeropointError
├── UnknownNameError        a format, algorithm, kernel, task ... that is in no table
├── RecipeError             a recipe, scheme or option that contradicts itself
│   ├── UnusedRuleError     a rule that matches nothing
│   ├── GroupSizeError      a group size that does not divide the input dimension
│   └── CoverageError       less of the model would be quantized than the recipe promises
├── WeightError             a weight that cannot be stored in the format asked for
│   ├── NonFiniteError      NaN or Inf in a weight, or in what a model answers
│   └── ScaleRangeError     a value or scale outside what its storage dtype can hold
├── StateError              the model is not in the state the call needs (live, frozen, float)
├── SourceError             a model that cannot be found or loaded
│   └── StreamError         one that cannot be read weight by weight, only as a whole
├── CheckpointError         a checkpoint that is damaged, foreign, newer, or cannot be written
├── ClusterError            Ray is missing, cannot be reached, or lost a task too often
├── TextError               a prompt or text that is too short or too long
├── PlotError               nothing to draw, or nothing to draw it with
└── KernelError             the kernel asked for cannot run here
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZeropointError(Exception):
    """Base of all errors that zeropoint raises on purpose."""


class UnknownNameError(ZeropointError):
    """A name that is in no table."""


class RecipeError(ZeropointError):
    """A recipe, scheme or option that contradicts itself."""


class UnusedRuleError(RecipeError):
    """A rule that matches nothing."""


class GroupSizeError(RecipeError):
    """A group size that does not divide the input dimension."""


class CoverageError(RecipeError):
    """Less of the model would be quantized than the recipe promises."""


class WeightError(ZeropointError):
    """A weight that cannot be stored in the format asked for."""


class NonFiniteError(WeightError):
    """NaN or Inf in a weight, or in what a model answers."""


class ScaleRangeError(WeightError):
    """A value or scale outside what its storage dtype can hold."""


class StateError(ZeropointError):
    """The model is not in the state the call needs."""


class SourceError(ZeropointError):
    """A model that cannot be found or loaded."""


class StreamError(SourceError):
    """A model that cannot be read weight by weight, only as a whole."""


class CheckpointError(ZeropointError):
    """A checkpoint that is damaged, foreign, newer than this version, or cannot be written."""


class ClusterError(ZeropointError):
    """Ray is missing, cannot be reached, or lost a task too often, or has unlike nodes."""


class TextError(ZeropointError):
    """A prompt or text that is too short or too long."""


class PlotError(ZeropointError):
    """Nothing to draw, or nothing to draw it with."""


class KernelError(ZeropointError):
    """The kernel asked for cannot run here."""


_SHOWN = 24  # names in a message; every table of ours is shorter


def nearest(name: str, known: Iterable[str]) -> str:
    """What to print after an unknown name: the closest known ones, or all of them.

    >>> nearest("int9", ["int8", "nf4"])
    "close: 'int8'"
    >>> nearest("q", ["int8", "nf4"])
    "known: 'int8', 'nf4'"
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3)
    shown = ", ".join(repr(n) for n in (close or names)[:_SHOWN])
    more = "" if close or len(names) <= _SHOWN else f" ... ({len(names)} in all)"
    return f"{'close' if close else 'known'}: {shown}{more}"
