"""What the members of the tests' ensembles are trained on, and how."""

from __future__ import annotations

import json
from pathlib import Path

FIXED = {"max_steps": 4, "micro_batch": 2, "accumulation": 1, "max_length": 64, "lora_rank": 4, "learning_rate": 1e-3}


def records(path: Path, count: int = 40) -> Path:
    lines = [json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}."}) + "\n" for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return path
