"""Tokenizers that adapters bring along, with added tokens and a chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import ArtifactError
from finetune.export.merge import merge_adapter
from tests.finetune.export.adapters import lora, weights


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_added_tokens_travel_with_the_adapters_tokenizer(base: BaseModelRef, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    before = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    model = AutoModelForCausalLM.from_pretrained(base.path)
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(
        base_model=base,
        adapter_path=tmp_path / "adapter",
        output_dir=tmp_path / "m",
        run_id="r",
        validate_on=["What is <new>?"],
    )
    assert weights(merged.path)["model.embed_tokens.weight"].shape[0] == before + 1
    assert AutoTokenizer.from_pretrained(merged.path).encode("<new>", add_special_tokens=False) == [before]


@pytest.mark.parametrize("inside", [False, True], ids=["a file", "in the tokenizer's configuration"])
def test_a_tokenizer_of_the_adapters_brings_its_chat_template(base: BaseModelRef, tmp_path: Path, inside: bool) -> None:
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template = "<new>{{ messages[0]['content'] }}"
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base.path)
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(1)
    get_peft_model(model, lora(target_modules=["q_proj"])).save_pretrained(adapter)
    tokenizer.save_pretrained(adapter, save_jinja_files=not inside)
    assert (adapter / "chat_template.jinja").is_file() is not inside
    merged = merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    assert AutoTokenizer.from_pretrained(merged.path).chat_template == tokenizer.chat_template


def test_tokens_without_embeddings_are_refused(base: BaseModelRef, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    rows = json.loads((base.path / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<new {number}>" for number in range(rows - len(tokenizer) + 1)])
    grown = tmp_path / "adapter"
    shutil.copytree(adapter, grown)
    tokenizer.save_pretrained(grown)
    with pytest.raises(ArtifactError, match=f"has {rows + 1} tokens, but the merged model has {rows} rows"):
        merge_adapter(base_model=base, adapter_path=grown, output_dir=tmp_path / "m", run_id="r")
    assert not (tmp_path / "m").exists()


def test_a_damaged_tokenizer_is_named(base: BaseModelRef, adapter: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "base"
    shutil.copytree(base.path, damaged)
    (damaged / "tokenizer.json").write_text("{}")
    other = base.model_copy(update={"path": damaged})
    with pytest.raises(ArtifactError, match=r"unreadable tokenizer.*tokenizer\.json"):
        merge_adapter(base_model=other, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    assert not (tmp_path / "m").exists()
