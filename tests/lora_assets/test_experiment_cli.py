"""`lora-assets experiment` as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = str(Path(sys.executable).with_name("lora-assets"))


def experiment(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, "experiment", *arguments],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "DATA_ROOT": "data", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_suggestion_needs_nothing_but_a_history(tmp_path: Path) -> None:
    space = {
        "method": {"choices": ["lora", "prefix"]},
        "lora_rank": {"choices": [4, 8]},
        "virtual_tokens": {"choices": [10]},
    }
    tried: list[dict[str, Any]] = [
        {"number": number, "params": {"method": "lora", "lora_rank": rank}, "state": "completed", "value": 1 / rank}
        for number, rank in enumerate([4, 8])
    ]
    (tmp_path / "question.json").write_text(json.dumps({"search_space": space, "trial_history": tried}))
    first = experiment(tmp_path, "suggest", "question.json", "--strategy", "random", "--json")
    assert first.returncode == 0, first.stderr
    chosen = json.loads(first.stdout)
    assert set(chosen) == ({"method", "lora_rank"} if chosen["method"] == "lora" else {"method", "virtual_tokens"})
    again = experiment(tmp_path, "suggest", "question.json", "--strategy", "random", "--json")
    assert again.stdout == first.stdout
    spent = experiment(tmp_path, "suggest", "question.json", "--trials-remaining", "0", "--json")
    assert json.loads(spent.stdout) is None
    assert not (tmp_path / "data").exists()


def test_a_question_that_is_none_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "question.json").write_text('{"search_space": {"learning_rate": {"low": "small"}}}')
    bad = experiment(tmp_path, "suggest", "question.json")
    assert bad.returncode == 1
    assert "question.json" in bad.stderr
    assert "Traceback" not in bad.stderr
