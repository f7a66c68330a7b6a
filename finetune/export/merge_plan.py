"""Which tensor of a merged model comes from where: also where a vocabulary has grown, or tied ends part."""

from __future__ import annotations

import json
import math
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import ArtifactError
from finetune.export.safetensors_files import StoredTensor, read_safetensors_header, shard_paths
from finetune.export.updates import Change, NewRows, Scaling, Updates
from finetune.hashed_file import PIECE

HEAD = "lm_head.weight"
# The input embeddings whose weight transformers ties to `HEAD`, by their names in the families of models.
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.word_embeddings.weight",
    "model.decoder.embed_tokens.weight",
)
# For float64, which no language model is published in, peft computes the update in float64 too.
FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOAT_SIZE = {"F32": 4, "F16": 2, "BF16": 2}
# Whose layers, but for the head, are transformers' Conv1D: their weights lie as (inputs, outputs).
_CONV1D = ("gpt2", "openai-gpt")


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the merged model: what lies at `source`, with `change` made to it, in the type `dtype`.

    It is `changed` where it is not what the base has.
    """

    source: StoredTensor
    dtype: str
    change: Change | None = None
    changed: bool = False

    @property
    def copied(self) -> bool:
        """Whether the bytes of `source` are the tensor's own."""
        return not self.changed and self.source.dtype == self.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return self.source.size if self.copied else math.prod(self.source.shape) * _FLOAT_SIZE[self.dtype]


@dataclass(frozen=True)
class MergePlan:
    """The merged model's tensors by shard and name, in the order in which they lie there.

    `config` are the entries of ``config.json`` that differ from the base's.
    """

    shards: dict[str, dict[str, MergedTensor]]
    config: dict[str, Any]

    @property
    def changed(self) -> int:
        """How many tensors the adapter changes."""
        return sum(tensor.changed for shard in self.shards.values() for tensor in shard.values())


def plan_merge(model_path: Path, updates: Updates) -> MergePlan | None:
    """Find the base's tensor of every update, or return None where names, shapes or types leave it open.

    Raises:
        ArtifactError: a trained token is beyond the vocabulary, or the adapter lacks rows for added tokens.
        BaseModelError: a shard of the base is cut short.
    """
    settings = json.loads((model_path / "config.json").read_bytes())
    base: dict[str, StoredTensor] = {}
    for shard in shard_paths(model_path):
        base.update(sorted(read_safetensors_header(shard).items(), key=lambda item: item[1].offset))
    # IA3 scales what a module gives, with a bias or without.
    changes = {
        name: change for name, change in updates.changes.items() if name in base or not _is_scaled_bias(name, change)
    }
    brought = dict(updates.brought)
    embeddings = next((name for name in EMBEDDINGS if name in base), None)
    touched = {embeddings, HEAD} & (changes.keys() | updates.trained)
    config: dict[str, Any] = {}
    if embeddings and HEAD not in base:
        if touched and not _stay_tied(embeddings, updates):
            _part(embeddings, updates, base, brought)
            config["tie_word_embeddings"] = False
        else:
            changes.pop(HEAD, None)
            brought.pop(HEAD, None)
    elif touched and settings.get("tie_word_embeddings", True):
        # Both ends have a tensor and are said to be one: which of them counts depends on who reads it.
        return None
    if not brought.keys() | changes.keys() <= base.keys() or _lacks_any(updates, base, brought.keys() | changes.keys()):
        return None
    conv1d = settings.get("model_type") in _CONV1D
    weights = {name for name, change in changes.items() if name.endswith(".weight") and not isinstance(change, NewRows)}
    # peft writes one `fan_in_fan_out` for all modules, that of the last one, and goes by their classes itself.
    if any(updates.fan_in_fan_out != (conv1d and name != HEAD) for name in weights - {embeddings}):
        return None
    vocab_size = (settings.get("text_config") or settings).get("vocab_size")
    shards: dict[str, dict[str, MergedTensor]] = {}
    for name, stored in base.items():
        source, change = brought.get(name, stored), changes.get(name)
        tensor = MergedTensor(source, stored.dtype, change, changed=change is not None or source is not stored)
        if not tensor.copied and not _fits(name, tensor, stored, vocab_size, embeddings):
            return None
        shards.setdefault(stored.file.name, {})[name] = tensor
    vocabulary = _vocabulary([shard[name] for shard in shards.values() for name in (embeddings, HEAD) if name in shard])
    if embeddings and vocabulary != base[embeddings].shape[0]:
        config["vocab_size"] = vocabulary
    return MergePlan(shards, config) if changes or brought else None


def _lacks_any(updates: Updates, base: dict[str, StoredTensor], found: Set[str]) -> bool:
    """Whether the adapter has nothing for a matrix that its configuration says was trained."""
    return any(
        f".{name}".removesuffix(".weight").endswith(updates.targets)
        for name, stored in base.items()
        if name.endswith(".weight") and len(stored.shape) > 1 and name not in found
    )


def _is_scaled_bias(name: str, change: Change) -> bool:
    return isinstance(change, Scaling) and name.endswith(".bias")


def _stay_tied(embeddings: str, updates: Updates) -> bool:
    """Whether both ends were trained as one: peft ties trained tokens itself, anything else only if told to."""
    ours, heads = updates.changes.get(embeddings), updates.changes.get(HEAD)
    if updates.ensure_weight_tying:
        return ours is not None or embeddings in updates.brought
    if not isinstance(ours, NewRows) or HEAD in updates.trained:
        return False
    return heads is None or (isinstance(heads, NewRows) and heads.indices == ours.indices)


def _part(embeddings: str, updates: Updates, base: dict[str, StoredTensor], brought: dict[str, StoredTensor]) -> None:
    """Give the head a tensor of its own, and both ends what they were before one of them was trained."""
    # It is in the adapter where the vocabulary has grown: beside an end's change, or as the other end.
    before = {name: tensor for name, tensor in brought.items() if name not in updates.trained}
    base[HEAD] = base[embeddings]
    for end, other in ((embeddings, HEAD), (HEAD, embeddings)):
        brought.setdefault(end, before.get(other, base[end]))


def _vocabulary(ends: list[MergedTensor]) -> int | None:
    """How many rows both ends of the model have."""
    rows = sorted({end.source.shape[0] for end in ends})
    if len(rows) > 1:
        raise ArtifactError(
            f"the adapter was trained with {rows[-1]} tokens, and has the new rows of one end of the model alone",
            where=next(end.source.file for end in ends if end.source.shape[0] == rows[-1]),
            remedy="Train the adapter again with embed_tokens and lm_head in modules_to_save",
        )
    return rows[0] if rows else None


def _fits(
    name: str, tensor: MergedTensor, stored: StoredTensor, vocabulary: int | None, embeddings: str | None
) -> bool:
    """Whether `tensor` can be made, and can take the place of the base's `stored`."""
    shape, change = tensor.source.shape, tensor.change
    if isinstance(change, NewRows) and shape and max(change.indices, default=0) >= shape[0]:
        raise ArtifactError(
            f"the adapter has trained token {max(change.indices)}, but {name} has {shape[0]} rows",
            where=tensor.source.file,
            remedy="Save the adapter with its embeddings (save_embedding_layers=True)",
        )
    if embeddings is None and shape[:1] == (vocabulary,):
        # Perhaps one of two tied ends, in a family of models that is not known here.
        return False
    end = name in (embeddings, HEAD, HEAD.replace("weight", "bias"))
    return (
        {tensor.dtype, tensor.source.dtype} <= FLOAT_TYPES.keys()
        and len(shape) > 0
        and (shape[1:] if end else shape) == (stored.shape[1:] if end else stored.shape)
        # A row is merged at a time at least.
        and math.prod(shape[1:]) * 4 <= PIECE
        and (change is None or change.fits(shape))
    )
