"""Is a merged model on disk equal to base + adapter?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapter_files import adapter_hash
from finetune.base_model.remote_code import remedy_for
from finetune.errors import ExportError
from finetune.evaluation.adapters import load_adapter
from finetune.export.prompts import encode_prompts, greedy_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from finetune.base_model.models import BaseModelRef
    from finetune.export.prompts import Prompts

# Largest difference of a logit, as a share of the reference's largest absolute logit. The merged
# weights were rounded once to the stored type, whose relative precision is 2^-24, 2^-11 or 2^-8; the
# bound leaves room for that error to grow through the layers.
TOLERANCES = {"torch.float32": 1e-4, "torch.float64": 1e-4, "torch.float16": 1e-2, "torch.bfloat16": 5e-2}
GREEDY_TOKENS = 16


@dataclass(frozen=True)
class MergeCheck:
    """How far the merged model is from base + adapter, over all prompts' tokens."""

    max_logit_difference: float
    tolerance: float
    greedy_tokens_equal: bool
    prompts: int


@dataclass(frozen=True)
class _Reference:
    logits: list[torch.Tensor]
    hidden: list[list[torch.Tensor]]
    greedy: list[list[int]]


def check_merge(*, base_model: BaseModelRef, adapter_path: Path, merged_path: Path, prompts: Prompts) -> MergeCheck:
    """Load the merged model from disk and compare it with base + adapter, both computed in float32.

    The logits of every prompt token may differ by at most `TOLERANCES` of the stored type, and the
    greedy answers must be equal; where the reference's two best tokens are closer than the tolerance,
    either may be chosen.

    Raises:
        ArtifactError: the adapter is damaged or does not fit the base model.
        ExportError: they differ (the first differing layer is named), or the merged model does not load.
        ValueError: no prompts.
    """
    from transformers import AutoConfig, AutoTokenizer

    if not prompts:
        raise ValueError("check_merge needs at least one prompt")
    adapter_hash(adapter_path)
    remedy = "Delete the directory and merge again"
    try:
        loading = {"local_files_only": True, "trust_remote_code": base_model.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(merged_path, **loading)
        config = AutoConfig.from_pretrained(merged_path, **loading)
    except Exception as error:  # transformers raises whatever its parsers raise on a damaged directory
        raise ExportError(
            f"the merged model does not load: {error}", where=merged_path, remedy=remedy_for(error, remedy)
        ) from error
    tolerance_share = TOLERANCES.get(str(config.dtype or "torch.float32"), TOLERANCES["torch.bfloat16"])
    ids = encode_prompts(tokenizer, prompts)

    # One after the other: each takes four bytes a parameter.
    base = _load(base_model.path, base_model.trust_remote_code)
    if config.get_text_config().vocab_size != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(config.get_text_config().vocab_size, mean_resizing=False)
    expected = _observe(load_adapter(base, adapter_path), ids)
    del base
    try:
        merged = _load(merged_path, base_model.trust_remote_code)
    except Exception as error:  # as above
        raise ExportError(f"the merged model does not load: {error}", where=merged_path, remedy=remedy) from error
    found = _observe(merged, ids)

    worst = max(float((a - b).abs().max()) for a, b in zip(expected.logits, found.logits, strict=True))
    tolerance = tolerance_share * max(float(logits.abs().max()) for logits in expected.logits)
    # A comparison with NaN is false, so ask for what must hold.
    if not worst <= tolerance:
        layer = _first_difference(expected, found, tolerance_share)
        raise ExportError(
            f"the merged model differs from base + adapter: logits by {worst:.3g} (tolerance {tolerance:.3g}), "
            f"first in {layer}",
            where=merged_path,
            remedy=remedy,
        )
    equal = True
    for number, (want, have) in enumerate(zip(expected.greedy, found.greedy, strict=True)):
        if want == have:
            continue
        equal = False
        if not _is_tie(merged, ids[number], want, have, 2 * tolerance):
            raise ExportError(
                f"the merged model answers prompt {number} differently from base + adapter: "
                f"{tokenizer.decode(have)!r} instead of {tokenizer.decode(want)!r}",
                where=merged_path,
                remedy=remedy,
            )
    return MergeCheck(worst, tolerance, equal, len(ids))


def _load(path: Path, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, trust_remote_code=trust_remote_code
    ).eval()


def _observe(model: PreTrainedModel, prompts: list[list[int]]) -> _Reference:
    import torch

    logits, hidden, greedy = [], [], []
    with torch.inference_mode():
        for ids in prompts:
            result = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
            logits.append(result.logits[0].float())
            hidden.append([state[0].float() for state in result.hidden_states])
            greedy.append(greedy_tokens(model, ids, GREEDY_TOKENS))
    return _Reference(logits, hidden, greedy)


def _first_difference(expected: _Reference, found: _Reference, share: float) -> str:
    for want, have in zip(expected.hidden, found.hidden, strict=True):
        for layer, (a, b) in enumerate(zip(want, have, strict=True)):
            if not float((a - b).abs().max()) <= share * float(a.abs().max()):
                return "the embeddings" if layer == 0 else f"layer {layer - 1}"
    return "the output head"


def _is_tie(model: PreTrainedModel, prompt: list[int], want: list[int], have: list[int], margin: float) -> bool:
    """Whether the two first tokens that differ are at most `margin` apart."""
    import torch

    same = next(i for i, (a, b) in enumerate(zip(want, have, strict=False)) if a != b)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + have[:same]])).logits[0, -1].float()
    return abs(float(logits[have[same]] - logits[want[same]])) <= margin
