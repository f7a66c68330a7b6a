"""What counts when texts are compared: Unicode NFC, and white space only where it parts something.

Runs of ASCII white space (space, tab, line feed, carriage return, vertical tab, form feed) are one space, and there
is none at a text's ends.
"""

from __future__ import annotations

from unicodedata import normalize

from finetune.dataset.rules import Turn


def normalized(text: str) -> bytes:
    """The text in NFC as UTF-8, with white space folded."""
    return b" ".join(_composed(text).split())


def content_key(turns: list[Turn]) -> tuple[bytes, bytes]:
    """A record's normalised content and prompt, to be hashed.

    The content is role and text of all turns, whatever the record's format; NUL, which no record may
    hold, stands between them. The prompt is the first user turn, or all of a plain text.
    """
    content = b" ".join(_composed("\0".join([part for turn in turns for part in turn])).split())
    parts = content.split(b"\0")
    if b" \0" in content or b"\0 " in content:
        parts = [part.strip() for part in parts]
    return key_of_parts(turns, parts)


def key_of_parts(turns: list[Turn], parts: list[bytes]) -> tuple[bytes, bytes]:
    """`content_key` of turns whose roles and texts, one after the other, are normalised."""
    asked = 0
    while turns[asked][0] not in ("user", "text"):
        asked += 1
    return b"\0".join(parts), parts[2 * asked + 1]


def _composed(text: str) -> bytes:
    return (text if text.isascii() else normalize("NFC", text)).encode()
