from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.adapter_files import adapter_hash
from finetune.base_model.models import BaseModelRef
from finetune.export.serving import vllm_refusal
from finetune.progress import ProgressEvent
from finetune.publishing import read_manifest
from finetune.training.attempt import read_records
from finetune.training.models import TrainingRequest, TrainingResult
from finetune.training.sft import dry_run, train_adapter

MakeRequest = Callable[..., TrainingRequest]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, make_request_at: Callable[..., TrainingRequest]
) -> tuple[TrainingRequest, TrainingResult, list[ProgressEvent]]:
    request = make_request_at(tmp_path_factory.mktemp("trained"))
    events: list[ProgressEvent] = []
    return request, train_adapter(request, on_progress=events.append), events


Trained = tuple[TrainingRequest, TrainingResult, list[ProgressEvent]]


def logits_of(request: TrainingRequest, adapter: Path | None) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request.base_model.path)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8]])).logits


def test_plain_peft_loads_the_adapter_and_it_changes_the_model(trained: Trained) -> None:
    import torch

    request, _, _ = trained
    assert not torch.allclose(logits_of(request, request.adapter_dir), logits_of(request, None), atol=1e-3)


def test_the_loss_falls_and_every_step_is_logged(trained: Trained) -> None:
    request, result, _ = trained
    assert result.status == "completed"
    assert result.training_steps == 9
    losses = [point.loss for point in result.loss_curve]
    assert losses[-1] < losses[0] - 0.3
    logged = [json.loads(line) for line in (request.adapter_dir / "training_log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in logged] == [(p.step, p.loss) for p in result.loss_curve]


def test_the_published_directory_holds_all_that_belongs_to_an_adapter(trained: Trained) -> None:
    request, result, _ = trained
    manifest = read_manifest(request.adapter_dir, kind="adapter", verify="hashes")
    assert set(manifest.outputs) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss_curve.png",
        "training_log.jsonl",
    }
    assert manifest.parameters["lora_rank"] == 4
    assert result.adapter_hash == adapter_hash(request.adapter_dir)
    config = json.loads((request.adapter_dir / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "small"
    assert (request.adapter_dir / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((request.work_dir / "tensorboard").glob("events.*"))
    assert not list(request.work_dir.rglob("checkpoint-*"))


def test_the_model_card_has_the_hub_s_metadata(trained: Trained) -> None:
    from huggingface_hub import ModelCard

    request, _, _ = trained
    card = ModelCard.load(request.adapter_dir / "README.md")
    assert card.data.base_model == "small"
    assert card.data.library_name == "peft"
    assert "| lora_rank | 4 |" in card.text


def test_the_adapter_lies_as_vllm_wants_it_and_the_card_says_how_to_serve_it(trained: Trained) -> None:
    """What vllm/lora/peft_helper.py and vllm/lora/lora_model.py of vLLM 0.26 ask of an adapter's directory."""
    from safetensors import safe_open

    request, result, _ = trained
    config = json.loads((request.adapter_dir / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    assert {"lora_alpha", "target_modules"} <= config.keys()
    assert vllm_refusal(config) is None
    with safe_open(request.adapter_dir / "adapter_model.safetensors", "np") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            assert name.startswith("base_model.model.")
            module, side, kind = name.rsplit(".", 2)
            assert module.rsplit(".", 1)[-1] in config["target_modules"]
            assert (side in ("lora_A", "lora_B"), kind) == (True, "weight")
            assert config["r"] in weights.get_slice(name).get_shape()
    # Half a tokenizer would be taken for the adapter's own.
    assert not list(request.adapter_dir.glob("*token*"))
    card = (request.adapter_dir / "README.md").read_text(encoding="utf-8")
    assert f"--enable-lora --max-lora-rank 8 --lora-modules {result.run_id}=path/to/this/directory" in card


def test_progress_tells_loss_rate_speed_and_time_left(trained: Trained) -> None:
    _, _, events = trained
    last = events[-1]
    assert (last.done, last.total, last.unit) == (9, 9, "steps")
    assert {"loss", "learning_rate", "tokens_per_second", "eta_seconds", "peak_memory_gb"} <= set(last.figures)


def test_a_complete_adapter_is_not_trained_again(trained: Trained) -> None:
    request, result, _ = trained
    assert train_adapter(request) == result.model_copy(update={"reused": True})


def test_a_dry_run_counts_the_steps_and_makes_nothing(make_request: MakeRequest) -> None:
    request = make_request()
    result = dry_run(request)
    assert (result.status, result.training_steps, result.adapter_path) == ("dry_run", 9, None)
    assert not request.adapter_dir.exists()
    assert not request.work_dir.exists()


@pytest.mark.parametrize(
    "trial",
    [
        {"method": "qlora"},
        {"method": "prefix", "virtual_tokens": 4},
        {"method": "ia3"},
        {"use_dora": True},
        {"use_rslora": True},
        {"use_pissa": True},
        {"gradient_checkpointing": True},
        {"packing": True},
    ],
    ids=lambda trial: "-".join(map(str, trial.values())) if "method" in trial else next(iter(trial)),
)
def test_every_method_learns_and_plain_peft_repeats_what_it_learned(
    make_request: MakeRequest, trial: dict[str, Any]
) -> None:
    import torch

    request = make_request(max_steps=4, learning_rate=2e-2, **trial)
    result = train_adapter(request)
    losses = [point.loss for point in result.loss_curve]
    assert losses[-1] < losses[0]
    assert not torch.allclose(logits_of(request, request.adapter_dir), logits_of(request, None), atol=1e-4)


def test_records_of_every_format_are_trained_on_the_assistant_s_side_alone(make_request: MakeRequest) -> None:
    from tokenizers import Tokenizer

    turns = [
        ("user", "human", "Q4?"),
        ("assistant", "gpt", "A4."),
        ("user", "human", "Q5?"),
        ("assistant", "gpt", "A5."),
    ]
    records = [
        {"instruction": "Q1?", "input": "I1", "output": "A1."},
        {"prompt": "Q2?", "completion": "A2."},
        {"system": "S3", "instruction": "Q3?", "output": "A3."},
        {"messages": [{"role": role, "content": text} for role, _, text in turns]},
        {"conversations": [{"from": name, "value": text} for _, name, text in turns]},
        {"text": "T6."},
    ]
    request = make_request(records=records, micro_batch=6, accumulation=1, max_steps=1)
    data = read_records(request)
    tokenizer = Tokenizer.from_file(str(request.base_model.path / "tokenizer.json"))
    ends = data.offsets[1:-1]
    learned = [
        tokenizer.decode([token for token in labels.tolist() if token >= 0], skip_special_tokens=False)
        for labels in np.split(data.labels, ends)
    ]
    end = "<|im_end|>"
    several = f"A4.{end}A5.{end}"
    assert learned == [f"A1.{end}", f"A2.{end}", f"A3.{end}", several, several, f"T6.{end}"]
    # The trainer's own first batch, of all six, is compared with these labels before the step.
    assert train_adapter(request).training_steps == 1


def test_packed_and_padded_batches_give_the_same_losses(make_request: MakeRequest) -> None:
    # Every step sees all 24 records, whatever their order.
    def losses(place: str, packing: bool) -> list[float]:
        request = make_request(place=place, packing=packing, micro_batch=24, accumulation=1, max_steps=3)
        return [point.loss for point in train_adapter(request).loss_curve]

    assert losses("packed", packing=True) == pytest.approx(losses("padded", packing=False), abs=2e-4)


# The random Llama of `small_model`, in float32 on a CPU. The tolerance leaves room for other libraries of linear
# algebra, and none for another learning rate, order of records or mask.
GOLDEN = [5.7993, 5.8132, 5.6865, 5.5219, 5.3957, 5.3375, 5.2925, 5.2904, 5.2401]
TOLERANCE = 5e-3


def test_the_curve_of_a_fixed_training_is_the_golden_one(trained: Trained) -> None:
    _, result, _ = trained
    assert [point.loss for point in result.loss_curve] == pytest.approx(GOLDEN, abs=TOLERANCE)


# The embedded model with all 24 records in every step. It was pre-trained on the machine at hand, where rounding may
# lead to a somewhat other model: the tolerance tells a rate that is a fifth higher, no more.
EMBEDDED_GOLDEN = [7.6242, 7.6242, 6.4141, 5.1056, 4.0205, 3.3566]
EMBEDDED_TOLERANCE = 0.5


@pytest.mark.parametrize(("rate", "golden"), [(5e-3, True), (6e-3, False)])
def test_the_curve_of_the_embedded_model_is_the_golden_one_at_its_rate_alone(
    make_request: MakeRequest, tiny_model: BaseModelRef, rate: float, golden: bool
) -> None:
    settings: dict[str, Any] = {"micro_batch": 24, "accumulation": 1, "max_steps": 6}
    result = train_adapter(make_request(base_model=tiny_model, learning_rate=rate, **settings))
    losses = [point.loss for point in result.loss_curve]
    assert (losses == pytest.approx(EMBEDDED_GOLDEN, abs=EMBEDDED_TOLERANCE)) == golden


@pytest.mark.parametrize("change", [{"learning_rate": 5.5e-3}, {"seed": 43}], ids=lambda change: next(iter(change)))
def test_the_golden_curve_tells_a_training_that_is_slightly_another(
    make_request: MakeRequest, change: dict[str, Any]
) -> None:
    result = train_adapter(make_request(**change))
    assert [point.loss for point in result.loss_curve] != pytest.approx(GOLDEN, abs=TOLERANCE)
