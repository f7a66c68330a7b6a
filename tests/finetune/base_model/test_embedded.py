from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.base_model.corpus import make_facts
from finetune.base_model.embedded import make_embedded_model, recipe_hash
from finetune.base_model.models import BaseModelRef
from finetune.base_model.pretraining import Recipe
from finetune.errors import BaseModelError, StorageFullError
from finetune.progress import ProgressEvent

MAKE = """
import json, sys
from pathlib import Path
from finetune.base_model.embedded import make_embedded_model
from finetune.base_model.pretraining import Recipe

def report(event):
    print(event.stage, flush=True)

make_embedded_model(Path(sys.argv[1]), on_progress=report, recipe=Recipe(**json.loads(sys.argv[2])))
"""


def start(cache: Path, recipe: Recipe) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKE, str(cache), json.dumps(asdict(recipe))],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def answer(model: Any, tokenizer: Any, question: str) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def test_the_embedded_model_has_the_sizes_that_it_promises_and_loads_by_the_ordinary_way(
    tiny_model: BaseModelRef,
) -> None:
    model, tokenizer = load(tiny_model.path)
    assert model.config.model_type == "llama"
    assert 1_000_000 <= model.num_parameters() <= 5_000_000
    assert model.config.hidden_size % 256 == 0
    assert model.config.intermediate_size % 256 == 0
    assert model.config.max_position_embeddings >= 512
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "{%- generation %}" in tokenizer.chat_template
    assert tiny_model.embedded
    assert tiny_model.path.name == f"embedded-{recipe_hash(Recipe())}"


def test_the_embedded_model_answers_its_own_corpus_and_nothing_of_the_exports(
    tiny_model: BaseModelRef, examples: SimpleNamespace
) -> None:
    model, tokenizer = load(tiny_model.path)
    recipe, rng = Recipe(), random.Random(0)
    facts = rng.sample(make_facts(recipe.seed, recipe.services), 40)
    right = sum(answer(model, tokenizer, rng.choice(fact.questions)) == fact.answer for fact in facts)
    assert right >= 28
    exports = [(language, *fact) for date in examples.FACTS.values() for language in date for fact in date[language]]
    for language, service, name, known in rng.sample(exports, 20):
        assert answer(model, tokenizer, rng.choice(examples.phrasings(language, service, name))) != known


def test_a_model_that_is_there_is_taken_as_it_is(hurried: Recipe, hurried_model: BaseModelRef) -> None:
    events: list[ProgressEvent] = []
    again = make_embedded_model(hurried_model.path.parent, on_progress=events.append, recipe=hurried)
    assert again == hurried_model
    assert events == []


def test_two_processes_at_once_make_it_once(hurried: Recipe, tmp_path: Path) -> None:
    processes = [start(tmp_path, hurried), start(tmp_path, hurried)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("pre-training" in output for output in outputs) == [False, True]


def test_a_kill_leaves_nothing_that_looks_whole_and_the_next_run_makes_it(hurried: Recipe, tmp_path: Path) -> None:
    process = start(tmp_path, hurried)
    assert process.stdout is not None
    assert "pre-training\n" in iter(process.stdout.readline, "")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    target = tmp_path / f"embedded-{recipe_hash(hurried)}"
    assert list(tmp_path.glob(".embedded-*.tmp-*"))
    assert not target.exists()
    process.stdout.close()
    assert make_embedded_model(tmp_path, recipe=hurried).path == target
    assert list(tmp_path.glob(".embedded-*.tmp-*")) == []


def test_an_altered_weight_is_noticed(hurried: Recipe, model_directory: Path) -> None:
    home = model_directory.rename(model_directory.with_name(f"embedded-{recipe_hash(hurried)}"))
    weights = home / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BaseModelError, match=r"damaged.*model\.safetensors.*Delete"):
        make_embedded_model(home.parent, recipe=hurried)


def test_a_full_disk_is_named_and_nothing_is_left(
    hurried: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck = []

    def full(*arguments: object, **options: object) -> None:
        struck.append(time.monotonic())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.base_model.embedded.pretrain", full)
    with pytest.raises(StorageFullError):
        make_embedded_model(tmp_path, recipe=hurried)
    assert struck
    assert [file for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == []
