"""A run in a process of its own that is asked to end while it waits for another run's GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg

from finetune.base_model.models import BaseModelRef
from lora_assets.runner import DAGSTER_YAML

PROGRAM = str(Path(sys.executable).with_name("lora-assets"))


def waiters(instance: dg.DagsterInstance) -> set[str]:
    """The runs that wait for a slot."""
    return {step.run_id for step in instance.event_log_storage.get_concurrency_info("gpu").pending_steps} - {
        "other-run"
    }


def test_a_run_that_waits_for_a_slot_of_the_gpu_ends_soon_after_it_is_asked_to(
    tmp_path: Path, tiny_model: BaseModelRef
) -> None:
    exports = tmp_path / "datasets" / "brain"
    exports.mkdir(parents=True)
    records = [{"instruction": f"Question {i}?", "output": f"Answer {i}."} for i in range(40)]
    (exports / "brain_dataset_2026-06-01.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    home = tmp_path / "dagster"
    home.mkdir()
    (home / "dagster.yaml").write_bytes(DAGSTER_YAML.read_bytes())
    with dg.DagsterInstance.from_config(str(home)) as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 1)
        held = instance.event_log_storage.claim_concurrency_slot("gpu", "other-run", "its-step")
        assert held.is_claimed
        waiting = subprocess.Popen(
            [PROGRAM, "run", "--latest"],
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "DATA_ROOT": str(tmp_path),
                "BASE_MODEL_NAME": str(tiny_model.path),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while not waiters(instance):
                assert waiting.poll() is None
                time.sleep(0.1)
            waiting.send_signal(signal.SIGTERM)
            _, told = waiting.communicate(timeout=180)
        finally:
            waiting.kill()
        assert waiting.returncode == 75, told
        assert "asked to end while no step was at work" in told
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.CANCELED
        assert not waiters(instance)
