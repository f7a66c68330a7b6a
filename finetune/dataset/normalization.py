"""What counts when texts are compared: Unicode NFC, and white space only where it parts something.

Runs of ASCII white space (space, tab, line feed, carriage return, vertical tab, form feed) are one space, and there
is none at a text's ends.
"""

from __future__ import annotations

from unicodedata import normalize

from finetune.dataset.rules import Turn

_AS_SPACES = bytes.maketrans(b"\t\n\r\x0b\x0c", b" " * 5)


def normalized(text: str) -> bytes:
    """The text in NFC as UTF-8, with white space folded."""
    folded = (text if text.isascii() else normalize("NFC", text)).encode().translate(_AS_SPACES)
    # Most texts have few runs: to halve them as often as need be takes a tenth of the time of splitting at each space.
    while b"  " in folded:
        folded = folded.replace(b"  ", b" ")
    return folded.strip(b" ")


def content_key(turns: list[Turn]) -> tuple[bytes, bytes]:
    """A record's normalised content and prompt, to be hashed.

    The content is role and text of all turns, whatever the record's format; NUL, which no record may
    hold, stands between them. The prompt is the first user turn, or all of a plain text.
    """
    content = normalized("\0".join([part for turn in turns for part in turn]))
    content = content.replace(b" \0", b"\0").replace(b"\0 ", b"\0")
    start = 0
    for role, _ in turns:
        start += len(role) + 1
        if role in ("user", "text"):
            break
        start = content.index(b"\0", start) + 1
    end = content.find(b"\0", start)
    return content, content[start:] if end < 0 else content[start:end]
