"""Records as tokens, and which tokens the loss counts: one encoding for profile, training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from finetune.chat.template import ChatTemplate, Span, read_json_object, token_text
from finetune.dataset.records import as_messages
from finetune.errors import BaseModelError, DatasetError

if TYPE_CHECKING:
    from tokenizers import Encoding

# Records tokenized at a time: enough to keep all cores busy, few enough to bound memory.
_BATCH = 2048


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """One record's tokens; `trained_mask` is 1 where the loss counts, and as long as `input_ids`."""

    input_ids: list[int]
    trained_mask: list[int]


class RecordEncoder:
    """Encodes records and prompts with a base model's tokenizer and chat template.

    Args:
        tokenizer: the model's tokenizer.
        model_dir: where its chat template lies, read when the first conversation comes.
        eos_token_ids: the tokens that end an answer, the main one first.
        pad_token_id: fills batches up; the main end token where the model names none.
    """

    def __init__(self, tokenizer: Tokenizer, model_dir: Path, eos_token_ids: list[int], pad_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._model_dir = model_dir
        self._special_ids = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.eos_token_ids = eos_token_ids
        self.pad_token_id = pad_token_id

    @classmethod
    def load(cls, model_dir: Path) -> RecordEncoder:
        """Read ``tokenizer.json`` and the special tokens of a model directory in Hugging Face's layout.

        Raises:
            BaseModelError: the tokenizer is missing, damaged, or names no end token.
        """
        path = model_dir / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises plain Exception for every fault
            raise BaseModelError(
                f"the base model's tokenizer cannot be read: {error}",
                where=path,
                remedy="Download the base model again; models without tokenizer.json (a fast tokenizer) "
                "are not supported",
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        eos_token_ids = _end_tokens(model_dir, tokenizer)
        pad = _token_id(model_dir, tokenizer, "pad_token")
        return cls(tokenizer, model_dir, eos_token_ids, eos_token_ids[0] if pad is None else pad)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, without truncation or padding."""
        return self._tokenizer

    def with_tokenizer(self, tokenizer: Any) -> RecordEncoder:
        """The same encoder with another implementation of its tokenizer."""
        return RecordEncoder(tokenizer, self._model_dir, self.eos_token_ids, self.pad_token_id)

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template.

        Raises:
            BaseModelError: there is none.
        """
        return ChatTemplate.load(self._model_dir)

    def encode(self, records: Sequence[Mapping[str, Any]], *, first: int = 1) -> list[EncodedRecord]:
        """Tokens of each record, in order.

        A conversation is written with the chat template; the loss counts what the assistant says and
        the token that ends its turn. A plain text record is trained whole. Every record ends with a
        token that ends generation, so that the model learns to stop. Errors count the records from `first`.

        Raises:
            BaseModelError: a conversation came and the model has no chat template.
            DatasetError: the template refuses a record.
        """
        encoded: list[EncodedRecord] = []
        for start in range(0, len(records), _BATCH):
            encoded += self._encode_batch(records[start : start + _BATCH], first + start)
        return encoded

    def encode_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation up to where the assistant's answer begins.

        Raises:
            BaseModelError: the model has no chat template.
            DatasetError: the template refuses the conversation.
        """
        text = self.template.render(messages, add_generation_prompt=True).text
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def _encode_batch(self, records: Sequence[Mapping[str, Any]], first: int) -> list[EncodedRecord]:
        texts: list[str] = []
        spans: list[list[Span] | None] = []
        for index, record in enumerate(records):
            try:
                messages = as_messages(record)
                if messages is None:
                    texts.append(record["text"])
                    spans.append(None)
                    continue
                rendered = self.template.render(messages)
            except DatasetError as error:
                raise DatasetError(
                    f"record {first + index}: {error.what}", where=error.where, remedy=error.remedy
                ) from error
            texts.append(rendered.text)
            spans.append(rendered.assistant_spans)
        # The template writes the special tokens of a conversation itself; the tokenizer adds those of plain text.
        encoded: list[EncodedRecord | None] = [None] * len(records)
        for plain in (False, True):
            chosen = [index for index, span in enumerate(spans) if (span is None) is plain]
            encodings = self._tokenizer.encode_batch([texts[index] for index in chosen], add_special_tokens=plain)
            for index, encoding in zip(chosen, encodings, strict=True):
                encoded[index] = self._with_mask(texts[index], encoding, spans[index])
        return [record for record in encoded if record is not None]

    def _with_mask(self, text: str, encoding: Encoding, spans: list[Span] | None) -> EncodedRecord:
        ids = list(encoding.ids)
        if spans is None:
            if not ids or ids[-1] not in self.eos_token_ids:
                ids.append(self.eos_token_ids[0])
            return EncodedRecord(ids, [1] * len(ids))
        mask = [0] * len(ids)
        last = -1
        for span in spans:
            bounds = _token_span(encoding, span)
            if bounds is None:
                continue
            first, last = bounds
            last = self._turn_end(ids, last, text, encoding)
            mask[first : last + 1] = [1] * (last + 1 - first)
        if last >= 0 and ids[last] not in self.eos_token_ids and not text[encoding.offsets[last][1] :].strip():
            ids = [*ids[: last + 1], self.eos_token_ids[0]]
            mask = [*mask[: last + 1], 1]
        return EncodedRecord(ids, mask)

    def _turn_end(self, ids: list[int], last: int, text: str, encoding: Encoding) -> int:
        """The last token worth learning of a turn whose marked part ends with token `last`."""
        # Some templates close their markers before the token that ends the turn ...
        if ids[last] not in self.eos_token_ids and last + 1 < len(ids) and ids[last + 1] in self.eos_token_ids:
            return last + 1
        # ... and some after the line break that follows it: generation has stopped by then.
        end = last
        while end > 0 and not text[slice(*encoding.offsets[end])].strip():
            end -= 1
        return end if ids[end] in self._special_ids else last


def _token_span(encoding: Encoding, span: Span) -> tuple[int, int] | None:
    """First and last token of a span of characters; characters that no token holds are passed over."""
    start, end = span
    first = last = None
    while start < end and (first := encoding.char_to_token(start)) is None:
        start += 1
    while end > start and (last := encoding.char_to_token(end - 1)) is None:
        end -= 1
    return None if first is None or last is None else (first, last)


def _end_tokens(model_dir: Path, tokenizer: Tokenizer) -> list[int]:
    main = _token_id(model_dir, tokenizer, "eos_token")
    found = [] if main is None else [main]
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        value = read_json_object(path).get("eos_token_id") if path.is_file() else None
        found += value if isinstance(value, list) else [] if value is None else [value]
    if not found:
        raise BaseModelError(
            "the base model names no token that ends a text, so it could never learn to stop",
            where=model_dir,
            remedy="Name eos_token in its tokenizer_config.json",
        )
    return list(dict.fromkeys(found))


def _token_id(model_dir: Path, tokenizer: Tokenizer, name: str) -> int | None:
    path = model_dir / "tokenizer_config.json"
    text = token_text(read_json_object(path).get(name)) if path.is_file() else None
    return None if text is None else tokenizer.token_to_id(text)
