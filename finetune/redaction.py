"""Text without secrets: for what leaves the machine, such as alerts and logs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote, quote_plus, unquote, urlsplit

_MASK = "***"
# A shorter one would take everyday words along.
_SHORTEST = 4
# What looks like a secret wherever it comes from: credentials of an address, keys of a header, tokens of the hub,
# passwords as libpq writes them, variables that are named so, and the secret half of a chat service's webhook.
_PATTERNS = (
    (re.compile(r"(?<=://)[^/@\s'\"]+@"), f"{_MASK}@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{4,}"), rf"\1 {_MASK}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), _MASK),
    (
        re.compile(
            r"(?i)(password|passwd|(?<![a-z])(?:api_?key|token|secret(?:_\w+)?))"
            r"([\"']?\s*[=:]\s*[\"']?)(?!\*\*\*)[^\s&;,'\")]+"
        ),
        rf"\1\2{_MASK}",
    ),
    (re.compile(r"(https://hooks\.[\w.-]+)/\S+"), rf"\1/{_MASK}"),
)


class Redactor:
    """Masks secrets in text: those that it is given, and whatever has the form of one.

    Args:
        secrets: values that must never be shown; of an address with credentials its password is one too.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known: set[str] = set()
        for secret in secrets:
            known |= {secret, *_passwords(secret)}
        # As it stands, and as an address spells it; the longest first, or its rest would stay.
        spelled = {form for each in known for form in (each, quote(each, safe=""), quote_plus(each))}
        self._secrets = sorted((each for each in spelled if len(each) >= _SHORTEST), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """The text with every secret as ``***``."""
        for secret in self._secrets:
            text = text.replace(secret, _MASK)
        for pattern, mask in _PATTERNS:
            text = pattern.sub(mask, text)
        return text


def _passwords(address: str) -> set[str]:
    """The passwords in an address: before its host, and as parameters of a name with ``pass`` in it."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return set()
    if not parts.scheme or not parts.netloc:
        return set()
    pairs = (pair.partition("=") for pair in parts.query.split("&"))
    found = {value for name, _, value in pairs if "pass" in name.lower()}
    if parts.password:
        found.add(parts.password)
    return found | {unquote(each) for each in found}
