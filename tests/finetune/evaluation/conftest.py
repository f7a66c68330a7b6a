"""A random Llama of a few thousand parameters with a real tokenizer, and adapters on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.base_model.models import BaseModelRef

QUESTIONS = [
    ("What is the colour of the sky?", "Blue."),
    ("Де живе річкова видра?", "Біля річки, у норі під берегом."),
    ("Сколько дней в неделе?", "Семь."),
    ("Name a prime number.", "Seven is a prime number, and so is eleven."),
]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _write_records(path: Path, count: int = 24) -> Path:
    """Records of three formats and two sources, of many lengths."""
    records: list[dict[str, object]] = []
    for number in range(count):
        question, answer = QUESTIONS[number % len(QUESTIONS)]
        question = f"{number}. {question}" + " Please." * (number % 7)
        if number % 3 == 0:
            records.append({"instruction": question, "input": "", "output": answer, "source": "loop"})
        elif number % 3 == 1:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            records.append({"messages": turns, "source": "chat"})
        else:
            records.append({"text": f"{question} {answer}"})
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of PyTorch wait for each other longer than such a model computes, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModelRef:
    """An untrained Llama with a byte-level BPE tokenizer and a chat template with generation markers."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("random-base")
    bpe = ByteLevelBPETokenizer()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]
    bpe.train_from_iterator([" ".join(pair) for pair in QUESTIONS], vocab_size=400, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(path)
    return BaseModelRef(name="random", path=path, revision=None, fingerprint="random-0")


def _make_adapter(base: BaseModelRef, path: Path, method: str = "lora", seed: int = 1) -> Path:
    """An adapter with random weights, as PEFT saves it."""
    import torch
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(seed)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if method == "qlora" else None
    model = AutoModelForCausalLM.from_pretrained(base.path, quantization_config=quantization)
    config = {
        "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
        "ia3": lambda: IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
        "dora": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, init_lora_weights=False),
        "whole-modules": lambda: LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            use_rslora=True,
            target_modules=["q_proj"],
            modules_to_save=["lm_head", "embed_tokens"],
            init_lora_weights=False,
        ),
        "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }["lora" if method == "qlora" else method]()
    peft_model = get_peft_model(model, config)
    if method == "whole-modules":
        for name, parameter in peft_model.named_parameters():
            if "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    peft_model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def write_records() -> Callable[..., Path]:
    return _write_records


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Path]:
    return _make_adapter


@pytest.fixture(scope="session")
def random_adapter(random_base: BaseModelRef, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make_adapter(random_base, tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture(scope="session")
def held_out_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_records(tmp_path_factory.mktemp("records") / "eval.jsonl")
