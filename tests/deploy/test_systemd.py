"""The units of one server, read: there is no systemd here."""

from __future__ import annotations

import configparser
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from dagster._daemon.cli import cli as daemon
from dagster_webserver.cli import dagster_webserver

from tests.deploy.manifests import ROOT

UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
COMMANDS = {"dagster-daemon": daemon, "dagster-webserver": dagster_webserver}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_again_and_may_write_to_the_data_root_alone(path: Path) -> None:
    unit = configparser.RawConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(path.read_text(encoding="utf-8"))
    service = unit["Service"]
    assert service["User"] != "root"
    assert service["Restart"] == "always"
    assert service["ProtectSystem"] == "strict"
    assert service["ReadWritePaths"] == "/data"
    assert service["NoNewPrivileges"] == "yes"
    assert service["EnvironmentFile"] == "/etc/lora-assets.env"
    assert unit["Install"]["WantedBy"] == "multi-user.target"


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_calls_a_command_with_options_that_it_has(path: Path) -> None:
    [line] = [row for row in path.read_text(encoding="utf-8").splitlines() if row.startswith("ExecStart=")]
    program, *arguments = shlex.split(line.removeprefix("ExecStart="))
    command = COMMANDS[Path(program).name]
    subcommand = [arguments.pop(0)] if arguments[0] == "run" else []
    shown = CliRunner().invoke(command, [*subcommand, "--help"]).output
    for option in (argument for argument in arguments if argument.startswith("-")):
        assert f"{option}," in shown, option
    assert "/opt/lora-assets/workspace.yaml" in arguments


def test_there_are_two() -> None:
    assert [path.stem for path in UNITS] == ["lora-assets-daemon", "lora-assets-webserver"]
