"""Base + adapter as one GGUF file, in one call."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.adapter_files import adapter_hash
from finetune.export.converter import Conversions, ModelConversion, Precision
from finetune.export.gguf import gguf_metadata
from finetune.export.merge import merge_adapter
from finetune.export.models import GgufFile, MergedGguf
from finetune.export.quantize import quantize_gguf
from finetune.export.runtime import GgufRuntime
from finetune.export.tensor_types import FULL_PRECISIONS, check_quantization
from finetune.export.verify import LIMITS, FileComparison, Reference, check_tokenization, compare
from finetune.progress import Progress, ProgressEvent, ignore_progress
from finetune.publishing import find_published, publish_directory, sha256_file

if TYPE_CHECKING:
    from finetune.base_model.models import BaseModelRef
    from finetune.dataset.records import Message

KIND = "merged_gguf"


def merge_to_gguf(
    *,
    base_model: BaseModelRef,
    adapter_path: Path,
    output_dir: Path,
    run_id: str,
    quantization: str = "Q8_0",
    validate_on: Sequence[list[Message]] | None = None,
    on_progress: Progress = ignore_progress,
) -> MergedGguf:
    """Merge an adapter into its base, convert, quantize and publish ``<run_id>-<quantization>.gguf``.

    Any adapter that can be merged will do, also one that llama.cpp could not load by itself. With `validate_on`,
    the merged model must equal base + adapter (`finetune.export.merge_check`), and a llama.cpp runtime must
    load the file, tokenize as the tokenizer does and answer like the merged model (`finetune.export.verify.LIMITS`).

    Args:
        base_model: the base in its own precision.
        adapter_path: a directory in PEFT's layout.
        output_dir: where the file is published; reused when it is complete and made of the same inputs.
        run_id: the training's id, part of the file's name and the version in its metadata.
        quantization: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0 or Q2_K.
        validate_on: conversations to compare on, or None to skip the comparisons.
        on_progress: told of every step.

    Raises:
        ConfigurationError: unknown quantization, or a component is not installed.
        ExportError: the merge, the conversion, the quantization or a comparison failed.
        BaseModelError: the base model is damaged, or quantized itself.
        ArtifactError: the adapter is incomplete.
        StorageFullError: the disk is full.
    """
    check_quantization(quantization)
    precision: Precision = quantization if quantization in FULL_PRECISIONS else "F16"  # type: ignore[assignment] # one of the three by the condition
    metadata = gguf_metadata(base_model, run_id, None)
    inputs = {
        "base_model": base_model.fingerprint,
        "adapter": adapter_hash(adapter_path),
        "quantization": quantization,
        "metadata": metadata,
    }
    if reused := _find_complete(output_dir, inputs, validated=validate_on is not None):
        return reused
    started = time.monotonic()
    with publish_directory(output_dir, kind=KIND) as staging:
        merged = merge_adapter(
            base_model=base_model,
            adapter_path=adapter_path,
            output_dir=staging.path / "merged",
            run_id=run_id,
            validate_on=validate_on,
            on_progress=on_progress,
        )
        target = staging.path / f"{run_id}-{quantization}.gguf"
        full = target if quantization == precision else staging.path / f"{run_id}-{precision}.gguf"
        on_progress(ProgressEvent("gguf", 0, 3, "steps"))
        with Conversions([ModelConversion(merged.path, full, precision, metadata)]) as conversions:
            trusted = base_model.trust_remote_code
            reference = None if validate_on is None else Reference(merged.path, validate_on, trust_remote_code=trusted)
            conversions.wait()
        on_progress(ProgressEvent("gguf", 1, 3, "steps"))
        if full != target:
            quantize_gguf(full, target, quantization)
            full.unlink()
        on_progress(ProgressEvent("gguf", 2, 3, "steps"))
        comparison = None if reference is None else _verify(target, reference, quantization)
        shutil.rmtree(merged.path)
        on_progress(ProgressEvent("gguf", 3, 3, "steps"))
        result = MergedGguf(
            path=output_dir,
            run_id=run_id,
            file=GgufFile(
                path=output_dir / target.name,
                quantization=quantization,
                size=target.stat().st_size,
                sha256=sha256_file(target),
            ),
            merged_tensors=merged.merged_tensors,
            max_logit_difference=merged.max_logit_difference,
            tokenization_equal=None if comparison is None else True,
            greedy_agreement=None if comparison is None else comparison.agreement,
            divergence=None if comparison is None else comparison.divergence,
            perplexity=None if comparison is None else comparison.perplexity,
            seconds=time.monotonic() - started,
        )
        staging.digests = {target.name: result.file.sha256}
        staging.inputs = inputs
        staging.parameters = {"base_model": base_model.name, "run_id": run_id}
        staging.results = result.model_dump(mode="json", exclude={"path", "reused"})
    return result


def _verify(file: Path, reference: Reference, quantization: str) -> FileComparison:
    with GgufRuntime(file, context=reference.context) as runtime:
        check_tokenization(runtime, reference)
        return compare(runtime, reference, LIMITS[quantization])


def _find_complete(output_dir: Path, inputs: Mapping[str, object], *, validated: bool) -> MergedGguf | None:
    manifest = find_published(output_dir, kind=KIND, inputs=inputs)
    if manifest is None:
        return None
    found = MergedGguf(path=output_dir, reused=True, **manifest.results)
    if validated and found.tokenization_equal is None:
        return None
    # The directory may have moved since.
    here = found.file.model_copy(update={"path": output_dir / found.file.path.name})
    return found.model_copy(update={"file": here})
