"""Where training programs differ in the memory that they take for the same training."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.planning.models import TrialConfig


@dataclass(frozen=True)
class Framework:
    """How a training program spends memory; the defaults are this project's trainer (TRL, PEFT, transformers).

    Attributes:
        adapter_bytes: bytes of an adapter's parameter, its gradient, and each of its optimizer states.
        cast_input_bytes: bytes per number of the copy that each adapter makes of its input, in 16-bit
            trainings; 0 where adapters work in the base model's precision and share what they are given.
        fused_qkv: query, key and value come from one module with one adapter.
        expands_kv: keys and values are always repeated for all query heads that share them; else only where
            PyTorch's fused attention is given a mask.
        masks: records of unequal length, or packed ones, are kept apart by a mask.
        fused_kernels: a compiler computes norms and activations again instead of keeping their middle steps.
        single_operation_activations: no activation is composed of several operations.
        logit_bytes: bytes per token and vocabulary entry at the peak of the loss; 0: tile by tile.
        quantizes_base: the base model has 4 bits with methods other than qlora too.
        nf4_bits: bits per 4-bit parameter with its constants: 4.127 with double quantization, else 4.5.
        kept_4bit_inputs: copies of each 4-bit module's input that are kept for backward.
        quantizes_head: the output head has 4 bits too.
        own_head: the output head is a tensor of its own even where the model shares the embedding.
        shards: GPUs over which parameters, gradients and optimizer states are spread.
        gathers_frozen: what is frozen, once gathered from its shards, stays (FSDP 1 drops gathered parameters
            when their gradients are there).
        offloads_checkpoints: checkpointed activations wait in the host's memory.
        optimizer_in_backward: each gradient is used and dropped as soon as it is there.
        context_gb: the CUDA context, where the driver's figure counts.
        fragmentation: what the caching allocator holds without using it, as a share of the rest.
    """

    adapter_bytes: int = 4
    cast_input_bytes: int = 2
    fused_qkv: bool = False
    expands_kv: bool = False
    masks: bool = True
    fused_kernels: bool = False
    single_operation_activations: bool = False
    logit_bytes: float = 0
    quantizes_base: bool = False
    nf4_bits: float = 4.127
    kept_4bit_inputs: int = 0
    quantizes_head: bool = False
    own_head: bool = False
    shards: int = 1
    gathers_frozen: bool = False
    offloads_checkpoints: bool = False
    optimizer_in_backward: bool = False
    context_gb: float = 0.6
    fragmentation: float = 0.05

    def quantizes(self, trial: TrialConfig) -> bool:
        """Whether the base model's modules have 4 bits."""
        return trial.method == "qlora" or self.quantizes_base


TRL = Framework()
