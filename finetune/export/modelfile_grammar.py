"""Ollama's Modelfile format: its reader, and a writer whose output reads back as it was meant.

The grammar is that of Ollama's parser (parser/parser.go), which differs from what one would expect:

- ``#`` begins a comment only at the start of a line.
- A value is bare, ``"quoted"`` or quoted by three marks. White space around it is dropped, and nothing escapes
  a quotation mark.
- A value ends at the first line end at which its quotes are closed: a text line that ends in the closing
  mark ends the value, a mark within a line does not.
- Characters that are not printable (non-breaking spaces, the joiners within emoji, control characters) are dropped in
  silence, except tabs and line ends within quotes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.errors import ExportError

COMMANDS = frozenset(
    ("from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "message", "requires")
) | {"parameter"}
_ROLES = frozenset({"system", "user", "assistant"})
_SPACES = " \t"
_LINE_ENDS = "\r\n"


@dataclass(frozen=True)
class Command:
    """One command: its name in lower case, for a PARAMETER the parameter's name, and its value."""

    name: str
    value: str


def format_modelfile(commands: Sequence[Command]) -> str:
    """Write commands as a Modelfile that Ollama reads back unchanged.

    Raises:
        ExportError: a value cannot be written in this format.
    """
    text = "".join(_format(command) for command in commands)
    if parse_modelfile(text) != list(commands):
        raise ExportError("the Modelfile does not read back as it was meant", where=text[:200])
    return text


def _format(command: Command) -> str:
    head = command.name.upper() if command.name in COMMANDS else f"PARAMETER {command.name}"
    value = command.value
    # Bare quotation marks within a value are legal, but nobody reads them with ease.
    bare = () if '"' in value else (value,)
    for written in (*bare, f'"""{value}"""', f'"{value}"'):
        line = f"{head} {written}\n"
        # The second command shows that the first one's value ends where it should.
        try:
            if parse_modelfile(f"{line}FROM end\n") == [command, Command("from", "end")]:
                return line
        except ExportError:
            continue
    dropped = sorted({f"U+{ord(c):04X}" for c in value if not c.isprintable() and c not in _SPACES + _LINE_ENDS})
    reason = f"it drops {', '.join(dropped[:5])}" if dropped else "its quotation marks would end the text early"
    raise ExportError(
        f"the Modelfile format cannot hold this {head} text: {reason}", where=value[:80], remedy="Change the text"
    )


def parse_modelfile(text: str) -> list[Command]:
    """Read a Modelfile as Ollama's parser does.

    Raises:
        ExportError: not a Modelfile; the line is named.
    """
    commands: list[Command] = []
    position = 0
    while position < len(text):
        character = text[position]
        if character in _SPACES + _LINE_ENDS:
            position += 1
        elif character == "#":
            position = _line_end(text, position)
        else:
            command, position = _command(text, position)
            commands.append(command)
    if not any(command.name == "from" for command in commands):
        raise ExportError("not a Modelfile: no FROM line")
    return commands


def _command(text: str, position: int) -> tuple[Command, int]:
    line = text.count("\n", 0, position) + 1
    name, position = _name(text, position, str.isalpha, line)
    name = name.lower()
    if name not in COMMANDS:
        raise ExportError(f"not a Modelfile: line {line} has the unknown command {name!r}")
    role = ""
    if name == "parameter":
        name, position = _name(text, position, lambda c: c.isalnum() or c == "_", line)
    elif name == "message":
        role, position = _name(text, position, str.isalpha, line)
        if role not in _ROLES:
            raise ExportError(f"not a Modelfile: line {line} has a message of the unknown role {role!r}")
    value, position = _value(text, position, line)
    return Command(name, f"{role}: {value}" if role else value), position


def _name(text: str, position: int, allowed: Callable[[str], bool], line: int) -> tuple[str, int]:
    """A word, and the position behind the one space that must follow it."""
    start = position
    while position < len(text) and text[position].isascii() and allowed(text[position]):
        position += 1
    if position == len(text) or text[position] not in _SPACES:
        raise ExportError(f"not a Modelfile: line {line} breaks off or has a stray character behind a name")
    return text[start:position], position + 1


def _value(text: str, position: int, line: int) -> tuple[str, int]:
    buffer: list[str] = []
    while position < len(text):
        character = text[position]
        position += 1
        if character in _LINE_ENDS:
            value = _unquote("".join(buffer).strip())
            if value is not None:
                return value, position
        if character.isprintable() or character in _SPACES + _LINE_ENDS:
            buffer.append(character)
    value = _unquote("".join(buffer).strip())
    if value is None:
        raise ExportError(f"not a Modelfile: the quotation that begins in line {line} is never closed")
    return value, position


def _unquote(text: str) -> str | None:
    """The value without its quotation marks, or None while they are open."""
    for mark in ('"""', '"'):
        if text.startswith(mark):
            closed = len(text) >= 2 * len(mark) and text.endswith(mark)
            return text[len(mark) : -len(mark)] if closed else None
    return text


def _line_end(text: str, position: int) -> int:
    while position < len(text) and text[position] not in _LINE_ENDS:
        position += 1
    return position
