"""What merge, GGUF and the serving exports hand on."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class QuantizationCost(BaseModel):
    """A merged model against the quantized base + adapter that was trained, over the latter's own greedy answers."""

    model_config = ConfigDict(frozen=True)

    # mean Kullback-Leibler divergence of the merged model's distributions from the trained ones, nats per token
    divergence: float
    # nats per token of these answers; merging costs their difference
    loss_on_quantized_base: float
    loss_merged: float
    # share of tokens for which both would choose the same one
    greedy_agreement: float
    tokens: int


class MergedModel(BaseModel):
    """Base + adapter as one model in Hugging Face's layout."""

    model_config = ConfigDict(frozen=True)

    path: Path
    run_id: str
    output_format: str
    merged_tensors: int
    total_parameters: int
    size: int
    seconds: float
    # "streaming" (tensor by tensor) or "peft"
    method: str = "streaming"
    # None when validate_after_merge was off
    max_logit_difference: float | None
    logit_tolerance: float | None = None
    greedy_tokens_equal: bool | None
    # of an adapter that was trained on a quantized base (QLoRA), when validate_after_merge was on
    quantization_cost: QuantizationCost | None = None
    reused: bool = False


class GgufFile(BaseModel):
    """One GGUF file; `quantization` is llama.cpp's name of its type (``F16``, ``Q8_0``, ``Q4_K_M``, ...)."""

    model_config = ConfigDict(frozen=True)

    path: Path
    quantization: str
    size: int
    sha256: str


class GgufVerification(BaseModel):
    """What a llama.cpp runtime said, compared with Hugging Face's merged model."""

    model_config = ConfigDict(frozen=True)

    tokenization_equal: bool
    prompts: int
    # share of greedy tokens equal to the merged model's, for each file by its name
    greedy_agreement: dict[str, float]
    # mean Kullback-Leibler divergence from the merged model, nats per token, for each file
    divergence: dict[str, float] = {}
    # of the merged model's answers, by the merged model and by each file
    perplexity: dict[str, float] = {}
    sample_question: str
    sample_answer: str
    base_answer: str


class GgufExport(BaseModel):
    """Merged GGUF (full precision and quantized), base GGUF and adapter GGUF, verified by a runtime.

    `adapter` is None where llama.cpp cannot run such an adapter: `no_adapter` says why.
    """

    model_config = ConfigDict(frozen=True)

    path: Path
    run_id: str
    full: GgufFile
    quantized: GgufFile
    base: GgufFile
    adapter: GgufFile | None
    no_adapter: str | None = None
    verification: GgufVerification
    seconds: float
    reused: bool = False


class MergedGguf(BaseModel):
    """A merged model as one GGUF file; the comparisons are None when they were not asked for."""

    model_config = ConfigDict(frozen=True)

    path: Path
    run_id: str
    file: GgufFile
    merged_tensors: int
    max_logit_difference: float | None
    tokenization_equal: bool | None
    greedy_agreement: float | None
    # nats per token
    divergence: float | None
    perplexity: float | None
    seconds: float
    reused: bool = False


class HubPush(BaseModel):
    """What a repository on the hub holds since a push; `unchanged` if it held it before."""

    model_config = ConfigDict(frozen=True)

    repo: str
    url: str
    commit: str
    private: bool
    files: list[str]
    size: int
    unchanged: bool


class OllamaExport(BaseModel):
    """``Modelfile`` (base + adapter; None where there is no adapter as GGUF) and ``Modelfile.merged``."""

    model_config = ConfigDict(frozen=True)

    path: Path
    modelfile: Path | None
    modelfile_merged: Path
    # the model's name on the server, when one was created
    created_model: str | None
    reused: bool = False


class LmStudioExport(BaseModel):
    """LM Studio's ``<publisher>/<model>/<file>.gguf`` and ``lmstudio_config.json``."""

    model_config = ConfigDict(frozen=True)

    path: Path
    gguf: Path
    config: Path
    reused: bool = False
