"""The environment, typed: the only reader of it in the code location."""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from finetune.dataset.near import NearMode
from finetune.dataset.parameters import PLAIN, PrepareParameters
from finetune.dataset.screening import SensitiveMode
from finetune.errors import ConfigurationError
from finetune.layout import DataLayout
from finetune.logs import LogFormat
from finetune.planning.models import Task, TrainableMethod
from finetune.publishing import sha256_json
from finetune.redaction import Redactor
from finetune.training.models import Sharding
from finetune.training.reporting import Tracker
from sensors.arrivals import MAX_WATCHED, Completeness

ExportTarget = Literal["ollama", "lmstudio", "gguf", "vllm"]
Quantization = Literal["F16", "BF16", "F32", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q2_K"]
# Read by a validator of ours: a syntax error is told like any other wrong value.
JsonObject = Annotated[dict[str, Any], NoDecode]

ENV_FILE = ".env"
# The settings that manifests tell: those that decide what is made and where it lies; none that could hold a secret.
RECORDED = (
    "training_backend",
    "base_model_name",
    "base_model_revision",
    "trust_remote_code",
    "data_root",
    "pipeline_name",
    "exports_dir",
    "exports_pattern",
    "dataset_window",
    "eval_fraction",
    "max_line_bytes",
    "max_reject_rate",
    "deletion_list",
    "id_field",
    "min_quality",
    "quality_field",
    "sensitive_data",
    "near_duplicates",
    "near_threshold",
    "training_method",
    "training_task",
    "lora_rank",
    "train_epochs",
    "learning_rate",
    "max_length",
    "micro_batch",
    "accumulation",
    "train_device",
    "vram_limit_gb",
    "max_gpu_hours",
    "seed",
    "adopt_trial",
    "init_from",
    "replay_fraction",
    "train_processes",
    "train_sharding",
    "min_champion_gain",
    "regressions_dir",
    "eval_tasks",
)
# Variables of PyTorch's and CUDA's that decide in which order sums are added up, and how exactly.
RECORDED_OF_LIBRARIES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)


def on_kubernetes() -> bool:
    """Whether this process runs in a pod (Kubernetes sets the variable in every container)."""
    return "KUBERNETES_SERVICE_HOST" in os.environ


def _default_data_root() -> Path:
    return Path("/data") if on_kubernetes() else Path("data")


def _pairs(text: str) -> list[tuple[str, str]]:
    """``a=b,c=d`` as pairs."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    return [(name.strip(), value.strip()) for name, _, value in pairs]


class Settings(BaseSettings):
    """Every environment variable that lora-assets reads; a field's name in capitals is the variable's.

    Values come from the environment first, then from a file ``.env`` in the working directory. An empty
    variable counts as unset.
    """

    model_config = SettingsConfigDict(env_file=ENV_FILE, env_ignore_empty=True, extra="ignore", frozen=True)

    training_backend: Literal["hf-peft", "h2o"] = Field(
        "hf-peft", description="Where adapters are trained: here with PEFT, or delegated to H2O LLM Studio."
    )
    base_model_name: str | None = Field(
        None,
        description="Local directory, hub name or short name (llama3-8b). Unset: the embedded tiny model; "
        "on Kubernetes it must be set.",
    )
    base_model_revision: str | None = Field(None, description="Branch, tag or commit of the hub repository.")
    hf_token: SecretStr | None = Field(None, description="Token of the hub, for gated repositories and for push.")
    trust_remote_code: bool = Field(False, description="Allow code from the base model's repository to run.")

    data_root: Path = Field(
        default_factory=_default_data_root, description="Where everything lands: /data in a pod, ./data elsewhere."
    )
    pipeline_name: str = Field(
        "brain", pattern=r"^[a-z][a-z0-9_]{0,39}$", description="The loop's name, part of paths and asset keys."
    )
    exports_dir: Path | None = Field(None, description="What is watched; unset: DATA_ROOT/datasets/PIPELINE_NAME.")
    exports_pattern: str | None = Field(None, description="File names; unset: PIPELINE_NAME_dataset_*.jsonl.")

    dataset_window: str = Field(
        "all",
        pattern=r"^(all|date|last:[1-9][0-9]*)$",
        description="What a date trains on: all (up to it), date (it alone), last:N (the last N dates with data).",
    )
    eval_fraction: float = Field(0.1, gt=0, lt=1, description="Share of prompts held out for evaluation.")
    max_line_bytes: int = Field(1 << 20, ge=1024, description="Longer lines are rejected.")
    max_reject_rate: float = Field(0.05, ge=0, le=1, description="Share of rejected lines that blocks training.")
    prepare_workers: int = Field(1, ge=1, description="Processes that validate exports.")
    deletion_list: Path | None = Field(
        None, description="File of record ids and content hashes that must not be learned; unset: none."
    )
    id_field: str = Field("id", min_length=1, description="Field of a record's id, or its path such as meta.id.")
    min_quality: float | None = Field(
        None, description="Records of less quality, or of none, are left out; unset: all stay."
    )
    quality_field: str = Field(
        "quality", min_length=1, description="Field of a record's quality, or its path such as meta.quality."
    )
    sensitive_data: SensitiveMode = Field(
        "off", description="Look for secrets and personal data: off, report, mask or reject (the record)."
    )
    near_duplicates: NearMode = Field("off", description="Look for near-duplicates: off, report or drop.")
    near_threshold: float = Field(
        0.8, ge=0.7, le=1, description="Least similarity of near-duplicates: Jaccard, of three-word shingles."
    )

    training_method: TrainableMethod | None = Field(
        None, description="lora, qlora (4-bit base), prefix or ia3; unset: lora, or qlora where lora does not fit."
    )
    training_task: Task = Field("instruction", description="What the adapter is for; the plan's defaults follow it.")
    lora_rank: int | None = Field(None, ge=1, description="Rank of the adapter; unset: the plan chooses.")
    train_epochs: float | None = Field(None, gt=0, description="Passes over the data; unset: the plan chooses.")
    learning_rate: float | None = Field(None, gt=0, description="Peak learning rate; unset: the plan chooses.")
    max_length: int | None = Field(None, ge=8, description="Tokens per record; unset: the plan chooses.")
    micro_batch: int | None = Field(None, ge=1, description="Records per forward pass; unset: the plan chooses.")
    accumulation: int | None = Field(None, ge=1, description="Forward passes per step; unset: the plan chooses.")
    train_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="What the plan is made for; auto: cuda in a pod or where nvidia-smi is, else cpu."
    )
    vram_limit_gb: float | None = Field(None, gt=0, description="Memory of the card that the plan must fit.")
    tokens_per_second: float | None = Field(
        None, gt=0, description="Throughput to expect until a training of this model and method was measured."
    )
    gpu_hour_price: float | None = Field(None, ge=0, description="Price of one GPU-hour, in any currency.")
    max_gpu_hours: float | None = Field(
        None, gt=0, description="A training that is estimated to take longer does not start; unset: no limit."
    )
    seed: int = Field(42, description="Seed of everything random.")
    adopt_trial: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of an experiment's best configuration, which the plan then is; unset: the plan chooses.",
    )
    init_from: Literal["base", "champion"] = Field(
        "base",
        description="What a training begins with: base (the base model alone) or champion (the last champion of an "
        "earlier date, on what is new to it).",
    )
    replay_fraction: float = Field(
        0.25, ge=0, lt=1, description="With INIT_FROM=champion: share of a training's records that it knows already."
    )
    train_processes: int | None = Field(
        None, ge=1, description="Processes of a local training; unset: one a GPU, or one where there is none."
    )
    train_sharding: Sharding = Field(
        "ddp", description="What several processes share: ddp the records of a step, fsdp the model's weights too."
    )
    report_to: Tracker = Field(
        "none", description="Where a local training is tracked beside TensorBoard: none, mlflow or wandb."
    )
    checkpoint_seconds: float = Field(120, ge=0, description="Time between checkpoints of a local training.")

    min_champion_gain: float = Field(
        0.001,
        ge=0,
        description="Nats per token by which a new champion's loss must be lower at the worse end of its interval.",
    )

    regressions_dir: Path | None = Field(
        None,
        description="Prompts (*.jsonl) that a champion must answer as expected; unset: DATA_ROOT/regressions.",
    )
    eval_tasks: str = Field("", description="Comma-separated tasks of lm-eval (extra lm-eval); unset: none.")
    eval_tasks_dir: Path | None = Field(None, description="Directory of your own tasks' YAML files; unset: none.")

    h2o_api_url: str | None = Field(None, description="H2O LLM Studio's address; needed with TRAINING_BACKEND=h2o.")
    h2o_api_key: SecretStr | None = Field(None, description="Bearer key for H2O_API_URL.")
    h2o_ca_file: Path | None = Field(
        None, description="PEM file of the private certificate authority of H2O_API_URL; unset: the system's."
    )
    h2o_protocol: JsonObject = Field(
        {}, description="JSON object of the server's own routes, status names and field names (docs/h2o.md)."
    )
    h2o_timing: JsonObject = Field(
        {}, description="JSON object of time-outs, intervals and budgets in seconds (docs/h2o.md)."
    )
    h2o_limits: JsonObject = Field({}, description="JSON object of limits on what the server may send (docs/h2o.md).")

    gguf_quantization: Quantization = Field("Q4_K_M", description="Type of the GGUF that is served.")
    export_targets: str = Field(
        "ollama,lmstudio",
        description="Comma-separated: ollama, lmstudio, gguf, vllm (the merged model, which is always made).",
    )
    ollama_host: str | None = Field(None, description="Ollama server on which models are created; unset: none.")
    ollama_model_name: str = Field("predator-v21", description="Name of the created model, before :run_id.")
    lmstudio_publisher: str = Field("lora-assets", description="Folder above the model in LM Studio's layout.")

    hub_repo: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        description="owner/name of the hub repository that `lora-assets push` writes to.",
    )
    hub_private: bool = Field(True, description="Whether a hub repository that push makes is private.")

    database_url: SecretStr | None = Field(
        None, description="PostgreSQL of the run log; unset: an embedded server under DATA_ROOT."
    )
    samples_database_url: SecretStr | None = Field(
        None, description="PostgreSQL of the loop's samples, for export-samples; unset: DATABASE_URL."
    )
    samples_table: str = Field(
        "brain_training_samples", min_length=1, description="Table of the loop's samples; a schema may precede it."
    )
    samples_columns: str = Field(
        "id=id,instruction=instruction,input=input,output=output",
        description="Comma-separated field=column: a record's fields and the table's columns.",
    )
    samples_time_column: str = Field(
        "created_at", min_length=1, description="The column that says when a sample was made."
    )
    automation_on: bool = Field(
        default_factory=on_kubernetes,
        description="Whether the arrival sensor and the schedules are on from the start, or switched on in the UI.",
    )
    sensor_interval_seconds: int = Field(30, ge=1, description="Time between two looks at the exports directory.")
    arrivals_per_tick: int = Field(20, ge=1, le=MAX_WATCHED, description="The most dates that one look asks for.")
    exports_complete: Completeness = Field(
        "still",
        description="When a file without a marker NAME.done is complete: still (unchanged for two looks), "
        "rename (at once: its writer renames it into place) or marker (never).",
    )
    retrain: Literal["newest", "all"] = Field(
        "newest", description="Which dates train again when older data changed: the newest affected, or all."
    )
    time_zone: str = Field("UTC", description="Of CATCH_UP_CRON and DRIFT_CRON, such as Europe/Kyiv.")
    catch_up_cron: str = Field("0 2 * * *", description="When dates without a good adapter are asked for.")
    catch_up_gpu_hours: float | None = Field(
        None,
        gt=0,
        description="GPU-hours that one catch-up, or `lora-assets run` without --date, may ask for; unset: no limit.",
    )
    drift_cron: str = Field("0 4 * * 0", description="When the champion is evaluated on what arrived since.")
    drift_tolerance: float = Field(
        0.1, ge=0, description="Nats per token by which the champion's loss may be higher on what arrived since."
    )
    gpus: int = Field(
        1, ge=1, description="Steps on a GPU at once, over all runs on this machine: the limit of the pool gpu."
    )

    alert_webhook_url: SecretStr | None = Field(
        None, description='Webhook that takes {"text": ...}, such as Slack\'s, for alerts; unset: none are sent.'
    )
    alert_interval_seconds: float = Field(3600, gt=0, description="The same trouble is told once in this time.")
    alert_limit: int = Field(20, ge=1, description="The most alerts in that time, whatever they tell.")
    dagster_ui_url: str | None = Field(
        None, pattern=r"^https?://[^@\s]+$", description="Address of the Dagster UI, for links in alerts."
    )
    log_format: LogFormat = Field("text", description="Log lines as text, or as json: one object a line.")
    metrics_textfile_dir: Path | None = Field(
        None, description="Directory of node_exporter's textfile collector, for the metrics of runs; unset: none."
    )
    metrics_pushgateway_url: str | None = Field(
        None,
        pattern=r"^https?://[^@\s]+$",
        description="Prometheus Pushgateway, for the metrics of runs; unset: none.",
    )
    gc_days: float = Field(14, ge=1, description="What nothing refers to is removed by `gc` after so many days.")
    gc_keep: int = Field(5, ge=1, description="Versions, by number and by reign, whose exports `gc` leaves alone.")

    train_image: str | None = Field(
        None, description="On Kubernetes: image of the steps that need torch or llama.cpp; unset: the code location's."
    )
    step_cpu: str = Field("1", description="On Kubernetes: CPUs of a step that computes little.")
    step_memory: str = Field("2Gi", description="On Kubernetes: memory of a step that computes little.")
    convert_cpu: str = Field("2", description="On Kubernetes: CPUs of the steps that merge and convert.")
    convert_memory: str = Field("16Gi", description="On Kubernetes: memory of the steps that merge and convert.")
    gpu_cpu: str = Field("4", description="On Kubernetes: CPUs of a GPU step.")
    gpu_memory: str = Field("32Gi", description="On Kubernetes: memory of a GPU step, /dev/shm included.")
    shm_size: str = Field("8Gi", description="On Kubernetes: size of a GPU step's /dev/shm.")
    gpu_node_selector: str = Field(
        "nvidia.com/gpu.present=true",
        pattern=r"^(any|[^=,\s]+=[^=,\s]+(,[^=,\s]+=[^=,\s]+)*)$",
        description="On Kubernetes: label=value, comma-separated, of the nodes for GPU steps; any: whichever has GPUs.",
    )
    gpu_tolerations: str = Field(
        "nvidia.com/gpu", description="On Kubernetes: comma-separated keys of the taints that GPU steps tolerate."
    )
    pod_start_seconds: int = Field(
        900, ge=10, description="On Kubernetes: a step whose pod has not started after this time fails, and is retried."
    )

    @field_validator("export_targets")
    @classmethod
    def _known_targets(cls, value: str) -> str:
        targets = [target.strip() for target in value.split(",") if target.strip()]
        allowed = get_args(ExportTarget)
        unknown = [target for target in targets if target not in allowed]
        if unknown:
            raise ValueError(f"unknown target {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        return ",".join(targets)

    @field_validator("h2o_protocol", "h2o_timing", "h2o_limits", mode="before")
    @classmethod
    def _json(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError("no time zone of that name; allowed: UTC, Europe/Kyiv, ...") from error
        return value

    @field_validator("samples_columns")
    @classmethod
    def _mapped_once(cls, value: str) -> str:
        fields = [field for field, _ in _pairs(value)]
        if not fields or not all(field and column for field, column in _pairs(value)):
            raise ValueError("write field=column, comma-separated, such as instruction=question,output=answer")
        if len(set(fields)) < len(fields):
            raise ValueError("a field stands there twice")
        return value

    @field_validator("database_url", "samples_database_url")
    @classmethod
    def _postgresql(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value.get_secret_value())
            good = parts.scheme.split("+")[0] in ("postgres", "postgresql") and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise ValueError("not the URL of a PostgreSQL server: postgresql://user:password@host:5432/database")
        return value

    @field_validator("alert_webhook_url")
    @classmethod
    def _http(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"https?://[^\s/]+\S*", value.get_secret_value()):
            raise ValueError("not the address of a webhook: https://host/path")
        return value

    @field_validator(
        "data_root",
        "exports_dir",
        "deletion_list",
        "h2o_ca_file",
        "regressions_dir",
        "eval_tasks_dir",
        "metrics_textfile_dir",
    )
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # Paths end in manifests and reach processes that run elsewhere.
        return None if value is None else value.expanduser().absolute()

    @model_validator(mode="after")
    def _complete(self) -> Settings:
        if self.training_backend == "h2o" and not self.h2o_api_url:
            raise ValueError("H2O_API_URL must be set when TRAINING_BACKEND=h2o")
        if self.training_backend == "h2o" and self.init_from == "champion":
            raise ValueError("INIT_FROM=champion needs TRAINING_BACKEND=hf-peft: H2O begins with the base model")
        if on_kubernetes() and self.base_model_name is None:
            raise ValueError("BASE_MODEL_NAME must be set on Kubernetes: the embedded model is for trying out")
        if on_kubernetes() and self.database_url is None:
            raise ValueError("DATABASE_URL must be set on Kubernetes: an embedded PostgreSQL would end with its pod")
        return self

    @cached_property
    def layout(self) -> DataLayout:
        """Where everything lies under the data root."""
        return DataLayout(self.data_root, self.pipeline_name)

    @property
    def exports(self) -> Path:
        """The watched directory."""
        return self.exports_dir or self.layout.exports

    @property
    def pattern(self) -> str:
        """The watched file names."""
        return self.exports_pattern or f"{self.pipeline_name}_dataset_*.jsonl"

    @property
    def regressions(self) -> Path | None:
        """The directory of regression prompts; one that was named must exist, the usual one may be missing."""
        usual = self.data_root / "regressions"
        return self.regressions_dir or (usual if usual.is_dir() else None)

    @property
    def tasks(self) -> list[str]:
        """The tasks of lm-eval asked for."""
        return [task.strip() for task in self.eval_tasks.split(",") if task.strip()]

    @property
    def targets(self) -> list[str]:
        """The serving exports asked for."""
        return [target for target in self.export_targets.split(",") if target]

    @property
    def gpu_nodes(self) -> dict[str, str]:
        """The labels of the nodes for GPU steps."""
        return {} if self.gpu_node_selector == "any" else dict(_pairs(self.gpu_node_selector))

    @property
    def tolerated(self) -> list[str]:
        """The keys of the taints that GPU steps tolerate."""
        return [key.strip() for key in self.gpu_tolerations.split(",") if key.strip()]

    @property
    def needs_gguf(self) -> bool:
        """Whether any target is served from GGUF files."""
        return set(self.targets) != {"vllm"}

    @property
    def sample_columns(self) -> dict[str, str]:
        """A record's fields and the columns of the loop's table that hold them."""
        return dict(_pairs(self.samples_columns))

    @property
    def samples_url(self) -> str | None:
        """The server of the loop's samples, if one is named."""
        url = self.samples_database_url or self.database_url
        return url.get_secret_value() if url else None

    @property
    def secrets(self) -> list[str]:
        """The values that must never be shown."""
        values = (getattr(self, name) for name in type(self).model_fields)
        return [value.get_secret_value() for value in values if isinstance(value, SecretStr)]

    @property
    def recorded(self) -> dict[str, str]:
        """What manifests tell of the environment, by variable: what is on a list and set, without secrets."""
        redact = Redactor(self.secrets)
        values = {name.upper(): getattr(self, name) for name in RECORDED}
        values |= {name: os.environ.get(name) for name in RECORDED_OF_LIBRARIES}
        return {name: redact(str(value)) for name, value in values.items() if value not in (None, "")}

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What the plan is made for."""
        if self.train_device != "auto":
            return self.train_device
        return "cuda" if on_kubernetes() or shutil.which("nvidia-smi") else "cpu"

    @property
    def recipe(self) -> str:
        """Hash of the settings that decide what is trained: another recipe makes a date stale."""
        names = (
            "training_backend",
            "base_model_name",
            "base_model_revision",
            "dataset_window",
            "eval_fraction",
            "max_line_bytes",
            "training_method",
            "training_task",
            "lora_rank",
            "train_epochs",
            "learning_rate",
            "max_length",
            "micro_batch",
            "accumulation",
            "vram_limit_gb",
            "seed",
        )
        recipe = {name: getattr(self, name) for name in names}
        if self.adopt_trial:
            recipe["adopt_trial"] = self.adopt_trial
        # Not who reigns: a new champion makes no date stale.
        if self.init_from != "base":
            recipe |= {"init_from": self.init_from, "replay_fraction": self.replay_fraction}
        # Options that are off leave dates as they are; the deletion list decides by its entries.
        parameters = self.prepare_parameters
        deciding = parameters.deciding(parameters.deletions())
        recipe |= {name: value for name, value in deciding.items() if name not in PLAIN}
        return sha256_json(recipe)[:16]

    @property
    def prepare_parameters(self) -> PrepareParameters:
        """How exports become a dataset."""
        return PrepareParameters(
            window=self.dataset_window,
            eval_fraction=self.eval_fraction,
            max_line_bytes=self.max_line_bytes,
            deletion_list=self.deletion_list,
            id_field=self.id_field,
            min_quality=self.min_quality,
            quality_field=self.quality_field,
            sensitive_data=self.sensitive_data,
            near_duplicates=self.near_duplicates,
            near_threshold=self.near_threshold,
        )


def load_settings() -> Settings:
    """Read and check the environment.

    Raises:
        ConfigurationError: names each variable that is wrong, its value unless secret, and what is allowed.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise ConfigurationError(
            problems, where="environment", remedy="docs/settings.md has a table of all variables"
        ) from error


def _describe(problem: Any) -> str:
    if not problem["loc"]:
        return str(problem["msg"]).removeprefix("Value error, ")
    name = str(problem["loc"][0])
    field: FieldInfo = Settings.model_fields[name.lower()]
    value = "" if is_secret(field) else f"={problem['input']}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "string_pattern_mismatch":
        # A pattern is no answer to what is allowed; the field's meaning is.
        message = f"not of the form that it must have. {field.description}"
    return f"{name.upper()}{value}: {message}"


def is_secret(field: FieldInfo) -> bool:
    """Whether the field's value must never be shown."""
    return "SecretStr" in str(field.annotation)


def sources(settings: Settings) -> dict[str, str]:
    """Where each value in force came from: ``environment``, ``.env`` or ``default``, by field name."""
    from dotenv import dotenv_values

    environment = {name.lower() for name, value in os.environ.items() if value}
    file = {name.lower() for name, value in dotenv_values(ENV_FILE).items() if value}
    return {
        name: "environment" if name in environment else ENV_FILE if name in file else "default"
        for name in type(settings).model_fields
    }
