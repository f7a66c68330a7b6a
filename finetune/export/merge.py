"""Base + adapter as one model in Hugging Face's layout."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.adapter_files import adapter_hash
from finetune.errors import ArtifactError, BaseModelError
from finetune.export.adapter import read_peft_config
from finetune.export.card import merged_card
from finetune.export.merge_check import check_merge
from finetune.export.merge_plan import plan_merge
from finetune.export.models import MergedModel
from finetune.export.peft_merge import merge_through_peft, refuse_unmergeable
from finetune.export.quantized_base import measure_quantization_cost, trained_on_quantized_base
from finetune.export.safetensors_files import INDEX_NAME, count_parameters, shard_paths
from finetune.export.streaming import merge_streaming
from finetune.export.updates import read_updates
from finetune.progress import Progress, ProgressEvent, ignore_progress
from finetune.publishing import find_published, publish_directory

if TYPE_CHECKING:
    from finetune.base_model.models import BaseModelRef
    from finetune.export.prompts import Prompts

OutputFormat = Literal["safetensors", "pytorch"]
KIND = "merged_model"
__all__ = ["check_merge", "merge_adapter"]
# All that a loader reads beside the weights: configuration, generation defaults, tokenizer, chat template.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py")
_TEMPLATE = "chat_template.jinja"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def merge_adapter(
    *,
    base_model: BaseModelRef,
    adapter_path: Path,
    output_dir: Path,
    run_id: str,
    output_format: OutputFormat = "safetensors",
    validate_on: Prompts | None = None,
    on_progress: Progress = ignore_progress,
) -> MergedModel:
    """Merge an adapter into its base and publish the result.

    What changes tensors one by one (LoRA with its variants, whole modules, added and trained tokens, IA3) is streamed,
    plain LoRA bitwise equal to peft's default merge; anything else goes through peft itself. With `validate_on`, the
    merged model must equal base + adapter on those prompts (`check_merge`) before it is published, and what merging
    costs an adapter that was trained on a quantized base (QLoRA) is measured.

    Args:
        base_model: the base in its own precision; an adapter trained on a quantized base merges into
            this one too.
        adapter_path: a directory in PEFT's layout.
        output_dir: where the model is published; reused when it is complete and made of the same inputs.
        run_id: the training's id.
        output_format: ``safetensors``, or legacy ``pytorch`` (``pytorch_model.bin``).
        validate_on: conversations or texts to compare on, or None to skip the comparison.
        on_progress: told of every merged tensor.

    Raises:
        ExportError: merging has no meaning for this adapter, or the result differs from base + adapter.
        BaseModelError: the base model is damaged, or quantized itself.
        ArtifactError: the adapter is incomplete, or its tokenizer has tokens without embeddings.
        StorageFullError: the disk is full.
    """
    config = read_peft_config(adapter_path)
    refuse_unmergeable(config, adapter_path)
    inputs = {
        "base_model": base_model.fingerprint,
        "adapter": adapter_hash(adapter_path),
        "output_format": output_format,
    }
    if reused := _find_complete(output_dir, inputs, validated=validate_on is not None):
        return reused
    _refuse_quantized(base_model)
    started = time.monotonic()
    with publish_directory(output_dir, kind=KIND) as staging:
        tokens = _copy_companions(base_model.path, adapter_path, staging.path)
        updates = read_updates(adapter_path, config)
        plan = None if updates is None else plan_merge(base_model.path, updates)
        if plan is None:
            merged_tensors = merge_through_peft(base_model, adapter_path, config, staging.path)
        else:
            merged_tensors = plan.changed
            _change_json(staging.path / "config.json", plan.config)
            staging.digests = merge_streaming(
                plan,
                staging.path,
                lambda done: on_progress(ProgressEvent("merge", done, merged_tensors, "tensors")),
            )
        _refuse_tokens_without_rows(tokens, staging.path / "config.json", adapter_path)
        parameters = count_parameters(staging.path)
        # The comparison reads what the loaders of both formats read, so it comes after the change of format.
        if output_format == "pytorch":
            _to_pytorch(staging.path)
        check = None
        if validate_on is not None:
            on_progress(ProgressEvent("merge check", 0, len(validate_on), "prompts"))
            check = check_merge(
                base_model=base_model, adapter_path=adapter_path, merged_path=staging.path, prompts=validate_on
            )
            on_progress(ProgressEvent("merge check", check.prompts, check.prompts, "prompts"))
        cost = None
        if validate_on is not None and trained_on_quantized_base(adapter_path):
            cost = measure_quantization_cost(
                base_model=base_model, adapter_path=adapter_path, merged_path=staging.path, prompts=validate_on
            )
        (staging.path / "README.md").write_text(merged_card(base_model, run_id), encoding="utf-8")
        result = MergedModel(
            path=output_dir,
            run_id=run_id,
            output_format=output_format,
            method="peft" if plan is None else "streaming",
            merged_tensors=merged_tensors,
            total_parameters=parameters,
            size=sum(file.stat().st_size for file in staging.path.iterdir()),
            seconds=time.monotonic() - started,
            max_logit_difference=None if check is None else check.max_logit_difference,
            logit_tolerance=None if check is None else check.tolerance,
            greedy_tokens_equal=None if check is None else check.greedy_tokens_equal,
            quantization_cost=cost,
        )
        staging.inputs = inputs
        staging.parameters = {"base_model": base_model.name, "base_model_revision": base_model.revision}
        staging.results = result.model_dump(mode="json", exclude={"path", "reused"})
    return result


def _find_complete(output_dir: Path, inputs: dict[str, Any], *, validated: bool) -> MergedModel | None:
    manifest = find_published(output_dir, kind=KIND, inputs=inputs)
    if manifest is None:
        return None
    found = MergedModel(path=output_dir, reused=True, **manifest.results)
    return found if found.max_logit_difference is not None or not validated else None


def _refuse_quantized(base_model: BaseModelRef) -> None:
    try:
        config = json.loads((base_model.path / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"unreadable config.json: {error}", where=base_model.path, remedy="Download the base model again"
        ) from error
    if "quantization_config" in config:
        raise BaseModelError(
            "the base model's weights are quantized: an adapter cannot be added to them",
            where=base_model.path,
            remedy="Set BASE_MODEL_NAME to the same model in full precision",
        )


def _copy_companions(base: Path, adapter: Path, output: Path) -> int:
    """Copy all but the weights; returns how many tokens the adapter's own tokenizer has if it was taken, or 0."""
    for pattern in _COMPANIONS:
        for file in base.glob(pattern):
            if not file.name.endswith(".index.json") and file.name != "manifest.json":
                shutil.copyfile(file, output / file.name)
    # An adapter trained with added tokens brings the tokenizer that knows them.
    tokens = _vocabulary(adapter)
    if tokens <= _vocabulary(base):
        return 0
    template = [_TEMPLATE] if _has_template(adapter) else []
    for name in [*_TOKENIZER_FILES, *template]:
        (output / name).unlink(missing_ok=True)
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, output / name)
    return tokens


def _has_template(adapter: Path) -> bool:
    if (adapter / _TEMPLATE).is_file():
        return True
    config = adapter / "tokenizer_config.json"
    try:
        return config.is_file() and bool(json.loads(config.read_bytes()).get("chat_template"))
    except (ValueError, AttributeError) as error:
        raise ArtifactError(
            f"unreadable tokenizer: {error}", where=config, remedy="Restore the file, or train the adapter again"
        ) from error


def _refuse_tokens_without_rows(tokens: int, config: Path, adapter: Path) -> None:
    settings = json.loads(config.read_bytes())
    rows = (settings.get("text_config") or settings).get("vocab_size")
    if rows is not None and tokens > rows:
        raise ArtifactError(
            f"the adapter's tokenizer has {tokens} tokens, but the merged model has {rows} rows of embeddings",
            where=adapter,
            remedy="Train the adapter again and save it with its embeddings (save_embedding_layers=True)",
        )


def _vocabulary(model: Path) -> int:
    """How many tokens the directory's ``tokenizer.json`` knows; 0 without one.

    Raises:
        ArtifactError: it is no tokenizer.
    """
    path = model / "tokenizer.json"
    if not path.is_file():
        return 0
    from tokenizers import Tokenizer

    try:
        return int(Tokenizer.from_file(str(path)).get_vocab_size())
    except Exception as error:  # all that tokenizers raises
        raise ArtifactError(
            f"unreadable tokenizer: {error}", where=path, remedy="Restore the file, or download the model again"
        ) from error


def _change_json(path: Path, entries: dict[str, Any]) -> None:
    if entries:
        path.write_text(json.dumps(json.loads(path.read_bytes()) | entries, indent=2) + "\n", encoding="utf-8")


def _to_pytorch(model: Path) -> None:
    """Rewrite safetensors shards as ``torch.save`` files: transformers 5 writes no other format."""
    import torch
    from safetensors.torch import load_file

    def renamed(name: str) -> str:
        return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")

    for shard in shard_paths(model):
        torch.save(load_file(shard), model / renamed(shard.name))
        shard.unlink()
    index = model / INDEX_NAME
    if index.is_file():
        content = json.loads(index.read_bytes())
        content["weight_map"] = {name: renamed(file) for name, file in content["weight_map"].items()}
        (model / "pytorch_model.bin.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        index.unlink()
