"""`lora-assets merge --format gguf` on the embedded model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune.base_model.models import BaseModelRef
from finetune.export.gguf_facts import read_gguf_facts
from lora_assets.cli.app import app


@pytest.fixture
def adapter(tiny_model: BaseModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA adapter of seeded noise."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model.path), config)
    model.save_pretrained(tmp_path / "noise")
    return tmp_path / "noise"


def test_merge_makes_one_gguf_file(tiny_model: BaseModelRef, adapter: Path, tmp_path: Path) -> None:
    arguments = ["merge", "--base-model", str(tiny_model.path), "--adapter", adapter.name, "--output", "out"]
    done = CliRunner().invoke(
        app, [*arguments, "--format", "gguf", "--quantization", "Q4_K_M", "--no-validate", "--json"]
    )
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    file = tmp_path / "out" / "noise-Q4_K_M.gguf"
    assert made["file"]["path"] == str(file)
    assert made["tokenization_equal"] is None
    facts = read_gguf_facts(file)
    assert (facts["file_type"], facts["version"], facts["chat_template"]) == ("MOSTLY_Q4_K_M", "noise", True)


def test_a_quantization_belongs_to_a_gguf(adapter: Path, tmp_path: Path) -> None:
    arguments = ["merge", "--adapter", str(adapter), "--output", "out", "--quantization", "Q8_0"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "--quantization is for --format gguf" in done.stderr
    unknown = CliRunner().invoke(app, [*arguments[:-1], "Q9_X", "--format", "gguf"])
    assert unknown.exit_code == 2
    assert "Q9_X" in unknown.stderr
    assert not (tmp_path / "out").exists()
