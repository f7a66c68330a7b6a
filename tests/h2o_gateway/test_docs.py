from __future__ import annotations

import re
from pathlib import Path

import pytest

from h2o_gateway.app import create_app
from h2o_gateway.settings import PREFIX, Settings
from tests.h2o_gateway.process import KEY

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "h2o.md").read_text(encoding="utf-8")


def test_the_page_tells_of_every_setting_with_its_default() -> None:
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, "") else f"`{field.default:g}`" if name.endswith("up_seconds") else None
        shown = f"`{field.default}`" if default is None else default
        assert f"| `{name.upper()}` | {shown} | {field.description} |" in DOCS


def test_the_page_tells_of_every_route(tmp_path: Path) -> None:
    described = create_app(Settings(data_dir=tmp_path), KEY).openapi()["paths"]
    routes = {
        f"`{method.upper()} {path}`".replace("experiment_id", "id") for path in described for method in described[path]
    }
    assert routes == set(re.findall(r"^\| (`(?:GET|POST) [^`]+`)", DOCS, re.MULTILINE))


@pytest.mark.parametrize("file", ["h2o-gateway/Dockerfile", "helm/lora-assets/templates/h2o-gateway.yaml"])
def test_what_deploys_the_gateway_sets_settings_that_it_has(file: str) -> None:
    text = (ROOT / "deploy" / file).read_text(encoding="utf-8")
    named = set(re.findall(rf"\b{PREFIX}([A-Z_]+)\b", text))
    assert named
    assert named <= {name.upper() for name in Settings.model_fields}
