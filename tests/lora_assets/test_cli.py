"""The command line: help with an example for every command, secrets masked, errors without tracebacks."""

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lora_assets.cli.app import app


def commands() -> dict[str, typer.models.CommandInfo]:
    found = {str(command.name or command.callback.__name__): command for command in app.registered_commands}  # type: ignore[union-attr]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        for command in group.typer_instance.registered_commands:
            name = command.name or command.callback.__name__  # type: ignore[union-attr]
            found[f"{group.name} {name}"] = command
    return found


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CliRunner:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    return CliRunner()


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help_with_an_example_and_json_for_machines(cli: CliRunner, name: str) -> None:
    result = cli.invoke(app, [*name.split(), "--help"])
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert "Example:" in text
    assert name.split()[-1] in text.split("Example:")[1]
    assert "--json" in text


def test_the_same_things_have_the_same_flags_everywhere() -> None:
    flags = {"base_model": "--base-model", "adapter": "--adapter", "dataset": "--dataset", "output": "--output"}
    seen = set()
    for name, command in commands().items():
        result = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        hints = command.callback.__annotations__ if command.callback else {}
        for parameter, flag in flags.items():
            if parameter in hints and "Argument" not in str(hints[parameter]):
                assert flag in result.output, (name, flag)
                seen.add(flag)
    assert seen == set(flags.values()), "otherwise the test looks at nothing"


def test_config_tells_sources_and_masks_secrets(cli: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("H2O_API_KEY", "very-secret")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:very-secret@127.0.0.1/db")
    monkeypatch.setenv("LORA_RANK", "4")
    result = cli.invoke(app, ["config", "--json"])
    assert result.exit_code == 0
    rows = {row["variable"]: row for row in json.loads(result.stdout)}
    assert rows["LORA_RANK"] | {"meaning": ""} == {
        "variable": "LORA_RANK",
        "value": 4,
        "source": "environment",
        "meaning": "",
    }
    assert rows["SEED"]["source"] == "default"
    assert rows["H2O_API_KEY"]["value"] == "********"
    shown = cli.invoke(app, ["config"])
    assert "very-secret" not in result.output + shown.output


def test_a_wrong_setting_ends_with_one_clear_line(cli: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINING_BACKEND", "openai")
    result = cli.invoke(app, ["config"])
    assert result.exit_code == 1
    assert "TRAINING_BACKEND=openai" in result.stderr
    assert "Traceback" not in result.stderr


def test_plan_prints_json_for_a_directory_with_only_a_configuration(cli: CliRunner, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "vocab_size": 128256,
                "max_position_embeddings": 8192,
                "tie_word_embeddings": False,
                "torch_dtype": "bfloat16",
            }
        )
    )
    result = cli.invoke(app, ["plan", "--base-model", str(model), "--vram-limit-gb", "80", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["memory_estimate"]["model_params"] == 8_030_261_248
    assert plan["memory_estimate"]["fits"] is True


def test_deletions_names_the_published_datasets_that_hold_what_is_on_the_list(cli: CliRunner, tmp_path: Path) -> None:
    exports = tmp_path / "exports"
    exports.mkdir()
    lines = "".join(f'{{"id":"r{n}","text":"record {n}"}}\n' for n in range(30))
    (exports / "brain_dataset_2026-06-01.jsonl").write_text(lines)
    assert cli.invoke(app, ["dataset", "prepare", str(exports), str(tmp_path / "data"), "--json"]).exit_code == 0
    entries = tmp_path / "deletions.txt"
    entries.write_text("r3\nr4\nunknown\n")

    result = cli.invoke(app, ["dataset", "deletions", "--list", str(entries), "--json"])

    assert result.exit_code == 0
    found = json.loads(result.stdout)
    [dataset] = found["datasets"]
    assert len(dataset["train_lines"]) + len(dataset["eval_lines"]) == 2
    assert found["versions"] == []
    shown = cli.invoke(app, ["dataset", "deletions", "--list", str(entries)])
    assert "versions that learned what is on the list: none" in shown.output
    missing = cli.invoke(app, ["dataset", "deletions"])
    assert missing.exit_code == 1
    assert "DELETION_LIST" in missing.output


def test_brackets_and_colons_in_a_table_or_an_error_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    from lora_assets.cli.console import err, print_table

    print_table(None, ["error"], [["no space left [/data/work/x] :x: [bold]"]])
    err.print("error: WINDOW=last:x: wrong [environment]", markup=False)
    shown = capsys.readouterr()
    assert "[/data/work/x] :x: [bold]" in shown.out
    assert "last:x: wrong [environment]" in shown.err
