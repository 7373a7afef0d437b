"""Text that every Python has: the language's reference, by topic, in two halves that never mix."""

from __future__ import annotations

import hashlib
from pathlib import Path
from pydoc_data.topics import topics

from zeropoint.errors import TextError


def calibration_text() -> str:
    """Topics at even positions of the sorted names, joined by blank lines. For calibration only."""
    return "\n\n".join(topics[name] for name in sorted(topics)[0::2])


def evaluation_text() -> str:
    """Topics at odd positions of the sorted names, joined by blank lines. For evaluation only."""
    return "\n\n".join(topics[name] for name in sorted(topics)[1::2])


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises TextError when it cannot be read or is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TextError(f"{path} cannot be read as UTF-8 text: {e}") from e
    if not text.strip():
        raise TextError(f"{path} is empty")
    return text


def fingerprint(text: str) -> str:
    """First 16 hex digits of the text's SHA-256: two results with the same one saw the same
    text.
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]
