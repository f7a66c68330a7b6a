from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import ArtifactError, ConfigurationError, ExportError
from finetune.export.converter import AdapterConversion, Conversions, ModelConversion
from finetune.export.gguf import export_gguf, verify_gguf
from finetune.export.merge import merge_adapter
from finetune.export.modelfile import read_modelfile, write_modelfiles
from finetune.export.modelfile_grammar import Command
from finetune.export.models import GgufExport, MergedModel
from finetune.export.quantize import quantize_gguf
from finetune.export.runtime import GgufRuntime
from finetune.export.tensor_types import FULL_PRECISIONS
from finetune.export.verify import LIMITS, Limits, Reference, check_tokenization, compare
from tests.finetune.export.conftest import DATASET, PROMPTS, QUESTIONS, TAUGHT, MakeAdapter


def test_every_file_is_written_and_answers_like_the_merged_model(gguf: GgufExport) -> None:
    assert (gguf.full.quantization, gguf.quantized.quantization) == ("F16", "Q4_K_M")
    assert gguf.quantized.size < 0.6 * gguf.full.size
    assert gguf.base.path.parent.parent.name == "base_models"
    for file in (gguf.full, gguf.quantized, gguf.base, gguf.adapter):
        assert file.path.stat().st_size == file.size
    checked = gguf.verification
    assert checked.tokenization_equal
    assert checked.greedy_agreement.keys() == {"F16", "Q4_K_M", "base+adapter"}
    assert checked.greedy_agreement["F16"] == checked.greedy_agreement["base+adapter"] == 1.0
    assert checked.divergence["F16"] < 1e-4
    assert checked.divergence["F16"] < checked.divergence["Q4_K_M"]
    assert checked.perplexity["F16"] == pytest.approx(checked.perplexity["merged"], rel=1e-2)


def test_the_training_shows_in_the_sample_answer(gguf: GgufExport) -> None:
    checked = gguf.verification
    assert checked.sample_answer == TAUGHT[checked.sample_question]
    assert checked.base_answer == QUESTIONS[checked.sample_question]


def test_metadata_name_the_run_its_base_the_licence_and_the_dataset(base: BaseModelRef, gguf: GgufExport) -> None:
    from gguf import GGUFReader

    fields = GGUFReader(gguf.quantized.path).fields
    assert fields["general.version"].contents() == "run1"
    assert fields["general.name"].contents() == "tests/small run1"
    assert fields["general.base_model.0.name"].contents() == "tests/small"
    assert fields["general.base_model.0.version"].contents() == base.fingerprint
    assert fields["general.license"].contents() == "apache-2.0"
    assert fields["general.dataset.0.version"].contents() == DATASET
    assert "<|im_start|>" in fields["tokenizer.chat_template"].contents()


def test_the_same_inputs_are_exported_once(
    base: BaseModelRef, adapter: Path, merged: MergedModel, gguf: GgufExport
) -> None:
    again = export_gguf(
        merged=merged,
        base_model=base,
        adapter_path=adapter,
        output_dir=gguf.path,
        run_id="run1",
        base_cache=gguf.base.path.parent.parent,
        prompts=PROMPTS,
        quantization="Q4_K_M",
        dataset=DATASET,
    )
    assert again == gguf.model_copy(update={"reused": True})


def test_a_whole_export_verifies_again(gguf: GgufExport, merged: MergedModel) -> None:
    assert verify_gguf(export=gguf, merged=merged, prompts=PROMPTS) == gguf.verification


def test_verification_notices_a_flipped_bit(gguf: GgufExport, merged: MergedModel, tmp_path: Path) -> None:
    moved = tmp_path / "gguf"
    shutil.copytree(gguf.path, moved)
    file = moved / gguf.quantized.path.name
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    damaged = gguf.model_copy(update={"path": moved, "quantized": gguf.quantized.model_copy(update={"path": file})})
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        verify_gguf(export=damaged, merged=merged, prompts=PROMPTS)


def test_the_runtime_refuses_a_cut_off_file(gguf: GgufExport, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.quantized.path.read_bytes()[:-5000])
    with pytest.raises(ExportError, match="cannot load the file"), GgufRuntime(cut):
        pass


def test_the_comparison_notices_another_models_answers(gguf: GgufExport, merged: MergedModel) -> None:
    reference = Reference(merged.path, PROMPTS)
    with GgufRuntime(gguf.base.path) as runtime, pytest.raises(ExportError, match="does not answer like"):
        compare(runtime, reference, LIMITS["F16"])


@pytest.mark.parametrize("quantization", [name for name in LIMITS if name not in FULL_PRECISIONS])
def test_every_quantization_keeps_its_limits_and_another_models_file_does_not(
    gguf: GgufExport, merged: MergedModel, tmp_path: Path, quantization: str
) -> None:
    reference = Reference(merged.path, PROMPTS)
    ours, others = tmp_path / "ours.gguf", tmp_path / "others.gguf"
    quantize_gguf(gguf.full.path, ours, quantization)
    quantize_gguf(gguf.base.path, others, quantization)
    with GgufRuntime(ours) as runtime:
        found = compare(runtime, reference, LIMITS[quantization])
    assert 0 < found.divergence <= LIMITS[quantization].divergence
    with GgufRuntime(others) as runtime, pytest.raises(ExportError, match="does not answer like"):
        compare(runtime, reference, LIMITS[quantization])


@pytest.mark.parametrize(
    "limits", [Limits(1e-2, 1.0, 1e-9, 9.0), Limits(1e-2, 1.0, 9.0, 0.9)], ids=["divergence", "perplexity"]
)
def test_divergence_and_perplexity_are_bounded_each_for_itself(
    gguf: GgufExport, merged: MergedModel, limits: Limits
) -> None:
    reference = Reference(merged.path, PROMPTS)
    with GgufRuntime(gguf.full.path) as runtime:
        compare(runtime, reference, LIMITS["F16"])
        with pytest.raises(ExportError, match="100% of greedy tokens equal"):
            compare(runtime, reference, limits)


def test_the_tokenization_check_looks_at_every_text(gguf: GgufExport, merged: MergedModel) -> None:
    reference = Reference(merged.path, PROMPTS)
    assert "<|im_start|>" in reference.texts[-len(PROMPTS)]
    with GgufRuntime(gguf.full.path) as runtime:
        check_tokenization(runtime, reference)
        for ids in (*reference.text_ids, *reference.ids):
            ids.reverse()
            with pytest.raises(ExportError, match=r"llama\.cpp (tokenizes|makes) "):
                check_tokenization(runtime, reference)
            ids.reverse()


def test_a_file_with_another_vocabulary_is_refused(gguf: GgufExport, merged: MergedModel, tmp_path: Path) -> None:
    altered = tmp_path / "altered.gguf"
    content = gguf.full.path.read_bytes()
    start = content.index(b"tokenizer.ggml.tokens")
    head, vocabulary = content[:start], content[start:]
    # A string in GGUF is its length in 8 bytes and its text: two letters change places.
    one, other = (b"\x01" + bytes(7) + letter for letter in (b"e", b"t"))
    assert one in vocabulary
    assert other in vocabulary
    swapped = vocabulary.replace(one, b"<mark>", 1).replace(other, one, 1).replace(b"<mark>", other, 1)
    altered.write_bytes(head + swapped)
    reference = Reference(merged.path, PROMPTS)
    with GgufRuntime(altered) as runtime, pytest.raises(ExportError, match=r"llama\.cpp tokenizes "):
        check_tokenization(runtime, reference)


def test_the_runtime_ends_with_its_block(gguf: GgufExport) -> None:
    with GgufRuntime(gguf.full.path) as runtime:
        process = runtime._process
        assert runtime.chat(PROMPTS[0]) == TAUGHT["What colour is the sky?"]
        assert process.poll() is None
    assert process.poll() == 0


def test_the_runtime_survives_llama_cpp_dying(gguf: GgufExport) -> None:
    with GgufRuntime(gguf.full.path) as runtime:
        runtime._process.kill()
        with pytest.raises(ExportError, match="died while answering"):
            runtime.complete([1, 2, 3], 4)


@pytest.mark.parametrize(
    "maker",
    ["GgufRuntime(path)", "Conversions([ModelConversion(path, path, 'F16', {})])"],
    ids=["runtime", "converter"],
)
def test_a_child_process_dies_with_a_parent_that_is_killed(gguf: GgufExport, maker: str) -> None:
    program = f"""
import pathlib, time
from finetune.export.converter import Conversions, ModelConversion
from finetune.export.quantize import quantize_gguf
from finetune.export.runtime import GgufRuntime
path = pathlib.Path({str(gguf.full.path)!r})
holder = {maker}
holder.__enter__()
print(holder._process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        # The child must have come to the point where it listens for its parent's end.
        time.sleep(0.5)
        parent.kill()
    for _ in range(200):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    pytest.fail("the child outlived its parent")


def test_the_adapter_gguf_keeps_every_modules_scale(
    base: BaseModelRef, gguf: GgufExport, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from peft import LoraConfig

    def lora(**changes: Any) -> LoraConfig:
        return LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", **changes)

    def one_alpha_for_all(adapter: Path, copy: Path) -> Path:
        shutil.copytree(adapter, copy)
        config = json.loads((copy / "adapter_config.json").read_text())
        config |= {"use_rslora": False, "alpha_pattern": {}}
        (copy / "adapter_config.json").write_text(json.dumps(config))
        return copy

    configs = [lora(use_rslora=True), lora(rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 64})]
    adapters = [make_adapter(config, steps=8) for config in configs]
    # What a converter would write that knows `lora_alpha` alone.
    careless = [one_alpha_for_all(adapter, tmp_path / str(n)) for n, adapter in enumerate(adapters)]
    sources = [*adapters, *careless]
    outputs = [tmp_path / f"{n}.gguf" for n in range(len(sources))]
    jobs = [AdapterConversion(source, base.path, output) for source, output in zip(sources, outputs, strict=True)]
    with Conversions(jobs) as conversions:
        conversions.wait()
    for adapter, right, wrong in zip(adapters, outputs[:2], outputs[2:], strict=True):
        merged = merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
        reference = Reference(merged.path, PROMPTS)
        with GgufRuntime(gguf.base.path, right) as runtime:
            assert compare(runtime, reference, LIMITS["F16"]).divergence < 1e-3
        for other in (None, wrong):
            with GgufRuntime(gguf.base.path, other) as runtime, pytest.raises(ExportError):
                compare(runtime, reference, LIMITS["F16"])


def test_an_adapter_that_is_no_plain_lora_is_refused(base: BaseModelRef, adapter: Path, tmp_path: Path) -> None:
    dora = tmp_path / "adapter"
    shutil.copytree(adapter, dora)
    config = json.loads((dora / "adapter_config.json").read_text()) | {"use_dora": True}
    (dora / "adapter_config.json").write_text(json.dumps(config))
    conversions = Conversions([AdapterConversion(dora, base.path, tmp_path / "a.gguf")])
    with pytest.raises(ExportError, match="plain LoRA adapters only"), conversions:
        pass


def test_where_llama_cpp_runs_no_such_adapter_the_merged_model_is_exported_alone(
    base: BaseModelRef, make_adapter: MakeAdapter, gguf: GgufExport, tmp_path: Path
) -> None:
    from peft import IA3Config

    adapter = make_adapter(IA3Config(task_type="CAUSAL_LM"))
    merged = merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "merged", run_id="r")

    def make() -> GgufExport:
        return export_gguf(
            merged=merged,
            base_model=base,
            adapter_path=adapter,
            output_dir=tmp_path / "gguf",
            run_id="r",
            base_cache=gguf.base.path.parent.parent,
            prompts=PROMPTS,
            quantization="F16",
        )

    export = make()
    assert (export.adapter, export.no_adapter) == (None, "llama.cpp runs plain LoRA adapters only")
    assert set(export.verification.greedy_agreement) == {"F16"}
    assert {path.name for path in export.path.iterdir()} == {"merged-F16.gguf", "manifest.json"}
    assert make() == export.model_copy(update={"reused": True})
    assert verify_gguf(export=export, merged=merged, prompts=PROMPTS) == export.verification
    modelfiles = write_modelfiles(gguf=export, base_model=base, output_dir=tmp_path / "ollama", run_id="r")
    assert modelfiles.modelfile is None
    assert {path.name for path in modelfiles.path.iterdir()} == {"Modelfile.merged", "manifest.json"}
    assert read_modelfile(modelfiles.modelfile_merged)[0] == Command("from", str(export.quantized.path))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"architectures": ["UnheardOfForCausalLM"]}, "UnheardOfForCausalLM"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "pre-tokenizer"),
    ],
    ids=["architecture", "tokenizer"],
)
def test_a_failed_conversion_names_what_is_at_fault(
    merged: MergedModel, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(merged.path, model)
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | change))
    with (
        Conversions([ModelConversion(model, tmp_path / "out.gguf", "F16", {})]) as conversions,
        pytest.raises(ExportError, match=message),
    ):
        conversions.wait()


def test_a_tensor_of_the_wrong_shape_is_named_whoever_meets_it(merged: MergedModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    # The first is passed on by the converter, and the runtime refuses the file; the other it rearranges itself.
    wrong = ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    models = [tmp_path / tensor for tensor in wrong]
    outputs = [tmp_path / f"{tensor}.gguf" for tensor in wrong]
    for tensor, model in zip(wrong, models, strict=True):
        shutil.copytree(merged.path, model)
        for shard in model.glob("*.safetensors"):
            tensors = load_file(shard)
            if tensor in tensors:
                tensors[tensor] = tensors[tensor][:-1].contiguous()
                shard.unlink()
                save_file(tensors, shard, metadata={"format": "pt"})
        refused = rf"{tensor} of the merged model has the shape \(\d+, 256\), .* asks for"
        with pytest.raises(ExportError, match=refused):
            Reference(model, PROMPTS)
    jobs = [ModelConversion(model, output, "F16", {}) for model, output in zip(models, outputs, strict=True)]
    with Conversions(jobs) as conversions, pytest.raises(ExportError) as failed:
        conversions.wait()
    assert f"RuntimeError at the tensor {wrong[1]}: shape" in str(failed.value)
    assert str(models[1]) in str(failed.value), "the first was converted"
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_up\.weight. has wrong shape"), GgufRuntime(outputs[0]):
        pass


def test_a_full_disk_is_told_from_a_failed_conversion(base: BaseModelRef, gguf: GgufExport) -> None:
    # Every write to /dev/full fails with ENOSPC.
    full = Path("/dev/full")
    with (
        Conversions([ModelConversion(base.path, full, "F16", {})]) as conversions,
        pytest.raises(OSError, match="No space left"),
    ):
        conversions.wait()
    with pytest.raises(OSError, match="No space left"):
        quantize_gguf(gguf.full.path, full, "Q8_0")


def test_an_unknown_quantization_is_refused_before_any_work(
    base: BaseModelRef, adapter: Path, merged: MergedModel, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="Q9_X"):
        export_gguf(
            merged=merged,
            base_model=base,
            adapter_path=adapter,
            output_dir=tmp_path / "gguf",
            run_id="r",
            base_cache=tmp_path / "base",
            prompts=PROMPTS,
            quantization="Q9_X",
        )
    assert list(tmp_path.iterdir()) == []
