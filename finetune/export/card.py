"""The merged model's README.md: a model card in the format of the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.base_model.card import base_model_line, read_licence
from finetune.export.serving import vllm_merged_command

if TYPE_CHECKING:
    from finetune.base_model.models import BaseModelRef


def merged_card(base_model: BaseModelRef, run_id: str) -> str:
    """What the merged model is and how it is served; llama.cpp's converter takes the licence from here."""
    revision = f" (revision `{base_model.revision}`)" if base_model.revision else ""
    return f"""---
{base_model_line(base_model.name)}library_name: transformers
pipeline_tag: text-generation
license: {read_licence(base_model.path)}
tags:
- lora-assets
---

# {base_model.name.rstrip("/").rsplit("/", 1)[-1]} {run_id}

`{base_model.name}`{revision} with the adapter of training `{run_id}` merged in.

## Use

```
{vllm_merged_command(run_id)}
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```
"""
