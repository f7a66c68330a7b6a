from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.planning.models import TrialConfig
from h2o_gateway.studio import configuration, refusals, write_configuration


def written(trial: TrialConfig, path: Path) -> dict[str, Any]:
    content = configuration(
        trial,
        name="exp",
        backbone="org/model",
        revision="abc",
        table=Path("/data/x.parquet"),
        output=Path("/data/out"),
        trust_remote_code=False,
        workers=4,
    )
    write_configuration(path, content)
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_every_field_of_the_configuration_is_one_of_h2o_llm_studios(tmp_path: Path) -> None:
    fields = json.loads(Path(__file__).with_name("h2o_fields.json").read_text())["fields"]
    found = written(TrialConfig(trial_id="t"), tmp_path / "cfg.yaml")
    assert set(found) <= set(fields)
    for section, content in found.items():
        if isinstance(content, dict):
            assert set(content) <= set(fields[section]), section
        else:
            assert fields[section] is None, section


def test_the_plan_arrives_under_h2o_llm_studios_names(tmp_path: Path) -> None:
    trial = TrialConfig(
        trial_id="t",
        method="qlora",
        lora_rank=32,
        lora_alpha=48,
        lora_dropout=0.1,
        use_rslora=True,
        use_dora=True,
        target_modules=["q_proj", "v_proj"],
        learning_rate=1e-4,
        lr_schedule="linear",
        warmup_ratio=0.1,
        weight_decay=0.01,
        optimizer="paged_adamw_8bit",
        micro_batch=2,
        accumulation=8,
        epochs=4,
        max_length=2048,
        precision="bf16",
        gradient_checkpointing=True,
        attention="flash_attention_2",
        seed=7,
    )
    found = written(trial, tmp_path / "cfg.yaml")
    expected = {
        "learning_rate": 1e-4,
        "schedule": "Linear",
        "warmup_epochs": 0.4,
        "weight_decay": 0.01,
        "optimizer": "AdamW8bit",
        "batch_size": 2,
        "grad_accumulation": 8,
        "epochs": 4,
        "attention_implementation": "flash_attention_2",
        "lora": True,
        "lora_r": 32,
        "lora_alpha": 48,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "use_dora": True,
        "lora_target_modules": "q_proj,v_proj",
    }
    assert {name: found["training"][name] for name in expected} == expected
    assert found["tokenizer"]["max_length"] == 2048
    assert found["architecture"]["backbone_dtype"] == "int4"
    assert found["architecture"]["gradient_checkpointing"] is True
    assert found["environment"] == {
        "gpus": ["0"],
        "mixed_precision": True,
        "mixed_precision_dtype": "bfloat16",
        "huggingface_branch": "abc",
        "number_of_workers": 4,
        "seed": 7,
        "trust_remote_code": False,
    }


@pytest.mark.parametrize(("precision", "dtype", "mixed"), [("fp32", "float32", False), ("bf16", "bfloat16", True)])
def test_precision_is_the_plans(tmp_path: Path, precision: Any, dtype: str, mixed: bool) -> None:
    found = written(TrialConfig(trial_id="t", precision=precision), tmp_path / "cfg.yaml")
    assert found["architecture"]["backbone_dtype"] == dtype
    assert found["environment"]["mixed_precision"] is mixed
    assert found["training"]["lora_target_modules"] == ""


CHANGES: dict[str, Any] = {
    "method": "qlora",
    "lora_rank": 9,
    "lora_alpha": 17,
    "lora_dropout": 0.3,
    "use_rslora": True,
    "use_dora": True,
    "use_pissa": True,
    "target_modules": ["q_proj"],
    "learning_rate": 0.5,
    "lr_schedule": "linear",
    "warmup_ratio": 0.7,
    "weight_decay": 0.6,
    "optimizer": "adamw_8bit",
    "micro_batch": 33,
    "accumulation": 34,
    "epochs": 35,
    "max_steps": 36,
    "max_length": 37,
    "packing": True,
    "precision": "bf16",
    "gradient_checkpointing": True,
    "attention": "eager",
    "seed": 43,
}
NO_MATTER = {"trial_id", "task", "virtual_tokens"}


@pytest.mark.parametrize("field", sorted(TrialConfig.model_fields.keys() - NO_MATTER))
def test_no_field_of_a_plan_is_passed_over_in_silence(tmp_path: Path, field: str) -> None:
    plain, changed = TrialConfig(trial_id="t"), TrialConfig(trial_id="t", **{field: CHANGES[field]})
    path = tmp_path / "cfg.yaml"
    assert refusals(changed) or written(changed, path) != written(plain, path)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "ia3"},
        {"use_pissa": True},
        {"packing": True},
        {"max_steps": 10},
        {"epochs": 1.5},
        {"lora_alpha": 12.5},
        {"optimizer": "adafactor"},
        {"seed": 1 << 32},
        {"weight_decay": -0.1},
        {"target_modules": []},
        {"lora_rank": 1 << 31},
        {"accumulation": 10**400},
        {"epochs": 1e308},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_h2o_llm_studio_cannot_do_is_named(change: dict[str, Any]) -> None:
    assert refusals(TrialConfig(trial_id="t")) == []
    [reason] = refusals(TrialConfig(trial_id="t", **change))
    assert reason.startswith(f"config.{next(iter(change))}: H2O LLM Studio ")
