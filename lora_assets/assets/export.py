"""From a promoted adapter to what servers load."""

import dagster as dg
from pydantic import Field

from finetune.dataset.models import PreparedDataset
from finetune.export.models import GgufExport, LmStudioExport, MergedModel, OllamaExport
from finetune.registry.models import RegisteredVersion
from lora_assets.assets.common import COMMON, SETTINGS, choice, log_progress, made_from, path, published_files, table
from lora_assets.kubernetes import convert_step
from resources.artifact_store import ArtifactStore
from resources.base_model import BaseModelSource
from resources.ollama import CHAMPION_TAG, OllamaServer
from resources.retries import no_retry_if_permanent

VALIDATION_PROMPTS = 8


class MergeConfig(dg.Config):
    """How base and adapter become one model."""

    output_format: str = Field("safetensors", description="safetensors, or pytorch for legacy .bin files.")
    validate_after_merge: bool = Field(True, description="Compare logits and greedy tokens with base + adapter.")


@dg.asset(
    **COMMON,
    ins=made_from("promoted_adapter", "merged_dataset"),
    group_name="export",
    kinds={"pytorch", "huggingface"},
    op_tags=convert_step(SETTINGS),
    code_version="1",
    description="Base + adapter as one model in Hugging Face's layout, for transformers and vLLM.",
)
@no_retry_if_permanent()
def merged_model(
    context: dg.AssetExecutionContext,
    config: MergeConfig,
    promoted_adapter: RegisteredVersion,
    merged_dataset: PreparedDataset,
    base_model: BaseModelSource,
    store: ArtifactStore,
) -> dg.MaterializeResult[MergedModel]:
    """Merge tensor by tensor, and compare with base + adapter on held-out prompts."""
    from finetune.dataset.inspect import held_out_prompts
    from finetune.export.merge import OutputFormat, merge_adapter

    prompts = held_out_prompts(merged_dataset.eval_path, VALIDATION_PROMPTS)
    merged = merge_adapter(
        base_model=base_model.resolve(log_progress(context)),
        adapter_path=promoted_adapter.stored_path,
        output_dir=store.layout.model(promoted_adapter.run_id, "merged"),
        run_id=promoted_adapter.run_id,
        output_format=choice(OutputFormat, "output_format", config.output_format),
        validate_on=prompts if config.validate_after_merge else None,
        on_progress=log_progress(context),
    )
    return dg.MaterializeResult(
        value=merged,
        metadata={
            "path": path(merged.path),
            "merged_tensors": merged.merged_tensors,
            "total_parameters": merged.total_parameters,
            "size": merged.size,
            "seconds": merged.seconds,
            "max_logit_difference": "not validated"
            if merged.max_logit_difference is None
            else merged.max_logit_difference,
            "published": published_files(merged.path),
            "greedy_tokens_equal": str(merged.greedy_tokens_equal),
            "quantization_cost": "not measured: no QLoRA"
            if merged.quantization_cost is None
            else dg.MetadataValue.json(merged.quantization_cost.model_dump()),
            "reused": merged.reused,
        },
    )


class GgufConfig(dg.Config):
    """Which GGUF is served."""

    quantization: str = Field(SETTINGS.gguf_quantization, description="llama.cpp's name of the type, as Q4_K_M.")


@dg.asset(
    **COMMON,
    ins=made_from("merged_model", "promoted_adapter", "merged_dataset"),
    group_name="export",
    kinds={"gguf", "llamacpp"},
    op_tags=convert_step(SETTINGS),
    code_version="1",
    description="Merged model, base model and adapter as GGUF, each verified by a llama.cpp runtime.",
)
@no_retry_if_permanent()
def gguf(
    context: dg.AssetExecutionContext,
    config: GgufConfig,
    merged_model: MergedModel,
    promoted_adapter: RegisteredVersion,
    merged_dataset: PreparedDataset,
    base_model: BaseModelSource,
    store: ArtifactStore,
) -> dg.MaterializeResult[GgufExport]:
    """Convert, quantize, load with a runtime and compare its answers."""
    from finetune.dataset.inspect import held_out_prompts
    from finetune.export.gguf import export_gguf

    export = export_gguf(
        merged=merged_model,
        base_model=base_model.resolve(log_progress(context)),
        adapter_path=promoted_adapter.stored_path,
        output_dir=store.layout.model(promoted_adapter.run_id, "gguf"),
        run_id=promoted_adapter.run_id,
        quantization=config.quantization,
        dataset=promoted_adapter.lineage.get("dataset_fingerprint"),
        base_cache=store.layout.base_models / "gguf",
        prompts=held_out_prompts(merged_dataset.eval_path, VALIDATION_PROMPTS),
        on_progress=log_progress(context),
    )
    check = export.verification
    return dg.MaterializeResult(
        value=export,
        metadata={
            "path": path(export.path),
            "quantized": path(export.quantized.path),
            "sha256": export.quantized.sha256,
            "files": table(
                [
                    {"file": file.path.name, "type": file.quantization, "bytes": file.size, "sha256": file.sha256}
                    for file in (export.full, export.quantized, export.base, export.adapter)
                    if file is not None
                ]
            ),
            "adapter": export.no_adapter or "as GGUF too",
            "tokenization_equal": check.tokenization_equal,
            "greedy_agreement": table(
                [{"file": name, "share": share} for name, share in check.greedy_agreement.items()]
            ),
            "divergence": table([{"file": name, "nats": value} for name, value in check.divergence.items()]),
            "perplexity": table([{"file": name, "value": value} for name, value in check.perplexity.items()]),
            "question": check.sample_question,
            "answer": check.sample_answer,
            "base_answer": check.base_answer,
            "seconds": export.seconds,
            "reused": export.reused,
        },
    )


@dg.asset(
    **COMMON,
    ins=made_from("gguf"),
    group_name="export",
    kinds={"ollama"},
    code_version="1",
    description="Modelfile (base + adapter) and Modelfile.merged; with OLLAMA_HOST set, the model on that server, "
    "and its tag `champion`.",
)
@no_retry_if_permanent()
def modelfile(
    context: dg.AssetExecutionContext,
    gguf: GgufExport,
    base_model: BaseModelSource,
    store: ArtifactStore,
    ollama: OllamaServer,
) -> dg.MaterializeResult[OllamaExport]:
    """Write both Modelfiles, and create the model where a server is set."""
    from finetune.export.modelfile import write_modelfiles

    export = write_modelfiles(
        gguf=gguf,
        base_model=base_model.resolve(log_progress(context), weights=False),
        output_dir=store.layout.model(gguf.run_id, "ollama"),
        run_id=gguf.run_id,
    )
    if ollama.host:
        name = f"{SETTINGS.ollama_model_name}:{gguf.run_id}"
        ollama.create_from(export, name=name, on_progress=log_progress(context))
        export = export.model_copy(update={"created_model": name})
        served = ollama.serve_champion(store.layout, SETTINGS.ollama_model_name, on_progress=log_progress(context))
        context.log.info(f"{SETTINGS.ollama_model_name}:{CHAMPION_TAG} is {served or 'not made yet'}")
    shown = export.modelfile or export.modelfile_merged
    return dg.MaterializeResult(
        value=export,
        metadata={
            "path": path(export.path),
            "modelfile": dg.MetadataValue.md(f"```\n{shown.read_text(encoding='utf-8')}\n```"),
            "modelfile_merged": path(export.modelfile_merged),
            "created_model": export.created_model or "no OLLAMA_HOST",
            "reused": export.reused,
        },
    )


@dg.asset(
    **COMMON,
    ins=made_from("gguf"),
    group_name="export",
    kinds={"lmstudio"},
    code_version="1",
    description="LM Studio's folder layout with the quantized GGUF, model.yaml and lmstudio_config.json.",
)
@no_retry_if_permanent()
def lmstudio_export(
    context: dg.AssetExecutionContext, gguf: GgufExport, base_model: BaseModelSource, store: ArtifactStore
) -> dg.MaterializeResult[LmStudioExport]:
    """Lay the merged GGUF out as LM Studio expects it."""
    from finetune.export.lmstudio import export_lmstudio

    export = export_lmstudio(
        gguf=gguf,
        base_model=base_model.resolve(log_progress(context), weights=False),
        output_dir=store.layout.model(gguf.run_id, "lmstudio"),
        run_id=gguf.run_id,
        publisher=SETTINGS.lmstudio_publisher,
        hub_repo=SETTINGS.hub_repo,
    )
    return dg.MaterializeResult(
        value=export,
        metadata={
            "path": path(export.path),
            "gguf": path(export.gguf),
            "lmstudio_config": path(export.config),
            "published": published_files(export.path),
            "reused": export.reused,
        },
    )
