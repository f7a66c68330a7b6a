"""What counts when texts are compared: Unicode NFC, and white space only where it parts something.

Runs of ASCII white space (space, tab, line feed, carriage return, vertical tab, form feed) are one space, and there
is none at a text's ends.
"""

from __future__ import annotations

from collections.abc import Callable
from unicodedata import normalize

from finetune.dataset.rules import Turn


def normalized(text: str) -> bytes:
    """The text in NFC as UTF-8, with white space folded."""
    return b" ".join((text if text.isascii() else normalize("NFC", text)).encode().split())


def content_key(turns: list[Turn], normal: Callable[[str], bytes] = normalized) -> tuple[bytes, bytes]:
    """A record's normalised content and prompt, to be hashed.

    The content is role and text of all turns, whatever the record's format; NUL, which no record may
    hold, stands between them. The prompt is the first user turn, or all of a plain text.

    Args:
        turns: the record's.
        normal: gives `normalized` of a text.
    """
    parts = []
    for role, text in turns:
        parts.append(role.encode())
        parts.append(normal(text))
    asked = 0
    while turns[asked][0] not in ("user", "text"):
        asked += 1
    return b"\0".join(parts), parts[2 * asked + 1]
