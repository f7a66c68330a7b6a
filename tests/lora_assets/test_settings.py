"""The environment: every name of the job's specification, typed, with errors that say what is allowed."""

from pathlib import Path

import pytest

from finetune.errors import ConfigurationError
from lora_assets.settings import Settings, load_settings, sources

SPECIFIED = {
    "TRAINING_BACKEND": "h2o",
    "BASE_MODEL_NAME": "llama3-8b",
    "LORA_RANK": "8",
    "TRAIN_EPOCHS": "3",
    "H2O_API_URL": "https://h2o-llm.internal",
    "H2O_API_KEY": "secret-key-from-vault",
    "EXPORT_TARGETS": "ollama,lmstudio",
}


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


def test_every_name_of_the_specification_is_read_as_it_stands_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SPECIFIED.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.training_backend == "h2o"
    assert settings.base_model_name == "llama3-8b"
    assert settings.lora_rank == 8
    assert settings.train_epochs == 3
    assert settings.h2o_api_url == "https://h2o-llm.internal"
    assert settings.h2o_api_key is not None
    assert settings.h2o_api_key.get_secret_value() == "secret-key-from-vault"
    assert settings.targets == ["ollama", "lmstudio"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("TRAINING_BACKEND", "openai", ["TRAINING_BACKEND=openai", "hf-peft", "h2o"]),
        ("LORA_RANK", "eight", ["LORA_RANK=eight", "integer"]),
        ("LORA_RANK", "0", ["LORA_RANK=0", "greater than or equal to 1"]),
        ("EXPORT_TARGETS", "ollama,tensorrt", ["EXPORT_TARGETS", "tensorrt", "lmstudio"]),
        ("DATASET_WINDOW", "last:x", ["DATASET_WINDOW=last:x", "last:N"]),
        ("GGUF_QUANTIZATION", "Q3", ["GGUF_QUANTIZATION=Q3", "Q4_K_M"]),
        ("PIPELINE_NAME", "../brain", ["PIPELINE_NAME=../brain"]),
        ("DATABASE_URL", "mysql://me:pw@host/db", ["DATABASE_URL: not the URL of a PostgreSQL server"]),
        ("DATABASE_URL", "notaurl:pw", ["DATABASE_URL: not the URL"]),
        ("SAMPLES_COLUMNS", "id", ["SAMPLES_COLUMNS=id", "field=column"]),
        ("SAMPLES_COLUMNS", "id=a,id=b", ["SAMPLES_COLUMNS=id=a,id=b", "twice"]),
        ("SENSITIVE_DATA", "hide", ["SENSITIVE_DATA=hide", "mask"]),
        ("H2O_PROTOCOL", "{id_field", ["H2O_PROTOCOL={id_field", "property name"]),
        ("EXPORTS_COMPLETE", "soon", ["EXPORTS_COMPLETE=soon", "rename"]),
        ("TIME_ZONE", "Europe/Nowhere", ["TIME_ZONE=Europe/Nowhere", "Europe/Kyiv"]),
        ("ARRIVALS_PER_TICK", "1000", ["ARRIVALS_PER_TICK=1000", "200"]),
        ("CATCH_UP_GPU_HOURS", "0", ["CATCH_UP_GPU_HOURS=0", "greater than 0"]),
        ("H2O_TIMING", "[1]", ["H2O_TIMING=[1]", "dictionary"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: list[str]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as error:
        load_settings()
    for part in told:
        assert part in str(error.value)
    assert "me:pw" not in str(error.value)
    assert "notaurl:pw" not in str(error.value)


def test_h2o_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINING_BACKEND", "h2o")
    with pytest.raises(ConfigurationError, match="H2O_API_URL must be set"):
        load_settings()


def test_in_a_pod_the_demo_model_is_never_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(ConfigurationError, match="BASE_MODEL_NAME must be set on Kubernetes"):
        load_settings()
    monkeypatch.setenv("BASE_MODEL_NAME", "llama3-8b")
    with pytest.raises(ConfigurationError, match="DATABASE_URL must be set on Kubernetes: an embedded"):
        load_settings()
    monkeypatch.setenv("DATABASE_URL", "postgresql://lora@db/lora")
    assert load_settings().data_root == Path("/data")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASE_MODEL_NAME", "")
    assert load_settings().base_model_name is None


def test_the_source_of_each_value_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TRAIN_EPOCHS=2\nLORA_RANK=4\n")
    monkeypatch.setenv("LORA_RANK", "16")
    settings = load_settings()
    assert (settings.lora_rank, settings.train_epochs) == (16, 2)
    origin = sources(settings)
    assert (origin["lora_rank"], origin["train_epochs"], origin["seed"]) == ("environment", ".env", "default")


def test_a_secret_never_stands_in_the_settings_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SPECIFIED.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert "secret-key-from-vault" not in f"{settings!r} {settings} {settings.model_dump_json()}"


def test_the_recipe_follows_what_decides_the_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_settings().recipe
    monkeypatch.setenv("OLLAMA_MODEL_NAME", "other")
    assert load_settings().recipe == before
    monkeypatch.setenv("LORA_RANK", "4")
    assert load_settings().recipe != before


def test_another_deletion_list_makes_dates_stale_and_options_that_are_off_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = load_settings().recipe
    entries = tmp_path / "deletions.txt"
    entries.write_text("# nobody yet\n")
    monkeypatch.setenv("DELETION_LIST", "deletions.txt")
    monkeypatch.setenv("QUALITY_FIELD", "meta.quality")
    assert load_settings().prepare_parameters.deletion_list == entries
    assert load_settings().recipe == before
    entries.write_text("record-7\n")
    with_one = load_settings().recipe
    assert with_one != before
    entries.write_text("record-8\n")
    assert load_settings().recipe not in (before, with_one)
    monkeypatch.setenv("MIN_QUALITY", "0.5")
    assert load_settings().prepare_parameters.min_quality == 0.5
    assert load_settings().prepare_parameters.quality_field == "meta.quality"


def test_the_docs_tell_of_every_variable() -> None:
    page = (Path(__file__).parents[2] / "docs/settings.md").read_text(encoding="utf-8")
    missing = [name for name in Settings.model_fields if f"| `{name.upper()}` |" not in page]
    assert missing == []


def test_regression_prompts_lie_under_the_data_root_unless_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    assert load_settings().regressions is None
    (tmp_path / "data" / "regressions").mkdir(parents=True)
    assert load_settings().regressions == tmp_path / "data" / "regressions"
    # One that is named is not passed over where it is missing.
    monkeypatch.setenv("REGRESSIONS_DIR", "elsewhere")
    assert load_settings().regressions == tmp_path / "elsewhere"
    assert load_settings().tasks == []
    monkeypatch.setenv("EVAL_TASKS", "hellaswag, arc_easy,")
    assert load_settings().tasks == ["hellaswag", "arc_easy"]
