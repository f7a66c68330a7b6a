"""What manifests tell of the environment."""

from __future__ import annotations

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
