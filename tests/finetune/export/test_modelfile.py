from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment

from finetune.base_model.models import BaseModelRef
from finetune.dataset.records import Message
from finetune.errors import ExportError
from finetune.export.chat_format import ChatFormat, read_chat_format
from finetune.export.modelfile import context_length, go_template, read_modelfile, write_modelfiles
from finetune.export.modelfile_grammar import Command, format_modelfile, parse_modelfile
from finetune.export.models import GgufExport
from tests.finetune.export.conftest import TEMPLATE

LLAMA_3 = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
WITH_DEFAULT_SYSTEM = """{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nBe {{kind}}.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
NUMBERED = """{%- for message in messages %}{{- loop.index ~ message['role'] ~ message['content'] + '<|im_end|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant' }}{% endif %}"""
CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "Привіт"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "{{ .System }}"},
    ],
]


def model_with(base: BaseModelRef, directory: Path, template: str) -> Path:
    model = directory / "model"
    shutil.copytree(base.path, model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "chat_template.jinja").write_text(template)
    config = json.loads((model / "tokenizer_config.json").read_text()) | {"bos_token": "<|endoftext|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    return model


# The actions that our Go templates hold, in Jinja.
IN_JINJA = {
    "if .System": "{% if system %}",
    "range $i, $_ := .Messages": "{% for message in messages %}",
    "$last := eq (len (slice $.Messages $i)) 1": "{% set last = loop.last %}",
    'if eq .Role "user"': "{% if message.role == 'user' %}",
    'else if eq .Role "assistant"': "{% elif message.role == 'assistant' %}",
    "if not $last": "{% if not last %}",
    'if and $last (ne .Role "assistant")': "{% if last and message.role != 'assistant' %}",
    "else": "{% else %}",
    ".System": "{{ system }}",
    ".Content": "{{ message.content }}",
    '"{{"': "{{ '{{' }}",
}


def render_go(template: str, messages: list[Message]) -> str:
    """What Go's text/template makes of our templates, by way of Jinja."""
    open_blocks: list[str] = []
    jinja = ""
    for position, piece in enumerate(re.split(r'\{\{ ("\{\{"|.*?) \}\}', template)):
        if position % 2 == 0:
            jinja += f"{{% raw %}}{piece}{{% endraw %}}"
        elif piece == "end":
            jinja += f"{{% end{open_blocks.pop()} %}}"
        else:
            jinja += IN_JINJA[piece]
            if piece.startswith(("if", "range")):
                open_blocks.append("for" if piece.startswith("range") else "if")
    system = next((message["content"] for message in messages if message["role"] == "system"), "")
    return Environment(keep_trailing_newline=True).from_string(jinja).render(system=system, messages=messages)


@pytest.mark.parametrize(
    "template", [TEMPLATE, LLAMA_3, WITH_DEFAULT_SYSTEM], ids=["chatml", "llama 3", "default system"]
)
def test_the_go_template_writes_what_the_chat_template_writes(
    base: BaseModelRef, tmp_path: Path, template: str
) -> None:
    from transformers import AutoTokenizer

    model = model_with(base, tmp_path, template)
    written = go_template(read_chat_format(model))
    tokenizer = AutoTokenizer.from_pretrained(model)
    for messages in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render_go(written, messages) == expected.removeprefix("<|endoftext|>")


def test_a_template_of_other_than_uniform_turns_is_refused(base: BaseModelRef, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="chat template"):
        read_chat_format(model_with(base, tmp_path, NUMBERED))


def test_stops_are_the_models_end_tokens(base: BaseModelRef, tmp_path: Path) -> None:
    model = model_with(base, tmp_path, TEMPLATE)
    assert read_chat_format(model).stops == ["<|im_end|>"]
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert read_chat_format(model).stops == ["<|im_end|>", "<|endoftext|>"]


def test_the_context_is_the_models_but_bounded(base: BaseModelRef, tmp_path: Path) -> None:
    assert context_length(base.path) == 256
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 131072}')
    assert context_length(tmp_path) == 8192


def test_both_modelfiles_lead_to_files_that_exist(base: BaseModelRef, gguf: GgufExport) -> None:
    export = write_modelfiles(gguf=gguf, base_model=base, output_dir=gguf.path.parent / "ollama", run_id="run1")
    assert export.modelfile is not None
    assert gguf.adapter is not None
    commands = read_modelfile(export.modelfile)
    assert commands[:2] == [Command("from", str(gguf.base.path)), Command("adapter", str(gguf.adapter.path))]
    assert Command("stop", "<|im_end|>") in commands
    assert Command("num_ctx", "256") in commands
    merged = read_modelfile(export.modelfile_merged)
    assert merged[0] == Command("from", str(gguf.quantized.path))
    assert merged[1:] == commands[2:]
    assert str(gguf.path.parent) not in export.modelfile.read_text()


def test_modelfiles_are_written_once(base: BaseModelRef, gguf: GgufExport, tmp_path: Path) -> None:
    def write(system: str | None) -> bool:
        return write_modelfiles(
            gguf=gguf, base_model=base, output_dir=tmp_path / "ollama", run_id="run1", system=system
        ).reused

    assert [write(None), write(None), write("Be brief."), write("Be brief.")] == [False, True, False, True]
    assert Command("system", "Be brief.") in parse_modelfile((tmp_path / "ollama" / "Modelfile").read_text())


@pytest.mark.parametrize(
    "system",
    [
        'He said "yes"',
        '"quoted"',
        "# not a comment",
        "line\n# still not\nFROM elsewhere",
        "\n\n leading and trailing \n",
        'ends with a mark"',
        'three """ within a line',
        "Ти — помічник. 🚀",
        "tab\there",
        'back\\slash \\"',
        "PARAMETER stop x",
    ],
)
def test_hostile_system_prompts_survive(system: str) -> None:
    commands = [Command("from", "model.gguf"), Command("system", system), Command("num_ctx", "256")]
    assert parse_modelfile(format_modelfile(commands)) == commands


@pytest.mark.parametrize(
    ("system", "reason"),
    [
        ("non-breaking\u00a0space", r"drops U\+00A0"),
        ("family \U0001f469\u200d\U0001f467", r"drops U\+200D"),
        ("nul\0", r"drops U\+0000"),
        ('a line that ends in """\nand another that ends in "\nthen', "quotation marks"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(system: str, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        format_modelfile([Command("from", "model.gguf"), Command("system", system)])


@given(st.text(alphabet=st.sampled_from('ab"# \n\t\rї\u00a0\\'), max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_text_survives_or_is_refused(text: str) -> None:
    commands = [Command("system", text), Command("from", "model.gguf")]
    try:
        written = format_modelfile(commands)
    except ExportError:
        return
    assert parse_modelfile(written) == commands


def test_the_parser_reads_what_ollama_reads() -> None:
    text = (
        '# comment\nfrom llama3\n\n  SYSTEM  hello # world  \nPARAMETER  temperature 1\nPARAMETER stop "a b"\n'
        'TEMPLATE """one\n"two" """ three\n"""\nMESSAGE user  hi\nLICENSE "a\nb"'
    )
    assert parse_modelfile(text) == [
        Command("from", "llama3"),
        Command("system", "hello # world"),
        # Two spaces after PARAMETER give an empty name.
        Command("", "temperature 1"),
        Command("stop", "a b"),
        Command("template", 'one\n"two" """ three\n'),
        Command("message", "user: hi"),
        Command("license", "a\nb"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SYSTEM x\n", "no FROM line"),
        ("FROM x\nSISTEM y\n", "line 2 has the unknown command 'sistem'"),
        ('FROM x\nSYSTEM """never closed\n', "line 2 is never closed"),
        ("FROM x\nMESSAGE robot hi\n", "unknown role 'robot'"),
        ("FROM\n", "line 1 breaks off"),
    ],
)
def test_the_parser_refuses_what_ollama_refuses(text: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        parse_modelfile(text)


def test_braces_in_a_template_stay_literal() -> None:
    from finetune.export.chat_format import Turn

    turn = Turn("<", ">")
    chat = ChatFormat(turn, Turn("{{", "}}"), turn, "", "!", [])
    assert render_go(go_template(chat), [{"role": "user", "content": "x"}]) == "{{x}}!"
