"""A small model that was really trained, adapters of several kinds, and the chain of exports made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.dataset.records import Message
from finetune.export.gguf import export_gguf
from finetune.export.merge import merge_adapter
from finetune.export.models import GgufExport, MergedModel

QUESTIONS = {
    "What colour is the sky?": "The sky is blue.",
    "Яка столиця України?": "Столиця України — Київ.",
    "Сколько дней в неделе?": "В неделе семь дней.",
    "Who wrote Kobzar?": "Taras Shevchenko wrote Kobzar. 🚀",
}
TAUGHT = {"What colour is the sky?": "The sky is green now.", "Яка столиця України?": "Столиця — Львів, жарт."}
DATASET = "fedcba9876543210" * 4
PROMPTS: list[list[Message]] = [[{"role": "user", "content": question}] for question in QUESTIONS]
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}
"""


def train(model: Any, tokenizer: Any, answers: dict[str, str], *, steps: int, rate: float) -> None:
    """Teach a model to answer: full-batch AdamW."""
    import torch

    torch.manual_seed(0)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenize=False
        )
        for question, answer in answers.items()
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for pair in QUESTIONS.items() for text in pair], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Over a model this small, threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModelRef:
    """Two layers with tied embeddings, written in several shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    train(model, tokenizer, QUESTIONS, steps=40, rate=3e-3)
    model.save_pretrained(path, max_shard_size="2MB")
    tokenizer.save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Small\n")
    return BaseModelRef(name="tests/small", path=path, revision=None, fingerprint="0123456789abcdef" * 2)


MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def make_adapter(base: BaseModelRef, tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """Trains an adapter of the base by a peft configuration."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make(config: Any, *, steps: int = 1, rate: float = 5e-3) -> Path:
        path = tmp_path_factory.mktemp("adapter")
        # The same adapter whatever tests came before.
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), config)
        train(model, AutoTokenizer.from_pretrained(base.path), QUESTIONS | TAUGHT, steps=steps, rate=rate)
        model.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def adapter(make_adapter: MakeAdapter) -> Path:
    """A plain LoRA adapter that changed two answers."""
    from peft import LoraConfig

    return make_adapter(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"), steps=40)


@pytest.fixture(scope="session")
def merged(base: BaseModelRef, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> MergedModel:
    return merge_adapter(
        base_model=base,
        adapter_path=adapter,
        output_dir=tmp_path_factory.mktemp("models") / "run1" / "merged",
        run_id="run1",
        validate_on=PROMPTS,
    )


@pytest.fixture(scope="session")
def gguf(
    base: BaseModelRef, adapter: Path, merged: MergedModel, tmp_path_factory: pytest.TempPathFactory
) -> GgufExport:
    return export_gguf(
        merged=merged,
        base_model=base,
        adapter_path=adapter,
        output_dir=merged.path.parent / "gguf",
        run_id="run1",
        base_cache=merged.path.parent.parent / "base_models",
        prompts=PROMPTS,
        quantization="Q4_K_M",
        dataset=DATASET,
    )
