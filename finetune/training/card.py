"""The adapter's README.md: a model card in the format of the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.training.models import TrainingRequest, TrainingResult


def model_card(request: TrainingRequest, result: TrainingResult) -> str:
    """The model card: what the adapter was trained on, how, and what came out.

    The fields at its head are those of the hub's model card metadata (``base_model``, ``library_name``,
    ``license``, ``tags``). An adapter is under its base model's licence as far as we can tell.
    """
    trial = request.plan.trial_config
    counts = request.dataset.counts
    parameters = "\n".join(f"| {name} | {_shown(value)} |" for name, value in trial.model_dump().items())
    final_loss = "-" if result.final_loss is None else f"{result.final_loss:.4f}"
    return f"""---
base_model: {json.dumps(request.base_model.name)}
library_name: peft
pipeline_tag: text-generation
license: {_licence(request.base_model.path)}
tags:
- lora-assets
- {trial.method}
---

# {result.run_id}

A {trial.method} adapter for `{request.base_model.name}`\
{f" (revision `{request.base_model.revision}`)" if request.base_model.revision else ""}, trained on \
{counts.train} records of {", ".join(request.dataset.window_dates)}.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({json.dumps(request.base_model.name)})
model = PeftModel.from_pretrained(base, "path/to/this/directory")
```

## Data

Dataset `{request.dataset.fingerprint}`: {counts.train} records for training, {counts.eval} held out, \
{counts.rejected} rejected, {counts.duplicates} duplicates dropped. The loss counts the assistant's side alone.

## Results

| figure | value |
| --- | --- |
| final training loss | {final_loss} |
| optimizer steps | {result.training_steps} |
| tokens seen | {result.tokens_seen} |
| trained parameters | {result.trainable_params} |
| training time | {result.seconds:.1f} s |

![loss curve](loss_curve.png)

## Hyper-parameters

| name | value |
| --- | --- |
{parameters}
"""


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _licence(model_dir: Path) -> str:
    """The base model's licence as its own card states it, else ``other``."""
    try:
        lines = (model_dir / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return "other"
    stated = [line.removeprefix("license:").strip() for line in lines[:60] if line.startswith("license:")]
    return stated[0] if stated and stated[0] else "other"
