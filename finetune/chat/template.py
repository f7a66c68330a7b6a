"""A base model's chat template: the text of a conversation, and which part of it the assistant says.

The environment has the semantics of transformers' ``apply_chat_template`` (version 5), without
importing transformers: profile and plan run where it is not installed. The ``{% generation %}``
statement is the one that transformers documents for training on the assistant's side only.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.errors import BaseModelError, DatasetError

Span = tuple[int, int]

# Marks that no message can hold by accident or on purpose: they are drawn anew in every process.
_NONCE = secrets.token_hex(16)
_OPEN, _CLOSE = f"\ufdd0{_NONCE}", f"\ufdd1{_NONCE}"


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}``: marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it as an attribute of instances

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `assistant_spans` are (from, to) in characters, in order."""

    text: str
    assistant_spans: list[Span]


class ChatTemplate:
    """A compiled chat template with the model's special tokens.

    Args:
        source: the template, in Jinja.
        special_tokens: what templates name ``bos_token``, ``eos_token`` and the like.
        where: the file that it came from, for errors.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: Path) -> None:
        self.where = where
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template: Template = environment.from_string(source)
        except TemplateError as error:
            raise BaseModelError(
                f"the chat template is not valid Jinja: {error}",
                where=where,
                remedy="Repair the template or choose another base model",
            ) from error
        self.has_generation_markers = any(
            isinstance(block.call.node, nodes.ExtensionAttribute) for block in tree.find_all(nodes.CallBlock)
        )

    @classmethod
    def load(cls, model_dir: Path) -> ChatTemplate:
        """Read the template of a model directory in Hugging Face's layout.

        Looks for ``chat_template.jinja``, then for ``chat_template`` in ``tokenizer_config.json``: a
        string, or a list of named templates, of which ``default`` is taken.

        Raises:
            BaseModelError: there is none, or it is not valid Jinja.
        """
        config_path = model_dir / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.is_file() else {}
        special_tokens = {
            name: text for name, value in config.items() if name.endswith("_token") and (text := token_text(value))
        }
        template_path = model_dir / "chat_template.jinja"
        if template_path.is_file():
            return cls(template_path.read_text(encoding="utf-8"), special_tokens, template_path)
        source = config.get("chat_template")
        if isinstance(source, list):
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        if not isinstance(source, str):
            raise BaseModelError(
                "the base model has no chat template, so conversations cannot become text",
                where=model_dir,
                remedy="Choose an instruction-tuned model, put a chat_template.jinja beside its tokenizer, "
                "or train on plain text records",
            )
        return cls(source, special_tokens, config_path)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> Rendered:
        """The conversation as text, equal to transformers' ``apply_chat_template(tokenize=False)``.

        Where the template has no generation markers, the spans are the difference between the text up
        to a turn (with the generation prompt) and the text with it.

        Raises:
            DatasetError: the template refuses the conversation, or it writes earlier turns anew when
                later ones follow, so that the assistant's part cannot be told.
        """
        text, spans = self._render(messages, add_generation_prompt)
        if not self.has_generation_markers:
            spans = self._spans_by_difference(messages, text)
        return Rendered(text, spans)

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> tuple[str, list[Span]]:
        try:
            marked = self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except TemplateError as error:
            raise DatasetError(
                f"the chat template refuses a conversation: {error}",
                where=self.where,
                remedy="Change the record's roles to those that the template knows, or choose another base model",
            ) from error
        return _without_marks(marked)

    def _spans_by_difference(self, messages: Sequence[Mapping[str, Any]], text: str) -> list[Span]:
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(messages[:index], True)
            upto, _ = self._render(messages[: index + 1], False)
            if not (text.startswith(upto) and upto.startswith(before)):
                raise DatasetError(
                    f"the chat template has no generation markers and writes turn {index + 1} of {len(messages)} "
                    "otherwise when other turns follow or precede it, so the assistant's side cannot be told apart",
                    where=self.where,
                    remedy="Put {% generation %} and {% endgeneration %} around the assistant's text in the template, "
                    "or give one record per assistant turn",
                )
            spans.append((len(before), len(upto)))
        return spans


def _without_marks(marked: str) -> tuple[str, list[Span]]:
    head, *rest = marked.split(_OPEN)
    pieces, spans, length = [head], [], len(head)
    for piece in rest:
        inside, _, after = piece.partition(_CLOSE)
        spans.append((length, length + len(inside)))
        pieces += [inside, after]
        length += len(inside) + len(after)
    return "".join(pieces), spans


def token_text(value: Any) -> str | None:
    """A special token's text: a string, or the ``content`` of an added token."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model directory.

    Raises:
        BaseModelError: the file is missing, unreadable or holds something else.
    """
    remedy = "Download the base model again, or point BASE_MODEL_NAME at a whole model directory"
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BaseModelError(f"a file of the base model cannot be read: {error}", where=path, remedy=remedy) from error
    if not isinstance(value, dict):
        raise BaseModelError("a file of the base model is not a JSON object", where=path, remedy=remedy)
    return value
