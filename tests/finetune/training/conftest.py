from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from finetune.base_model.models import BaseModelRef
from finetune.dataset.models import Counts, PreparedDataset
from finetune.planning.models import MemoryEstimate, TrainingPlan, TrialConfig
from finetune.training.models import TrainingRequest

TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{% else %}
{{ message.content + '<|im_end|>' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# The first of the special tokens, behind the 256 bytes and the merges.
END = 270

MakeRequest = Callable[..., TrainingRequest]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is slower with two threads, above all on a busy machine; equal bits need equal threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> BaseModelRef:
    """A random Llama of about 100,000 parameters: what training does is tested here, not what it learns."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=END,
        )
    ).save_pretrained(directory)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["what is the answer"] * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_end|>", "<|im_start|>", "<pad>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return BaseModelRef(name="small", path=directory, revision=None, fingerprint="0" * 64)


def records_of(count: int) -> list[dict[str, Any]]:
    """Records of different lengths."""
    return [
        {"instruction": f"What is the answer number {i}?", "output": f"It is {i}{' indeed' * (i % 7)}."}
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def make_request_at(small_model: BaseModelRef) -> MakeRequest:
    """Requests for trainings of a few steps under a directory; keyword arguments change the trial."""

    def make(
        tmp_path: Path,
        *,
        records: list[dict[str, Any]] | None = None,
        place: str = "a",
        base_model: BaseModelRef = small_model,
        checkpoint_seconds: float = 120.0,
        **trial: Any,
    ) -> TrainingRequest:
        records = records_of(24) if records is None else records
        directory = tmp_path / place / "prepared"
        directory.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (directory / "train.jsonl").write_text("".join(lines))
        counts = Counts(lines=len(records), train=len(records), eval=0, duplicates=0, rejected=0, blank=0)
        settings = {
            "lora_rank": 4,
            "learning_rate": 5e-3,
            "micro_batch": 4,
            "accumulation": 2,
            "epochs": 3,
            "max_length": 128,
            **trial,
        }
        config = TrialConfig(trial_id="t", **settings)
        estimate = MemoryEstimate(vram_gb=0, fits=None, limit_gb=None, model_params=0, trainable_params=0, parts={})
        return TrainingRequest(
            run_id="20260601-0123456789",
            date="2026-06-01",
            dataset=PreparedDataset(
                path=directory,
                date="2026-06-01",
                fingerprint="f" * 64,
                window_dates=["2026-06-01"],
                counts=counts,
                rejects_by_reason={},
                rejects_by_file={},
            ),
            plan=TrainingPlan(
                trial_config=config,
                search_space={},
                memory_estimate=estimate,
                explanations=[],
                estimated_steps=0,
                estimated_tokens=None,
            ),
            base_model=base_model,
            adapter_dir=tmp_path / place / "adapter",
            work_dir=tmp_path / place / "work",
            checkpoint_seconds=checkpoint_seconds,
        )

    return make


@pytest.fixture
def make_request(tmp_path: Path, make_request_at: MakeRequest) -> MakeRequest:
    """`make_request_at` the test's own directory."""
    return functools.partial(make_request_at, tmp_path)
