"""The adapter's README.md: a model card in the format of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune.base_model.card import base_model_line, read_licence
from finetune.export.serving import vllm_adapter_command, vllm_refusal
from finetune.training.models import TrainingRequest, TrainingResult


def model_card(request: TrainingRequest, result: TrainingResult, config: Mapping[str, Any]) -> str:
    """The model card: what the adapter was trained on, how, what came out, and how it is served.

    `config` is the adapter's ``adapter_config.json``.

    The fields at its head are those of the hub's model card metadata (``base_model``, ``library_name``,
    ``license``, ``tags``). An adapter is under its base model's licence as far as we can tell.
    """
    trial = request.plan.trial_config
    counts = request.dataset.counts
    parameters = "\n".join(f"| {name} | {_shown(value)} |" for name, value in trial.model_dump().items())
    final_loss = "-" if result.final_loss is None else f"{result.final_loss:.4f}"
    return f"""---
{base_model_line(request.base_model.name)}library_name: peft
pipeline_tag: text-generation
license: {read_licence(request.base_model.path)}
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

{_vllm(request.base_model.name, result.run_id, config)}

## Data

Dataset `{request.dataset.fingerprint}`: {counts.train} records for training, {counts.eval} held out, \
{counts.rejected} rejected, {counts.duplicates} duplicates dropped. The loss counts the assistant's side alone.\
{_start(request)}

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


def _start(request: TrainingRequest) -> str:
    init = request.init_adapter
    if init is None:
        return ""
    began = f" Training began with the weights of `{init.run_id}` (adapter `{init.adapter_hash[:16]}`)"
    if continued := request.plan.continued:
        began += f", to which {continued.new_records} of the records were new; the others were replayed"
    return f"{began}."


def _vllm(base: str, run_id: str, config: Mapping[str, Any]) -> str:
    refusal = vllm_refusal(config)
    if refusal:
        return f"With vLLM, serve the merged model: {refusal}."
    return f"With vLLM:\n\n```\n{vllm_adapter_command(base, run_id, config)}\n```"


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
