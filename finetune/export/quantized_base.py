"""What merging a QLoRA adapter into the base in full precision changes.

Such an adapter was trained on a base of 4-bit weights, and its training made up for their rounding. Merged into the
exact weights it meets others than it was trained on (Dettmers et al., QLoRA, arXiv:2305.14314); how much that matters
is measured here, on the trained model's own answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.export.models import QuantizationCost
from finetune.export.prompts import encode_prompts, greedy_tokens
from finetune.publishing import MANIFEST_NAME

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from finetune.base_model.models import BaseModelRef
    from finetune.export.prompts import Prompts

_ANSWER_TOKENS = 32


def trained_on_quantized_base(adapter_path: Path) -> bool:
    """Whether an adapter's training or registration noted that it was trained with QLoRA."""
    trained = _read(adapter_path / MANIFEST_NAME).get("parameters") or {}
    registered = (_read(adapter_path / "experiment_manifest.json").get("inputs") or {}).get("plan") or {}
    return "qlora" in (trained.get("method"), registered.get("method"))


def measure_quantization_cost(
    *, base_model: BaseModelRef, adapter_path: Path, merged_path: Path, prompts: Prompts
) -> QuantizationCost:
    """Compare the merged model with the adapter on its 4-bit base, as training loads it.

    The trained model answers each prompt greedily; both models then say how likely every token of these
    answers is.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    loading = {"local_files_only": True, "trust_remote_code": base_model.trust_remote_code}
    ids = encode_prompts(AutoTokenizer.from_pretrained(merged_path, **loading), prompts)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(
        base_model.path, dtype=torch.float32, quantization_config=quantization, **loading
    )
    trained = PeftModel.from_pretrained(base, adapter_path, local_files_only=True).eval()
    answers = [greedy_tokens(trained, prompt, _ANSWER_TOKENS) for prompt in ids]
    wanted = _log_probabilities(trained, ids, answers)
    del trained, base
    merged = AutoModelForCausalLM.from_pretrained(merged_path, dtype=torch.float32, **loading).eval()
    found = _log_probabilities(merged, ids, answers)
    chosen = torch.tensor([token for answer in answers for token in answer])[:, None]
    return QuantizationCost(
        divergence=float((wanted.exp() * (wanted - found)).sum(-1).mean()),
        loss_on_quantized_base=-float(wanted.gather(1, chosen).mean()),
        loss_merged=-float(found.gather(1, chosen).mean()),
        greedy_agreement=float((found.argmax(-1) == wanted.argmax(-1)).double().mean()),
        tokens=len(chosen),
    )


def _log_probabilities(model: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """Before every token of the answers: (tokens, vocabulary), float32."""
    import torch

    rows = []
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].float()
            rows.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
    return torch.cat(rows)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
