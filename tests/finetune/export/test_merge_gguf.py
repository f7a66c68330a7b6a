from __future__ import annotations

from pathlib import Path

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import ExportError
from finetune.export import merge_gguf
from finetune.export.merge_gguf import merge_to_gguf
from finetune.export.models import GgufExport
from finetune.export.runtime import GgufRuntime
from finetune.publishing import read_manifest
from tests.finetune.export.conftest import PROMPTS, TAUGHT, MakeAdapter


def test_the_file_is_the_pipelines_but_for_the_dataset(
    base: BaseModelRef, adapter: Path, gguf: GgufExport, tmp_path: Path
) -> None:
    def make() -> merge_gguf.MergedGguf:
        return merge_to_gguf(
            base_model=base,
            adapter_path=adapter,
            output_dir=tmp_path / "out",
            run_id="run1",
            quantization="Q4_K_M",
            validate_on=PROMPTS,
        )

    made = make()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run1-Q4_K_M.gguf", "manifest.json"}
    assert made.tokenization_equal
    assert made.divergence == pytest.approx(gguf.verification.divergence["Q4_K_M"])
    with GgufRuntime(made.file.path) as runtime:
        assert runtime.chat(PROMPTS[0]) == TAUGHT["What colour is the sky?"]
    assert make() == made.model_copy(update={"reused": True})


def test_an_adapter_that_llama_cpp_cannot_load_is_merged_all_the_same(
    base: BaseModelRef, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from peft import IA3Config

    adapter = make_adapter(IA3Config(task_type="CAUSAL_LM"))
    made = merge_to_gguf(base_model=base, adapter_path=adapter, output_dir=tmp_path / "out", run_id="r")
    assert made.file.path == tmp_path / "out" / "r-Q8_0.gguf"
    assert (made.tokenization_equal, made.divergence, made.max_logit_difference) == (None, None, None)
    assert read_manifest(made.path, verify="hashes").outputs[made.file.path.name].sha256 == made.file.sha256


def test_a_file_that_answers_otherwise_is_not_published(
    base: BaseModelRef, adapter: Path, gguf: GgufExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_another_model(source: Path, target: Path, quantization: str) -> None:
        target.write_bytes(gguf.base.path.read_bytes())

    monkeypatch.setattr(merge_gguf, "quantize_gguf", of_another_model)
    with pytest.raises(ExportError, match="does not answer like"):
        merge_to_gguf(
            base_model=base, adapter_path=adapter, output_dir=tmp_path / "out", run_id="r", validate_on=PROMPTS
        )
    assert list(tmp_path.iterdir()) == []
