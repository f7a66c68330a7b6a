"""`make demo` does what the README says: from exports to a model that answers what it could not."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from finetune.base_model.embedded import EMBEDDED_NAME
from finetune.dataset.models import PreparedDataset
from finetune.evaluation.models import EvalReport
from finetune.export.models import GgufExport, LmStudioExport, MergedModel, OllamaExport
from finetune.planning.models import TrainingPlan
from finetune.publishing import TEMPORARY_MARK, read_manifest
from finetune.registry.models import RegisteredVersion
from finetune.training.models import TrainingResult
from resources.run_log import RunLog
from tests.e2e.conftest import DATES, Loop

pytestmark = pytest.mark.e2e
NEWEST = DATES[-1]


def test_training_shows_on_questions_that_it_never_saw(demo: Loop) -> None:
    report = demo.value("eval_report", NEWEST, EvalReport)
    assert report.eval_loss <= report.base_loss / 2
    assert report.base_exact_match is not None
    assert report.exact_match is not None
    assert report.base_exact_match < 0.1, "the base model must not know the exports' facts"
    assert report.exact_match > 0.5


def test_no_held_out_question_was_trained_on(demo: Loop) -> None:
    prepared = demo.value("merged_dataset", NEWEST, PreparedDataset)
    trained = set(prepared.train_path.read_bytes().splitlines())
    assert not trained & set(prepared.eval_path.read_bytes().splitlines())


def test_every_kind_of_bad_line_is_counted_and_no_line_is_lost(demo: Loop) -> None:
    prepared = demo.value("merged_dataset", NEWEST, PreparedDataset)
    counts = prepared.counts
    assert counts.lines == counts.kept + counts.duplicates + counts.rejected + counts.blank
    assert len(prepared.rejects_by_reason) >= 15
    assert len(prepared.rejects_path.read_bytes().splitlines()) == counts.rejected


def test_each_date_got_a_version_and_the_newest_reigns(demo: Loop) -> None:
    versions = [demo.value("registered_adapter", date, RegisteredVersion) for date in DATES]
    assert [version.version for version in versions] == ["v1", "v2", "v3"]
    assert versions[-1].status == "champion", versions[-1].reason
    assert "champion v2" in versions[-1].reason


def test_every_artifact_is_published_whole(demo: Loop) -> None:
    paths = [
        demo.value("merged_dataset", NEWEST, PreparedDataset).path,
        demo.layout.adapter(demo.value("adapter", NEWEST, TrainingResult).run_id),
        demo.value("eval_report", NEWEST, EvalReport).path,
        demo.value("merged_model", NEWEST, MergedModel).path,
        demo.value("gguf", NEWEST, GgufExport).path,
        demo.value("modelfile", NEWEST, OllamaExport).path,
        demo.value("lmstudio_export", NEWEST, LmStudioExport).path,
    ]
    for path in paths:
        read_manifest(path, verify="hashes")
    assert list(demo.root.rglob(f"*{TEMPORARY_MARK}*")) == []


def test_the_adapter_loads_with_plain_peft(demo: Loop, tiny_model: object) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model.path)  # type: ignore[attr-defined]
    adapter = demo.layout.adapter(demo.value("adapter", NEWEST, TrainingResult).run_id)
    assert PeftModel.from_pretrained(base, adapter).peft_config["default"].peft_type == "LORA"


def test_the_demo_ends_with_a_table_an_answer_and_the_way_to_the_ui(demo: Loop) -> None:
    for asset in ("merged_dataset", "dataset_profile", "training_plan", "adapter", "eval_report", "gguf", "modelfile"):
        assert asset in demo.output
    assert "Versions in the registry" in demo.output
    assert "exported model" in demo.output
    assert "make dev" in demo.output
    assert "Traceback" not in demo.output
    assert "step" in demo.output.lower(), "progress is shown while it trains"


def test_each_training_is_a_completed_row_of_the_run_log(demo: Loop) -> None:
    rows = demo.run_json("runs")
    assert [row["status"] for row in rows] == ["COMPLETED"] * 3
    assert [row["dataset_date"] for row in rows] == DATES[::-1]
    for row in rows:
        assert row["backend"] == "hf-peft"
        assert row["metrics"]["final_loss"] > 0
        assert Path(row["adapter_path"]).is_dir()
        assert all(Path(path).is_file() for path in row["dataset_paths"])
    shown = demo.run("runs")
    assert "Local Training (PEFT)" in shown.stdout


def test_a_second_demo_trains_nothing_again(demo: Loop) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.root.rglob("adapter_model.safetensors")}
    again = demo.run("demo", "--json")
    assert again.returncode == 0, again.stderr
    # Standard output is the document's alone.
    assert again.stderr.count("unchanged since the last run, reused") == 2
    (run,) = json.loads(again.stdout)["runs"]
    assert run["status"] == "SUCCESS"
    reused = {step["asset"] for step in run["steps"] if step["figures"].get("reused")}
    assert {"adapter", "merged_model", "gguf"} <= reused
    assert {path: path.stat().st_mtime_ns for path in demo.root.rglob("adapter_model.safetensors")} == before
    assert len(demo.run_json("runs")) == 3


def tree(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file() and "postgres" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_dry_run_tells_what_is_stale_and_changes_nothing(demo: Loop, tmp_path: Path) -> None:
    settings = {"EVAL_FRACTION": "0.2"}
    before = tree(demo.root)
    stale = demo.run_json("run", "--dry-run", **settings)
    assert stale["to_make"] == [NEWEST]
    assert {state["state"] for state in stale["dates"]} == {"stale"}
    assert demo.run_json("run", "--all", "--dry-run", **settings)["to_make"] == DATES[::-1], "the newest first"
    exports = tmp_path / "exports"
    shutil.copytree(demo.layout.exports, exports)
    (exports / "brain_dataset_2026-06-20.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    fresh = demo.run_json("run", "--latest", "--dry-run", EXPORTS_DIR=str(exports))
    assert fresh["to_make"] == ["2026-06-20"]
    assert tree(demo.root) == before


def test_a_version_promoted_by_hand_is_exported_by_the_next_run(demo: Loop, loop: Loop) -> None:
    root = loop.root
    shutil.rmtree(root)
    shutil.copytree(demo.root, root, symlinks=True, ignore=shutil.ignore_patterns("postgres"))
    first = demo.value("registered_adapter", DATES[0], RegisteredVersion)
    shutil.rmtree(root / "models" / first.run_id / "lmstudio")
    assert loop.run_json("registry", "promote", "v1", "--reason", "for the test")["status"] == "champion"
    (stale,) = [state for state in loop.run_json("run", "--dry-run")["dates"] if state["state"] == "stale"]
    assert stale["date"] == DATES[0]
    assert "champion, but not exported" in stale["reason"]
    exported = loop.run("run")
    assert exported.returncode == 0, exported.stderr
    assert "(reused)" in exported.stdout
    assert (root / "models" / first.run_id / "lmstudio" / "manifest.json").is_file()
    assert loop.run_json("run", "--dry-run")["to_make"] == []
    other = loop.run_json("run", "--dry-run", GGUF_QUANTIZATION="Q8_0")
    assert other["to_make"] == [DATES[0]], "another quantization is another export"
    assert loop.run_json("registry", "rollback")["version"] == "v3"


def test_a_dry_run_needs_no_training_library(demo: Loop, tmp_path: Path) -> None:
    for name in ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('a dry run must not import this')\n")
    assert demo.run_json("run", "--dry-run", PYTHONPATH=str(tmp_path))["status"] == "dry_run"


def test_what_a_training_took_is_logged_and_corrects_the_next_plan(demo: Loop) -> None:
    first, *_, last = (demo.value("training_plan", date, TrainingPlan) for date in DATES)
    took = demo.value("adapter", DATES[0], TrainingResult)
    assert first.memory_estimate.correction == 1.0
    assert last.memory_estimate.correction != 1.0
    assert any(line.startswith("memory times") for line in last.explanations)
    assert last.cost is not None
    assert last.cost.throughput.startswith("measured")
    log = RunLog(data_dir=str(demo.root))
    try:
        oldest = log.measurements(EMBEDDED_NAME, "cpu")[-1]
    finally:
        log.close()
    assert (oldest.method, oldest.device) == ("lora", "cpu")
    assert oldest.peak_memory_gb == took.peak_memory_gb
    assert oldest.tokens_per_second == took.tokens_per_second
    assert oldest.estimated_memory_gb == pytest.approx(first.memory_estimate.vram_gb)
