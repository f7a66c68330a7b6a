from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from finetune.errors import ConfigurationError, ExportError
from finetune.export.converter import Conversions, ModelConversion, Precision
from finetune.export.models import GgufExport, MergedModel
from finetune.export.quantize import quantize_gguf
from finetune.export.runtime import GgufRuntime
from finetune.export.tensor_types import FULL_PRECISIONS, QUANTIZATIONS, ModelShape, choose_types
from finetune.export.verify import LIMITS, Reference, compare
from finetune.publishing import sha256_file
from lora_assets.settings import Quantization
from tests.finetune.export.conftest import PROMPTS, TAUGHT

# SHA-256 of what llama.cpp's own llama_model_quantize makes of `random_model`.
LLAMA_CPP_DIGESTS = {
    "Q8_0": "4cff2f16cec1655fba11ac1ad2a82cb7aba0417e0598d8eb4971f3c0f7a908ba",
    "Q6_K": "da1338a50474976b561615576492c43f475f5490bc18c819a5b73c78cfcbc94c",
    "Q5_K_M": "48a9d0dec84f2375fe9cacf8e1489f6fb1ca39ba08d333507822b6742efa3d20",
    "Q4_K_M": "8fc5c82289d47bc0495ceb67bcfdc324e027d3154668ba1fcb13b2882541652b",
    "Q4_0": "217314d229d73e3d99ee05470ee1b287ab606ac4a8a77b9fadb5c691bacc2169",
    "Q2_K": "426a60332c4e05a4689eaf04e4740372320b34b91f47c8608e2724ff33c279ab",
}
SEVEN_BILLION = ModelShape("llama", layers=32, heads=32, kv_heads=32)


def types_of(file: Path) -> dict[str, str]:
    from gguf import GGUFReader

    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}


def llama(layers: int, *, tied: bool = False, hidden: int = 4096) -> list[tuple[str, tuple[int, ...], str]]:
    """A Llama's tensors in llama.cpp's order."""
    names = {f"blk.{n:02}.{part}.weight" for n in range(layers) for part in ("attn_k", "attn_q", "attn_v")}
    names |= {f"blk.{n:02}.{part}.weight" for n in range(layers) for part in ("attn_output", "ffn_down", "ffn_up")}
    listed = [("token_embd.weight", (hidden, 32000), "F16")]
    listed += [] if tied else [("output.weight", (hidden, 32000), "F16")]
    listed += [(name, (hidden, hidden), "F16") for name in sorted(names)]
    return [*listed, ("output_norm.weight", (hidden,), "F32"), ("blk.00.attn_norm.weight", (hidden,), "F32")]


@pytest.mark.parametrize("quantization", list(QUANTIZATIONS))
def test_every_quantization_loads_and_gets_smaller(gguf: GgufExport, tmp_path: Path, quantization: str) -> None:
    target = tmp_path / "q.gguf"
    quantize_gguf(gguf.full.path, target, quantization)
    assert target.stat().st_size < 0.6 * gguf.full.size
    assert types_of(target)["output_norm.weight"] == "F32"
    with GgufRuntime(target) as runtime:
        answer = runtime.chat(PROMPTS[0])
    # A model this small loses letters to four bits and words to two.
    assert answer == TAUGHT["What colour is the sky?"] or quantization in ("Q4_0", "Q2_K")


def test_every_full_precision_answers_like_the_merged_model(merged: MergedModel, tmp_path: Path) -> None:
    files = {precision: tmp_path / f"{precision}.gguf" for precision in get_args(Precision)}
    assert files.keys() == set(FULL_PRECISIONS)
    assert {*FULL_PRECISIONS, *QUANTIZATIONS} == set(get_args(Quantization)) == LIMITS.keys()
    with Conversions([ModelConversion(merged.path, file, name, {}) for name, file in files.items()]) as conversions:
        reference = Reference(merged.path, PROMPTS)
        conversions.wait()
    for precision, file in files.items():
        assert types_of(file)["blk.0.ffn_up.weight"] == precision
        with GgufRuntime(file, context=reference.context) as runtime:
            compare(runtime, reference, LIMITS[precision])


def test_kernels_agree_with_the_reference_decoder(gguf: GgufExport, tmp_path: Path) -> None:
    from gguf import GGUFReader, dequantize

    target = tmp_path / "q.gguf"
    quantize_gguf(gguf.full.path, target, "Q6_K")
    full = {tensor.name: tensor for tensor in GGUFReader(gguf.full.path).tensors}
    for tensor in GGUFReader(target).tensors:
        expected = np.asarray(full[tensor.name].data, dtype=np.float32)
        found = dequantize(tensor.data, tensor.tensor_type)
        assert np.abs(found - expected).max() <= 0.05 * np.abs(expected).max()


def test_the_number_of_threads_does_not_change_a_byte(gguf: GgufExport, tmp_path: Path) -> None:
    for threads in (1, 3):
        quantize_gguf(gguf.full.path, tmp_path / str(threads), "Q4_K_M", threads=threads)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes() == gguf.quantized.path.read_bytes()


def test_q4_k_m_gives_more_bits_where_llama_cpp_does() -> None:
    types = choose_types("Q4_K_M", llama(32), SEVEN_BILLION)
    more = {n for n in range(32) if types[f"blk.{n:02}.attn_v.weight"] == "Q6_K"}
    # The first and last eighth, and every third layer between.
    assert more == {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    assert {n for n in range(32) if types[f"blk.{n:02}.ffn_down.weight"] == "Q6_K"} == more
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == types["blk.00.attn_q.weight"] == "Q4_K"
    assert types["output_norm.weight"] == types["blk.00.attn_norm.weight"] == "F32"


def test_tied_embeddings_are_quantized_as_the_output() -> None:
    assert choose_types("Q4_K_M", llama(2, tied=True), SEVEN_BILLION)["token_embd.weight"] == "Q6_K"


def test_grouped_attention_values_keep_more_bits() -> None:
    grouped = ModelShape("llama", layers=32, heads=32, kv_heads=8)
    assert choose_types("Q2_K", llama(2), grouped)["blk.00.attn_v.weight"] == "Q4_K"
    assert choose_types("Q2_K", llama(2), SEVEN_BILLION)["blk.00.attn_v.weight"] == "Q3_K"
    seventy = ModelShape("llama", layers=80, heads=64, kv_heads=8)
    assert choose_types("Q4_K_M", llama(80), seventy)["blk.11.attn_v.weight"] == "Q5_K"


def test_rows_that_are_no_whole_blocks_fall_back() -> None:
    narrow = choose_types("Q4_K_M", llama(2, hidden=96), SEVEN_BILLION)
    assert narrow["blk.00.attn_q.weight"] == "Q5_0"
    assert narrow["output.weight"] == "Q8_0"
    assert choose_types("Q4_K_M", llama(2, hidden=40), SEVEN_BILLION)["blk.00.attn_q.weight"] == "F16"


def test_architectures_with_other_rules_are_left_to_llama_cpps_program() -> None:
    experts = [*llama(1), ("blk.00.ffn_down_exps.weight", (4096, 4096, 8), "F16")]
    with pytest.raises(ExportError, match="needs llama"):
        choose_types("Q4_K_M", experts, SEVEN_BILLION)


def test_an_unknown_quantization_is_refused(gguf: GgufExport, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="unknown quantization 'q4'"):
        quantize_gguf(gguf.full.path, tmp_path / "q", "q4")


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An 8-layer Llama of seeded noise, the same bytes on every machine."""
    from gguf import GGUFWriter

    path = tmp_path_factory.mktemp("random") / "random.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(8)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(288)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(1)
    writer.add_quantization_version(2)
    generator = np.random.default_rng(7)
    shapes = {"attn_q": (256, 256), "attn_k": (64, 256), "attn_v": (64, 256), "attn_output": (256, 256)}
    shapes |= {"ffn_gate": (288, 256), "ffn_up": (288, 256), "ffn_down": (256, 288)}
    tensors = {"token_embd": (64, 256), "output": (64, 256)}
    tensors |= {f"blk.{layer}.{name}": shape for layer in range(8) for name, shape in shapes.items()}
    for name, shape in tensors.items():
        # Sums of uniform integers: no function whose last digit depends on the machine.
        values = generator.integers(-1000, 1000, (4, *shape)).sum(0) / 4096
        writer.add_tensor(f"{name}.weight", values.astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Where the machine has llama.cpp's own program, it must give what we give.
PATHS = ["", *([os.environ["PATH"]] if shutil.which("llama-quantize") else [])]


@pytest.mark.parametrize("path", PATHS, ids=["in process", "llama-quantize"][: len(PATHS)])
@pytest.mark.parametrize(("quantization", "digest"), LLAMA_CPP_DIGESTS.items())
def test_files_are_those_of_llama_cpp_byte_for_byte(
    random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str, digest: str, path: str
) -> None:
    monkeypatch.setenv("PATH", path)
    quantize_gguf(random_model, tmp_path / "q", quantization)
    assert sha256_file(tmp_path / "q") == digest


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_way_that_this_machine_has_gives_the_same_bytes(
    gguf: GgufExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    made = set()
    for path in PATHS:
        monkeypatch.setenv("PATH", path)
        quantize_gguf(gguf.full.path, tmp_path / "q", quantization)
        made.add(sha256_file(tmp_path / "q"))
    assert len(made) == 1


def test_llama_quantize_is_used_where_it_is_installed(
    random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\necho "$3 $4" > "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    quantize_gguf(random_model, tmp_path / "q", "Q4_K_M", threads=3)
    assert (tmp_path / "q").read_text() == "Q4_K_M 3\n"
    program.write_text("#!/bin/sh\necho requantizing is disabled >&2\nexit 1\n")
    with pytest.raises(ExportError, match="requantizing is disabled"):
        quantize_gguf(random_model, tmp_path / "q", "Q4_K_M")
