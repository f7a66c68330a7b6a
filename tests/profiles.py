"""What plans are made from where a test's dataset is not profiled itself."""

from finetune.dataset.models import DatasetProfile

PROFILE = DatasetProfile(
    total_samples=24,
    format_detected="jsonl",
    has_instruction=True,
    has_output=True,
    avg_tokens=30,
    max_tokens=40,
    columns=[],
    duplicates_found=0,
    total_tokens=720,
)
