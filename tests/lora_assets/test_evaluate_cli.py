"""`lora-assets evaluate` on the embedded model, as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.base_model.models import BaseModelRef

PROGRAM = str(Path(sys.executable).with_name("lora-assets"))
RECORDS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue is a colour.", "source": "loop"},
    {"messages": [{"role": "user", "content": "Привіт!"}, {"role": "assistant", "content": "Вітаю!"}]},
]


@pytest.fixture
def adapter(tiny_model: BaseModelRef, tmp_path: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model.path), config).save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_evaluate_needs_three_names_and_answers_in_json(
    tiny_model: BaseModelRef, adapter: Path, tmp_path: Path
) -> None:
    dataset = tmp_path / "eval.jsonl"
    dataset.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    suite = tmp_path / "data" / "regressions"
    suite.mkdir(parents=True)
    case = {"id": "never", "prompt": "Hello?", "expect": {"equals": "what it never says"}, "max_new_tokens": 2}
    (suite / "cases.jsonl").write_text(json.dumps(case) + "\n", encoding="utf-8")
    done = subprocess.run(
        [PROGRAM, "evaluate", "--base-model", tiny_model.path, "--adapter", "mine", "--dataset", dataset, "--json"],
        cwd=tmp_path,
        env=os.environ | {"DATA_ROOT": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {"eval_loss", "eval_perplexity", "base_loss", "delta_vs_base_loss", "token_accuracy"} <= report.keys()
    assert report["delta_vs_base_loss"] == pytest.approx(report["eval_loss"] - report["base_loss"])
    assert report["records"] == 2
    assert [failed["id"] for failed in report["failed_regressions"]] == ["never"]
    written = tmp_path / "evaluation-mine"
    assert report["path"] == str(written)
    assert {"report.json", "report.html", "manifest.json"} <= {file.name for file in written.iterdir()}
