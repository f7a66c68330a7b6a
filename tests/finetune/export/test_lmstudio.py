from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from finetune.base_model.models import BaseModelRef
from finetune.errors import ExportError
from finetune.export.lmstudio import export_lmstudio
from finetune.export.models import GgufExport
from finetune.export.runtime import GgufRuntime
from finetune.publishing import sha256_file
from tests.finetune.export.conftest import DATASET, PROMPTS


def test_the_model_lies_where_lm_studio_looks_and_answers(base: BaseModelRef, gguf: GgufExport, tmp_path: Path) -> None:
    export = export_lmstudio(
        gguf=gguf, base_model=base, output_dir=tmp_path / "lmstudio", run_id="run1", publisher="lora-assets"
    )
    assert export.gguf == tmp_path / "lmstudio" / "lora-assets" / "small-run1" / "small-run1-Q4_K_M.gguf"
    assert sha256_file(export.gguf) == gguf.quantized.sha256
    with GgufRuntime(export.gguf) as runtime:
        assert runtime.chat(PROMPTS[0]) == gguf.verification.sample_answer


def test_the_configuration_tells_facts_of_the_file(base: BaseModelRef, gguf: GgufExport, tmp_path: Path) -> None:
    export = export_lmstudio(gguf=gguf, base_model=base, output_dir=tmp_path / "l", run_id="run1", publisher="us")
    config = json.loads(export.config.read_text())
    assert "does not read this file" in config["note"]
    assert (export.path / config["model"]["file"]) == export.gguf
    facts = config["model"]["gguf"]
    assert (facts["architecture"], facts["block_count"], facts["context_length"]) == ("llama", 2, 256)
    assert (facts["file_type"], facts["version"]) == ("MOSTLY_Q4_K_M", "run1")
    assert (facts["licence"], facts["base_model"], facts["dataset"]) == ("apache-2.0", base.name, DATASET)
    assert config["provenance"]["base_model"] == base.name
    assert config["verification"]["greedy_agreement"] == gguf.verification.greedy_agreement["Q4_K_M"]
    assert config["suggested"]["prediction"]["stop_strings"] == ["<|im_end|>"]
    command = " ".join(config["import"]["command"])
    assert command.startswith("lms import us/small-run1/small-run1-Q4_K_M.gguf --user-repo us/small-run1")
    assert command in (export.path / "README.md").read_text()


def test_model_yaml_describes_the_file_in_lm_studios_format(
    base: BaseModelRef, gguf: GgufExport, tmp_path: Path
) -> None:
    """Field by field as https://github.com/modelyaml/modelyaml, Draft 1.0, has them."""
    export = export_lmstudio(
        gguf=gguf, base_model=base, output_dir=tmp_path / "l", run_id="run1", publisher="us", hub_repo="us/loop"
    )
    stated = yaml.safe_load((export.path / "model.yaml").read_text(encoding="utf-8"))
    assert stated == {
        "model": "us/small-run1",
        "base": [{"key": "us/small-run1", "sources": [{"type": "huggingface", "user": "us", "repo": "loop"}]}],
        "metadataOverrides": {
            "domain": "llm",
            "architectures": ["llama"],
            "compatibilityTypes": ["gguf"],
            "paramsStrings": ["1.3M"],
            "minMemoryUsageBytes": export.gguf.stat().st_size,
            "contextLengths": [256],
            "vision": False,
        },
        "config": {
            "load": {"fields": [{"key": "llm.load.contextLength", "value": 256}]},
            "operation": {
                "fields": [
                    {"key": "llm.prediction.temperature", "value": 0.0},
                    {"key": "llm.prediction.stopStrings", "value": ["<|im_end|>"]},
                ]
            },
        },
    }
    assert "model.yaml" in (export.path / "README.md").read_text()


def test_the_same_file_is_laid_out_once(base: BaseModelRef, gguf: GgufExport, tmp_path: Path) -> None:
    def export(publisher: str) -> bool:
        return export_lmstudio(
            gguf=gguf, base_model=base, output_dir=tmp_path / "l", run_id="run1", publisher=publisher
        ).reused

    assert [export("us"), export("us"), export("them")] == [False, True, False]
    assert not (tmp_path / "l" / "us").exists()


def test_a_publisher_that_is_no_folder_is_refused(base: BaseModelRef, gguf: GgufExport, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be a publisher"):
        export_lmstudio(gguf=gguf, base_model=base, output_dir=tmp_path / "l", run_id="run1", publisher="../x")
    assert list(tmp_path.iterdir()) == []
