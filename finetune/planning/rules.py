"""The rules by which a plan chooses what nobody fixed: one function a rule, each with its source.

Where a source is named twice: QLoRA is Dettmers et al. 2023; LoRA Without Regret is Schulman et al. 2025.
"""

from __future__ import annotations

import math
from typing import Literal

from finetune.dataset.models import DatasetProfile
from finetune.planning.model_config import ModelShape
from finetune.planning.models import Attention, Method, Optimizer, Task

Device = Literal["cpu", "cuda"]

_RANKS: dict[Task, int] = {"instruction": 16, "chat": 16, "style": 8, "domain": 32}
# Tokens of one forward and backward pass that keep the device busy; more only takes memory.
_PASS_TOKENS = {"cpu": 4096, "cuda": 16384}
_PARTS = 4
_TRUNCATED_SHARE = 0.005
_FEWEST_STEPS = 250
_LARGEST_BATCH, _SMALLEST_BATCH = 16, 8


def rank(task: Task) -> tuple[int, str]:
    """8 for a style, 16 for instructions and chats, 32 for a domain.

    Source: Hu et al. 2021 (LoRA, section 7.2: small ranks do for narrow tasks); LoRA Without Regret (the
    rank must hold what the data teach, so new knowledge asks for more).
    """
    return _RANKS[task], f"for the task {task}"


def alpha(lora_rank: int) -> tuple[int, str]:
    """Twice the rank.

    Source: LoRA Without Regret: with alpha / rank held constant the best rate hardly depends on the rank.
    """
    return 2 * lora_rank, "twice the rank keeps the scale of the update whatever the rank"


def dropout(shape: ModelShape, method: Method) -> tuple[float, str]:
    """None with lora; with qlora 0.1 up to 13 billion parameters, and 0.05 above.

    Source: LoRA Without Regret trains without; QLoRA, appendix B.2.
    """
    if method == "lora":
        return 0.0, "it costs a fifth of the time, and LoRA hardly gains from it"
    if shape.parameters <= 14e9:
        return 0.1, "as published for QLoRA up to 13 billion parameters"
    return 0.05, "as published for QLoRA above 13 billion parameters"


def target_modules() -> tuple[Literal["all-linear"], str]:
    """All linear layers.

    Source: QLoRA, section 4; LoRA Without Regret: adapters on attention alone fall behind.
    """
    return "all-linear", "adapters on all linear layers beat attention alone"


def virtual_tokens() -> tuple[int, str]:
    """20 of them.

    Source: Li & Liang 2021 (Prefix-Tuning, section 7.2: 10 for tables to text, 200 for summaries).
    """
    return 20, "a short prefix serves a narrow task"


def learning_rate(shape: ModelShape, method: Method) -> tuple[float, str]:
    """LoRA's goes with the hidden size from 2e-4 at 4096, never below 1e-4; full fine-tuning's is a tenth of it.

    Source: QLoRA, table 9 (2e-4 at 7 billion parameters, 1e-4 above 13 billion) and TRL's default with
    PEFT; between and below, hidden_size ** -0.78 and the factor of ten to full fine-tuning (LoRA Without
    Regret, measured on Llama models). (IA)^3: 3e-3 (Liu et al. 2022). Prefixes without
    reparametrization: 1e-2 (PEFT's own examples).
    """
    if method == "prefix":
        return 1e-2, "prefixes need large steps"
    if method == "ia3":
        return 3e-3, "as published for (IA)^3"
    rate = float(f"{min(max(2e-4 * (4096 / shape.hidden) ** 0.78, 1e-4), 5e-3):.2g}")
    if method == "full":
        return rate / 10, "a tenth of LoRA's"
    return rate, f"2e-4 at a hidden size of 4096, scaled to {shape.hidden}"


def schedule() -> tuple[str, str]:
    """Cosine.

    Source: Taori et al. 2023 (Stanford Alpaca's recipe).
    """
    return "cosine", "decays smoothly to zero"


def warmup_ratio() -> tuple[float, str]:
    """3 % of the steps.

    Source: Taori et al. 2023 (Stanford Alpaca's recipe); QLoRA, appendix B.2.
    """
    return 0.03, "3 % of the steps, so that the first ones do no harm"


def weight_decay() -> tuple[float, str]:
    """None.

    Source: Taori et al. 2023 (Stanford Alpaca's recipe).
    """
    return 0.0, "adapters are small enough without"


def optimizer(method: Method, device: Device) -> tuple[Optimizer, str]:
    """AdamW; its paged 8-bit form for qlora on a GPU.

    Source: QLoRA, section 3 (paged optimizers); Dettmers et al. 2022 (8-bit states).
    """
    if device == "cuda" and method == "qlora":
        return "paged_adamw_8bit", "paged 8-bit states, as in QLoRA"
    return "adamw_torch_fused", "AdamW in one kernel: adapters need little state"


def epochs() -> tuple[float, str]:
    """Three.

    Source: Taori et al. 2023 (Stanford Alpaca's recipe).
    """
    return 3.0, "usual for data sets of this kind"


def max_length(shape: ModelShape, profile: DatasetProfile) -> tuple[int, str]:
    """The shortest that truncates at most 0.5 % of the records, or else the longest record's, within the model's limit.

    Source: the dataset's own statistics; memory and time grow with the length, and what is cut is lost.
    """
    limit = shape.max_positions
    if profile.max_tokens is None:
        return min(1024, limit), "no token statistics: a usual length"
    longest = min(max(64, math.ceil(profile.max_tokens / 64) * 64), limit)
    shares = {cut.max_length: cut.record_share for cut in profile.truncation if cut.max_length < longest}
    for length in sorted(shares):
        if shares[length] <= _TRUNCATED_SHARE:
            return length, f"truncates {100 * shares[length]:.1f} % of records"
    if longest >= profile.max_tokens:
        return longest, f"the longest record has {profile.max_tokens} tokens"
    return longest, f"the model's limit; the longest record has {profile.max_tokens} tokens"


def effective_batch(records: int, passes: float) -> tuple[int, str]:
    """16 records a step, 8 where that would leave fewer than 250 steps; well under 32.

    Source: LoRA Without Regret: LoRA tolerates large batches worse than full fine-tuning.
    """
    batch = _LARGEST_BATCH
    while batch > _SMALLEST_BATCH and records * passes / batch < _FEWEST_STEPS:
        batch //= 2
    return batch, f"{records} records give {math.ceil(records * passes / batch)} steps of {batch} records"


def micro_batch(batch: int, length: int, device: Device) -> int:
    """As many records as fill a pass: 16,384 tokens on a GPU, 4,096 on a CPU, but a quarter of a step at most.

    Source: matrix products of some thousand rows already run at a device's full speed (NVIDIA, Matrix
    Multiplication Background User's Guide, section 4). A step that is cut by length into four parts has little left to
    pad (`finetune.training.micro_batches`).
    """
    return max(1, min(batch // _PARTS, 1 << max(0, (_PASS_TOKENS[device] // length).bit_length() - 1)))


def precision(device: Device) -> tuple[Literal["bf16", "fp32"], str]:
    """bf16 on a GPU, fp32 on a CPU.

    Source: Kalamkar et al. 2019 (bfloat16 for training); on a CPU fp32 makes runs repeatable to the bit.
    """
    return ("bf16", "the GPU's own") if device == "cuda" else ("fp32", "exact on a CPU")


def attention(shape: ModelShape) -> tuple[Attention, str]:
    """PyTorch's fused attention, unless the model bounds its scores.

    Source: Dao et al. 2022 (FlashAttention); transformers 5 offers models with a soft cap no fused attention.
    """
    if shape.softcapped:
        return "eager", "the model bounds its attention scores, which fused attention cannot"
    return "sdpa", "PyTorch's own fused attention"
