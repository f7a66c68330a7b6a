from __future__ import annotations

from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import TrainingError
from finetune.training.packed_attention import attend_by_record

LENGTHS = (7, 1, 30, 12)


def load(small_model: BaseModelRef, attention: str = "sdpa", **changed: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(small_model.path, attn_implementation=attention, **changed)


def packed() -> dict[str, Any]:
    import torch

    ids = torch.randint(0, 300, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None]}


def test_every_packed_record_gets_the_logits_that_it_gets_alone(small_model: BaseModelRef) -> None:
    import torch

    model = load(small_model)
    attend_by_record(model)
    batch = packed()
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0].split(LENGTHS)
        alone = [model(ids[None], use_cache=False).logits[0] for ids in batch["input_ids"][0].split(LENGTHS)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_masked_attention(small_model: BaseModelRef, checkpointing: bool) -> None:
    import torch

    gradients = []
    for by_record in (False, True):
        model = load(small_model).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        if by_record:
            attend_by_record(model)
            assert model.config._attn_implementation != "sdpa"
        batch = packed()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_no_mask_of_all_tokens_by_all_tokens_is_made(
    small_model: BaseModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    seen: list[Any] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Any, *arguments: Any, attn_mask: Any = None, **options: Any) -> Any:
        seen.append((query.shape[2], None if attn_mask is None else tuple(attn_mask.shape)))
        return attention(query, *arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = load(small_model)
    model(**packed(), use_cache=False)
    assert set(seen) == {(50, (1, 1, 50, 50))}
    seen.clear()
    attend_by_record(model)
    model(**packed(), use_cache=False)
    assert set(seen) == {(length, None) for length in LENGTHS}


def test_a_model_with_windows_or_with_another_attention_keeps_its_own(small_model: BaseModelRef) -> None:
    windowed = load(small_model)
    windowed.config.sliding_window = 16
    layered = load(small_model)
    layered.config.layer_types = ["full_attention", "sliding_attention"]
    eager = load(small_model, "eager")
    for model, kept in ((windowed, "sdpa"), (layered, "sdpa"), (eager, "eager")):
        attend_by_record(model)
        assert model.config._attn_implementation == kept


def test_a_model_that_hands_on_no_positions_is_refused(
    small_model: BaseModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    layer = LlamaDecoderLayer.forward

    def silent(self: Any, *arguments: Any, position_ids: Any, **options: Any) -> Any:
        return layer(self, *arguments, **options)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", silent)
    model = load(small_model)
    attend_by_record(model)
    with pytest.raises(TrainingError, match="not told where packed records begin"):
        model(**packed(), use_cache=False)
