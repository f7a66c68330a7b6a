"""Byte-level BPE by tiktoken: the tokens of a `tokenizers.Tokenizer`, several times as fast.

Built from the tokenizer's own vocabulary and pattern. Whether a model's tokenizer can be built so is
checked by form (`FastTokenizer.of`) and, by whoever uses it, on a sample of real texts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tiktoken
    from tokenizers import Tokenizer

# What `ByteLevel` splits by: GPT-2's pattern.
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))
_PLAIN_MODEL = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
_PLAIN_TOKEN = ("lstrip", "rstrip", "single_word", "normalized")


class FastTokenizer:
    """Stands in for a `tokenizers.Tokenizer` where texts are encoded with their special tokens in place.

    Whatever else is asked of it, such as decoding, the tokenizer itself does.
    """

    def __init__(self, tokenizer: Tokenizer, encoding: tiktoken.Encoding, added: dict[str, int]) -> None:
        self._tokenizer = tokenizer
        self._encoding = encoding
        self._added = added
        self._split = re.compile("(" + "|".join(sorted(map(re.escape, added), key=len, reverse=True)) + ")")
        tokens = {encoding.encode_single_token(token): token for token in encoding.token_byte_values()}
        tokens |= {id_: content.encode() for content, id_ in added.items()}
        self._byte_lengths = np.zeros(max(tokens) + 1, np.int64)
        for id_, token in tokens.items():
            self._byte_lengths[id_] = len(token)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> FastTokenizer | None:
        """The tokenizer's fast counterpart, or None: not plain byte-level BPE, or no tiktoken."""
        try:
            import tiktoken
        except ImportError:
            return None
        form = json.loads(tokenizer.to_str())
        model, added = form["model"], form["added_tokens"]
        pattern = _pattern(form["pre_tokenizer"])
        if (
            model["type"] != "BPE"
            or pattern is None
            or form["normalizer"] is not None
            or any(model.get(key) for key in (*_PLAIN_MODEL, "byte_fallback"))
            or any(token[key] for token in added for key in _PLAIN_TOKEN)
            or not added
        ):
            return None
        special = {token["content"]: token["id"] for token in added}
        bytes_of = {character: byte for byte, character in _byte_characters().items()}
        vocabulary = {token: id_ for token, id_ in model["vocab"].items() if token not in special}
        if any(character not in bytes_of for token in vocabulary for character in token):
            return None
        # tiktoken merges what gives the lowest id first, so ids must rise in the order of the merges.
        pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        merged = [vocabulary.get("".join(pair), -1) for pair in pairs]
        if any(first >= second for first, second in pairwise(merged)) or len(vocabulary) != len(merged) + 256:
            return None
        ranks = {bytes(bytes_of[character] for character in token): id_ for token, id_ in vocabulary.items()}
        encoding = tiktoken.Encoding("fast", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        return cls(tokenizer, encoding, special)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> Sequence[Any]:
        """Encodings with ``ids``, ``offsets`` and ``char_to_token``, as the tokenizer's own."""
        if add_special_tokens:
            return self._tokenizer.encode_batch(list(texts), add_special_tokens=True)
        # Pieces between special tokens are encoded, all in one batch, and put together again.
        pieces = [self._split.split(text) for text in texts]
        plain = [piece for parts in pieces for piece in parts[::2]]
        encoded = iter(self._encoding.encode_ordinary_batch(plain, num_threads=os.cpu_count() or 1))
        encodings = []
        for text, parts in zip(texts, pieces, strict=True):
            ids = next(encoded)
            for special in parts[1::2]:
                ids.append(self._added[special])
                ids += next(encoded)
            encodings.append(FastEncoding(text, ids, self._byte_lengths))
        return encodings


class FastEncoding:
    """The tokens of one text, and where they lie in it."""

    def __init__(self, text: str, ids: list[int], byte_lengths: npt.NDArray[np.int64]) -> None:
        self.ids = ids
        self._text = text
        self._byte_lengths = byte_lengths

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self._byte_lengths[self.ids])

    @cached_property
    def _bytes(self) -> bytes:
        return self._text.encode()

    @property
    def offsets(self) -> FastEncoding:
        """First character and the one after the last of each token, by index."""
        return self

    def __getitem__(self, token: int) -> tuple[int, int]:
        token %= len(self.ids)
        start = int(self._ends[token - 1]) if token else 0
        return self._character(start), self._character(int(self._ends[token]) - 1) + 1

    def char_to_token(self, character: int) -> int | None:
        """The token that holds the first byte of a character, or None beyond the text."""
        if not 0 <= character < len(self._text):
            return None
        byte = character if self._text.isascii() else len(self._text[:character].encode())
        return int(np.searchsorted(self._ends, byte, side="right"))

    def _character(self, byte: int) -> int:
        if self._text.isascii():
            return byte
        return len(self._bytes[: byte + 1].translate(None, _CONTINUATION_BYTES)) - 1


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern that the pre-tokenizer splits by, if that and bytes are all it does."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not splits:
        return _GPT2_PATTERN if last["use_regex"] else None
    if len(splits) > 1 or last["use_regex"] or splits[0]["type"] != "Split" or "Regex" not in splits[0]["pattern"]:
        return None
    if splits[0]["behavior"] != "Isolated" or splits[0]["invert"]:
        return None
    return str(splits[0]["pattern"]["Regex"])


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
