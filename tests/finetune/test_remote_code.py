"""A base model that only its own Python files can load: refused everywhere unless it is trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import BaseModelError, ExportError

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OursConfig(LlamaConfig):
    model_type = "ours_for_tests"

class Ours(LlamaForCausalLM):
    config_class = OursConfig
"""
REFUSED = r"trust_remote_code.*Set TRUST_REMOTE_CODE=true"


@pytest.fixture(scope="module")
def untrusted(tiny_model: BaseModelRef, tmp_path_factory: pytest.TempPathFactory) -> BaseModelRef:
    directory = shutil.copytree(tiny_model.path, tmp_path_factory.mktemp("ours") / "model")
    (directory / "ours.py").write_text(CODE)
    config = json.loads((directory / "config.json").read_text())
    named = {"AutoConfig": "ours.OursConfig", "AutoModelForCausalLM": "ours.Ours"}
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "ours_for_tests", "auto_map": named}))
    return BaseModelRef(name="ours", path=directory, revision=None, fingerprint="1" * 64)


def trusted(base_model: BaseModelRef) -> BaseModelRef:
    return base_model.model_copy(update={"trust_remote_code": True})


@pytest.fixture(scope="module")
def adapter(untrusted: BaseModelRef, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model

    from finetune.evaluation.adapters import load_base

    directory = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(load_base(trusted(untrusted)), config).save_pretrained(directory, save_embedding_layers=False)
    return directory


def test_evaluation_loads_it_only_if_it_is_trusted(untrusted: BaseModelRef) -> None:
    from finetune.evaluation.adapters import load_base

    with pytest.raises(BaseModelError, match=REFUSED):
        load_base(untrusted)
    assert type(load_base(trusted(untrusted))).__name__ == "Ours"


def test_training_loads_it_only_if_it_is_trusted(untrusted: BaseModelRef) -> None:
    from finetune.planning.models import TrialConfig
    from finetune.training.adapters import load_base_model

    with pytest.raises(BaseModelError, match=REFUSED):
        load_base_model(untrusted, TrialConfig(trial_id="t"))
    assert type(load_base_model(trusted(untrusted), TrialConfig(trial_id="t"))).__name__ == "Ours"


def test_a_merge_through_peft_loads_it_only_if_it_is_trusted(
    untrusted: BaseModelRef, adapter: Path, tmp_path: Path
) -> None:
    from finetune.export.peft_merge import merge_through_peft

    config = json.loads((adapter / "adapter_config.json").read_text())
    with pytest.raises(BaseModelError, match=REFUSED):
        merge_through_peft(untrusted, adapter, config, tmp_path)
    assert merge_through_peft(trusted(untrusted), adapter, config, tmp_path) > 0


def test_merge_and_gguf_verification_load_it_only_if_it_is_trusted(
    untrusted: BaseModelRef, adapter: Path, tmp_path: Path
) -> None:
    from finetune.export.merge import merge_adapter
    from finetune.export.verify import Reference

    def merged(base_model: BaseModelRef) -> Path:
        return merge_adapter(
            base_model=base_model,
            adapter_path=adapter,
            output_dir=tmp_path / "merged",
            run_id="r1",
            validate_on=["What is the capital of Ukraine?"],
        ).path

    with pytest.raises(ExportError, match=REFUSED):
        merged(untrusted)
    assert not (tmp_path / "merged").exists()
    path = merged(trusted(untrusted))

    with pytest.raises(ExportError, match=REFUSED):
        Reference(path, [[{"role": "user", "content": "Why?"}]])
    assert Reference(path, [[{"role": "user", "content": "Why?"}]], trust_remote_code=True).answers
