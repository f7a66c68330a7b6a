"""Attention over packed records, each by itself.

Several records in one row are kept apart by a mask of all tokens by all tokens where nothing better is known; its cost
grows with the square of the row. With the positions, which begin anew at each record, every record is attended to by
itself instead, and needs no mask: what `flash_attn_varlen_func` of the package flash-attn does (Dao et al. 2022), by
PyTorch's own fused attention, which runs anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_NAME = "sdpa_by_record"


def attend_by_record(model: PreTrainedModel) -> None:
    """Let a model that is loaded with PyTorch's fused attention attend to packed records one by one.

    A model whose layers see a window of their own keeps its masks, which hold the window too.
    """
    from transformers import AttentionInterface

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    if config._attn_implementation != "sdpa" or getattr(config, "sliding_window", None) or kinds - {"full_attention"}:
        return
    # A name that transformers knows no mask for: none is made.
    AttentionInterface.register(_NAME, _attend)
    model.set_attn_implementation(_NAME)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    position_ids: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Queries, keys and values of shape (1, heads, tokens, head size); the result's is (1, tokens, heads, head size).

    Raises:
        TrainingError: the model does not hand on the positions.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if position_ids is None:
        raise TrainingError(
            f"the layers of {type(module).__name__} are not told where packed records begin",
            where="packing",
            remedy="Turn packing off",
        )
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], query.shape[2]], strict=True)]
    records = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *record, None, **options)[0] for record in records], dim=1), None
