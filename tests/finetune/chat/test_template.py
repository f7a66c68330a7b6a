from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.chat.template import ChatTemplate
from finetune.errors import BaseModelError, DatasetError

TEMPLATES = Path(__file__).parent / "templates"
ALL = ["chatml", "chatml_marked", "llama3", "mistral"]
MakeModel = Callable[..., Path]

CONVERSATION = [
    {"role": "user", "content": "Яка столиця України?\n"},
    {"role": "assistant", "content": "Київ <b>&amp;</b> {{ no template }}"},
    {"role": "user", "content": "  And of Poland?"},
    {"role": "assistant", "content": "Warsaw. 🙂"},
]
WITH_SYSTEM = [{"role": "system", "content": " Answer briefly. "}, *CONVERSATION]


def template_text(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_equals_that_of_transformers(make_model: MakeModel, name: str, prompt: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    model_dir = make_model(template_text(name))
    theirs = PreTrainedTokenizerFast.from_pretrained(model_dir)
    messages = CONVERSATION if name == "mistral" else WITH_SYSTEM
    messages = messages[:-1] if prompt else messages
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert ChatTemplate.load(model_dir).render(messages, add_generation_prompt=prompt).text == expected


@pytest.mark.parametrize("name", ALL)
def test_the_spans_hold_what_the_assistant_says_and_nothing_else(make_model: MakeModel, name: str) -> None:
    rendered = ChatTemplate.load(make_model(template_text(name))).render(CONVERSATION)
    said = [rendered.text[start:end] for start, end in rendered.assistant_spans]
    assert len(said) == 2
    for text, answer in zip(said, ["Київ <b>&amp;</b> {{ no template }}", "Warsaw. 🙂"], strict=True):
        rest = text.replace("<|im_end|>", "").replace("<|eot_id|>", "")
        assert rest.strip() == answer


def test_marked_and_unmarked_templates_give_the_same_text(make_model: MakeModel) -> None:
    marked = ChatTemplate.load(make_model(template_text("chatml_marked")))
    unmarked = ChatTemplate.load(make_model(template_text("chatml")))
    assert marked.has_generation_markers
    assert not unmarked.has_generation_markers
    assert marked.render(WITH_SYSTEM).text == unmarked.render(WITH_SYSTEM).text


def test_a_template_file_wins_and_a_list_of_named_templates_gives_the_default(make_model: MakeModel) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    model_dir = make_model(named)
    assert ChatTemplate.load(model_dir).render(CONVERSATION[:1]).text == "plain"
    (model_dir / "chat_template.jinja").write_text("from the file")
    assert ChatTemplate.load(model_dir).render(CONVERSATION[:1]).text == "from the file"


def test_a_model_without_a_chat_template_is_refused_with_advice(make_model: MakeModel) -> None:
    with pytest.raises(BaseModelError, match=r"no chat template.*instruction-tuned"):
        ChatTemplate.load(make_model())


def test_a_template_with_a_syntax_error_is_refused_by_its_file(make_model: MakeModel) -> None:
    with pytest.raises(BaseModelError, match=r"not valid Jinja.*tokenizer_config\.json"):
        ChatTemplate.load(make_model("{% for %}"))


def test_a_template_that_rewrites_earlier_turns_is_refused_with_an_explanation(make_model: MakeModel) -> None:
    template = ChatTemplate.load(make_model(template_text("forgetting")))
    with pytest.raises(DatasetError, match=r"turn 2 of 4.*generation"):
        template.render(CONVERSATION)
    (start, end) = template.render(CONVERSATION[:2]).assistant_spans[0]
    assert template.render(CONVERSATION[:2]).text[start:end].startswith("<think>\n\n</think>\n\nКиїв")


def test_what_the_template_refuses_is_reported_in_its_own_words(make_model: MakeModel) -> None:
    template = ChatTemplate.load(make_model(template_text("mistral")))
    with pytest.raises(DatasetError, match="roles must alternate"):
        template.render(CONVERSATION[1:])


def test_a_template_cannot_reach_into_python(make_model: MakeModel) -> None:
    template = ChatTemplate.load(make_model("{{ messages.__class__.__base__.__subclasses__() }}"))
    with pytest.raises(DatasetError, match="unsafe"):
        template.render(CONVERSATION[:1])
