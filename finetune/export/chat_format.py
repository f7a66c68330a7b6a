"""A chat template taken apart: what stands before and after each turn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat.encode import RecordEncoder
from finetune.chat.template import read_json_object, token_text
from finetune.errors import DatasetError, ExportError

if TYPE_CHECKING:
    from finetune.dataset.records import Message

# Texts that no template writes of its own accord.
_SYSTEM, _USER, _ASSISTANT, _SECOND = "SYSTEM5b1e", "QUESTION7c2f", "ANSWER9d3a", "QUESTION4e8b"


@dataclass(frozen=True)
class Turn:
    """What surrounds one role's text."""

    before: str
    after: str


@dataclass(frozen=True)
class ChatFormat:
    """A template that writes every turn alike, whatever stands around it.

    `no_system` is what it writes where a conversation has no system turn, `generation` what makes the
    model answer, `stops` what an answer ends in.
    """

    system: Turn
    user: Turn
    assistant: Turn
    no_system: str
    generation: str
    stops: list[str]

    def render(self, messages: list[Message]) -> str:
        """The prompt of a conversation, up to the answer."""
        turns = {"system": self.system, "user": self.user, "assistant": self.assistant}
        text = "" if messages[0]["role"] == "system" else self.no_system
        for message in messages:
            turn = turns[message["role"]]
            text += turn.before + message["content"] + turn.after
        return text + self.generation


def read_chat_format(model_path: Path) -> ChatFormat:
    """Take a model's own chat template apart, and check that the parts render as the template does.

    A BOS token at the start is left out: llama.cpp and Ollama put it there themselves.

    Raises:
        BaseModelError: the tokenizer is damaged, or there is no chat template.
        ExportError: the template is no sequence of uniform turns.
    """
    encoder = RecordEncoder.load(model_path)
    bos = token_text(read_json_object(model_path / "tokenizer_config.json").get("bos_token"))
    remedy = "Use a base model with an ordinary chat template (an Instruct model)"

    def render(messages: list[Message], *, generate: bool) -> str:
        return encoder.template.render(messages, add_generation_prompt=generate).text.removeprefix(bos or "")

    try:
        found = _take_apart(render)
    except (ValueError, DatasetError) as error:
        raise ExportError(
            f"the chat template is no sequence of uniform turns: {error}", where=model_path, remedy=remedy
        ) from error
    stops = [encoder.decode([token], skip_special_tokens=False) for token in encoder.eos_token_ids]
    result = replace(found, stops=list(dict.fromkeys(stops)))
    for messages in _probes():
        if result.render(messages) != render(messages, generate=True):
            raise ExportError(
                f"the chat template treats some turns specially, such as in {messages}", where=model_path, remedy=remedy
            )
    return result


def _probes() -> list[list[Message]]:
    user: Message = {"role": "user", "content": _USER}
    assistant: Message = {"role": "assistant", "content": _ASSISTANT}
    second: Message = {"role": "user", "content": _SECOND}
    system: Message = {"role": "system", "content": _SYSTEM}
    return [[user], [system, user], [user, assistant, second], [system, user, assistant, second, assistant, user]]


def _take_apart(render: Any) -> ChatFormat:
    """Raises ValueError where a text is missing or its surroundings overlap."""
    user: Message = {"role": "user", "content": _USER}
    assistant: Message = {"role": "assistant", "content": _ASSISTANT}
    second: Message = {"role": "user", "content": _SECOND}
    system: Message = {"role": "system", "content": _SYSTEM}
    alone = render([user], generate=False)
    generation = render([user], generate=True).removeprefix(alone)
    long = render([user, assistant, second, {"role": "assistant", "content": _ASSISTANT}, user], generate=False)
    # user.after + assistant.before, then assistant.after + user.before, between known texts.
    start, rest = _split(long, _USER)
    user_to_assistant, rest = _split(rest, _ASSISTANT)
    assistant_to_user, rest = _split(rest, _SECOND)
    user_after = _split(alone, _USER)[1]
    if not user_to_assistant.startswith(user_after):
        raise ValueError("a user's turn ends differently before an answer")
    assistant_before = user_to_assistant[len(user_after) :]
    ended = render([user, assistant], generate=False)
    assistant_after = _split(ended, _ASSISTANT)[1]
    if not assistant_to_user.startswith(assistant_after):
        raise ValueError("an answer ends differently before the next turn")
    user_before = assistant_to_user[len(assistant_after) :]
    if not start.endswith(user_before):
        raise ValueError("the first turn of a user begins differently")
    before_system, rest = _split(render([system, user], generate=False), _SYSTEM)
    system_to_user = _split(rest, _USER)[0]
    if not system_to_user.endswith(user_before):
        raise ValueError("a user's turn begins differently after a system turn")
    return ChatFormat(
        system=Turn(before_system, system_to_user.removesuffix(user_before)),
        user=Turn(user_before, user_after),
        assistant=Turn(assistant_before, assistant_after),
        no_system=start.removesuffix(user_before),
        generation=generation,
        stops=[],
    )


def _split(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError(f"a turn's text is missing from {text!r}")
    return before, after
