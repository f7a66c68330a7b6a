"""Tasks of lm-eval, written here, because those of the hub need the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import ConfigurationError, RemoteError
from finetune.evaluation.evaluate import evaluate_adapter
from finetune.evaluation.models import EvalReport
from finetune.evaluation.tasks import EvalTasks

TASK = """
task: which_word
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["Blue.", "Семь.", "seven"]
metric_list:
  - metric: acc
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "tasks"
    made.mkdir()
    rows = [{"question": f"{number}. Which word?", "answer": number % 3} for number in range(12)]
    data = made / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (made / "which_word.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return made


def evaluate(base: BaseModelRef, adapter: Path, dataset: Path, output: Path, tasks: EvalTasks) -> EvalReport:
    return evaluate_adapter(
        base_model=base,
        adapter_path=adapter,
        dataset=dataset,
        output_dir=output,
        run_id="run-1",
        tasks=tasks,
        max_length=512,
        sample_answers=0,
    )


def by_hand(model: Any, tokenizer: Any, directory: Path) -> float:
    """Share of the task's questions for which the right word is the likeliest."""
    import torch

    rows = [json.loads(line) for line in (directory / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    right = 0
    for row in rows:
        sums = []
        for choice in ("Blue.", "Семь.", "seven"):
            prompt = tokenizer(row["question"])["input_ids"]
            # The harness joins question and choice by a space.
            whole = tokenizer(f"{row['question']} {choice}")["input_ids"]
            with torch.no_grad():
                chances = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(chances[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        right += max(range(3), key=sums.__getitem__) == row["answer"]
    return right / len(rows)


def test_tasks_are_put_to_base_and_adapter_and_stand_in_the_report(
    random_base: BaseModelRef, random_adapter: Path, held_out_file: Path, directory: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tasks = EvalTasks(["which_word"], directory)
    report = evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", tasks)
    assert [(score.task, score.metric) for score in report.tasks] == [("which_word", "acc")]
    model = AutoModelForCausalLM.from_pretrained(random_base.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(random_base.path)
    assert report.tasks[0].base == pytest.approx(by_hand(model, tokenizer, directory))
    adapted = PeftModel.from_pretrained(model, str(random_adapter)).eval()
    assert report.tasks[0].adapter == pytest.approx(by_hand(adapted, tokenizer, directory))
    assert "which_word" in (report.path / "report.html").read_text(encoding="utf-8")

    assert evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", tasks).reused
    with (directory / "data.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"question": "More?", "answer": 0}) + "\n")
    assert not evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", tasks).reused


def test_an_unknown_task_is_named(
    random_base: BaseModelRef, random_adapter: Path, held_out_file: Path, directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="knows no task unheard_of"):
        evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", EvalTasks(["unheard_of"], directory))
    assert not (tmp_path / "out").exists()


def test_a_task_without_its_data_says_where_they_come_from(
    random_base: BaseModelRef, random_adapter: Path, held_out_file: Path, directory: Path, tmp_path: Path
) -> None:
    (directory / "data.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=r"cannot run which_word.*data\.jsonl"):
        evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", EvalTasks(["which_word"], directory))


def test_an_unreachable_hub_is_worth_another_try(
    random_base: BaseModelRef,
    random_adapter: Path,
    held_out_file: Path,
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*arguments: Any, **options: Any) -> Any:
        # What `datasets` raises after its own tries.
        raise ConnectionError("Couldn't reach 'somebody/something' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(RemoteError, match="which_word cannot be fetched"):
        evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", EvalTasks(["which_word"], directory))


def test_a_missing_directory_and_a_missing_harness_are_named_before_anything_is_loaded(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="directory of evaluation tasks is missing"):
        EvalTasks(["which_word"], tmp_path / "nowhere").fingerprint()
    assert EvalTasks([], tmp_path / "nowhere").fingerprint() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"lora-assets\[lm-eval\]"):
        EvalTasks(["which_word"], directory).fingerprint()
