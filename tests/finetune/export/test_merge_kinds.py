"""Every kind of adapter that is merged tensor by tensor, against peft: what it computes, and what it merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import ArtifactError
from finetune.export.merge import merge_adapter
from finetune.export.merge_plan import EMBEDDINGS, HEAD
from finetune.export.models import MergedModel
from finetune.export.safetensors_files import count_parameters
from tests.finetune.export.untrained import ADDED, VOCABULARY, load, logits, lora, train

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def ia3() -> Any:
    from peft import IA3Config

    return IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "up_proj", "down_proj"], feedforward_modules=["down_proj"]
    )


def trained_tokens() -> Any:
    from peft import TrainableTokensConfig

    return TrainableTokensConfig(token_indices=[3, 5], task_type="CAUSAL_LM")


PROJECTIONS = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "biases": lambda: lora(bias="all"),
    "biases of lora's modules": lambda: lora(bias="lora_only"),
    "bias of B": lambda: lora(lora_bias=True, use_rslora=True),
    "ia3": ia3,
}
ENDS = {
    "whole embeddings": lambda: lora(modules_to_save=["embed_tokens"]),
    "whole head": lambda: lora(modules_to_save=["lm_head"]),
    "both whole": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "whole, as one": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "lora on embeddings": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "lora on the head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "lora on both": lambda: lora(target_modules=["lm_head", "embed_tokens"], use_rslora=True),
    "lora, as one": lambda: lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "dora on embeddings": lambda: lora(target_modules=["q_proj", "embed_tokens"], use_dora=True),
    "tokens": lambda: lora(trainable_token_indices=[3, 5]),
    "tokens of both": lambda: lora(trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [3, 5]}),
    "other tokens of each": lambda: lora(trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [2, 7]}),
    "tokens of the head": lambda: lora(trainable_token_indices={"lm_head": [2, 7]}),
    "nothing but tokens": trained_tokens,
}
# Where one weight serves both ends, peft adds to that one what was trained for one end, or adds it twice.
MERGED_WRONGLY_IF_TIED = {
    "lora on embeddings",
    "lora on the head",
    "lora on both",
    "lora, as one",
    "dora on embeddings",
    "other tokens of each",
    "tokens of the head",
}
# Of two ends that both have grown, peft saves the one that has an adapter.
NOT_SAVED = {"lora on embeddings", "lora on the head", "lora, as one", "dora on embeddings", "nothing but tokens"}
PARTED = {*ENDS} - {"whole, as one", "lora, as one", "tokens", "tokens of both", "nothing but tokens"}


@pytest.fixture(scope="module")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BaseModelRef]:
    """A random model of one layer in several shards."""
    made: dict[tuple[bool, str], BaseModelRef] = {}

    def make(*, tied: bool, precision: str) -> BaseModelRef:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        if (tied, precision) not in made:
            path = tmp_path_factory.mktemp("base")
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                attention_bias=True,
                tie_word_embeddings=tied,
            )
            model = LlamaForCausalLM(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            model.to(getattr(torch, precision)).save_pretrained(path, max_shard_size="5KB")
            made[tied, precision] = BaseModelRef(name="tiny", path=path, revision=None, fingerprint="0" * 32)
        return made[tied, precision]

    return make


def check(
    base: BaseModelRef, make_config: Callable[[], Any], kind: str, tmp_path: Path, rows: int, exact: bool
) -> MergedModel:
    """Merge, and compare with base + adapter, and with peft's merge where that is right."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    adapter = tmp_path / "adapter"
    train(base, make_config(), adapter, rows)
    merged = merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "merged", run_id="r")
    assert merged.method == "streaming"
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(merged.path, dtype="auto", output_loading_info=True)
    assert not any(loading.values())
    assert merged.total_parameters == count_parameters(merged.path) == sum(p.numel() for p in model.parameters())
    tied = load(base.path).config.tie_word_embeddings
    assert model.config.tie_word_embeddings is (tied and kind not in PARTED)
    assert model.config.vocab_size == rows == model.get_input_embeddings().weight.shape[0]
    theirs = PeftModel.from_pretrained(load(base.path, rows=rows), adapter).eval()
    wanted = logits(theirs)
    torch.testing.assert_close(
        logits(model), wanted, **({"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": 0.02, "atol": 0.1})
    )
    expected = dict(theirs.merge_and_unload().state_dict())
    found = {name: tensor for file in merged.path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    wrong = tied and kind in MERGED_WRONGLY_IF_TIED
    assert (float((logits(theirs.get_base_model()) - wanted).abs().max()) > 0.1) is wrong
    for name in found:
        if name in (*EMBEDDINGS, HEAD) and wrong:
            continue
        if kind == "dora on embeddings" or (not exact and kind.startswith("lora")):
            # peft sums the squares of a column in float32, and rounds an embedding's update before it is added.
            torch.testing.assert_close(
                found[name], expected[name], rtol=2e-6 if exact else 2**-6, atol=0 if exact else 2**-9
            )
        else:
            assert torch.equal(found[name], expected[name]), name
    return merged


@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + ADDED], ids=["", "added tokens"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ENDS)
def test_an_adapter_of_embeddings_or_head_merges_to_what_it_computes_or_is_refused(
    make_base: Callable[..., BaseModelRef], tmp_path: Path, kind: str, tied: bool, rows: int
) -> None:
    base = make_base(tied=tied, precision="float32")
    if kind in NOT_SAVED and not tied and rows != VOCABULARY:
        train(base, ENDS[kind](), tmp_path / "adapter", rows)
        with pytest.raises(ArtifactError, match="trained with 43 tokens, and has the new rows of one end"):
            merge_adapter(base_model=base, adapter_path=tmp_path / "adapter", output_dir=tmp_path / "m", run_id="r")
    else:
        check(base, ENDS[kind], kind, tmp_path, rows, exact=True)


@pytest.mark.parametrize("kind", ENDS)
def test_in_half_precision_the_sum_is_rounded_once(
    make_base: Callable[..., BaseModelRef], tmp_path: Path, kind: str
) -> None:
    check(make_base(tied=False, precision="bfloat16"), ENDS[kind], kind, tmp_path, VOCABULARY, exact=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + ADDED, VOCABULARY - 1], ids=["", "added tokens", "one less"])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_an_adapter_of_projections_merges_bitwise_as_with_peft(
    make_base: Callable[..., BaseModelRef], tmp_path: Path, kind: str, rows: int, precision: str
) -> None:
    base = make_base(tied=True, precision=precision)
    check(base, PROJECTIONS[kind], kind, tmp_path, rows, exact=precision == "float32")


@pytest.mark.parametrize("kind", ["lora on embeddings", "lora, as one", "tokens", "other tokens of each"])
def test_through_peft_too_tied_ends_become_what_each_was_in_training(
    make_base: Callable[..., BaseModelRef], tmp_path: Path, kind: str
) -> None:
    import torch
    from peft import PeftModel

    base = make_base(tied=True, precision="float64")
    train(base, ENDS[kind](), tmp_path / "adapter", VOCABULARY)
    merged = merge_adapter(base_model=base, adapter_path=tmp_path / "adapter", output_dir=tmp_path / "m", run_id="r")
    assert merged.method == "peft"
    theirs = PeftModel.from_pretrained(load(base.path), tmp_path / "adapter")
    torch.testing.assert_close(logits(load(merged.path)), logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_trained_token_beyond_the_vocabulary_is_refused(
    make_base: Callable[..., BaseModelRef], tmp_path: Path
) -> None:
    base = make_base(tied=True, precision="float32")
    train(base, ENDS["tokens"](), tmp_path / "adapter", VOCABULARY)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": [3, VOCABULARY]}))
    with pytest.raises(ArtifactError, match=r"trained token 40, but model\.embed_tokens\.weight has 40 rows"):
        merge_adapter(base_model=base, adapter_path=tmp_path / "adapter", output_dir=tmp_path / "m", run_id="r")
    assert not (tmp_path / "m").exists()


def test_what_pissa_has_taken_out_of_the_base_is_not_forgotten(
    make_base: Callable[..., BaseModelRef], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel

    base = make_base(tied=False, precision="float32")
    train(base, lora(init_lora_weights="pissa"), tmp_path / "adapter", VOCABULARY)
    merged = merge_adapter(base_model=base, adapter_path=tmp_path / "adapter", output_dir=tmp_path / "m", run_id="r")
    assert merged.method == "peft"
    theirs = PeftModel.from_pretrained(load(base.path), tmp_path / "adapter")
    torch.testing.assert_close(logits(load(merged.path)), logits(theirs), rtol=1e-4, atol=1e-4)


def test_trained_tokens_without_rows_of_their_own_are_refused(
    make_base: Callable[..., BaseModelRef], tmp_path: Path
) -> None:
    base = make_base(tied=True, precision="float32")
    train(base, ENDS["tokens"](), tmp_path / "adapter", VOCABULARY)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": [3, 5, 7]}))
    with pytest.raises(ArtifactError, match="the adapter cannot be loaded"):
        merge_adapter(base_model=base, adapter_path=tmp_path / "adapter", output_dir=tmp_path / "m", run_id="r")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["dora", "bias of B", "ia3"])
def test_an_adapter_in_half_precision_merges_bitwise_as_with_peft(
    make_base: Callable[..., BaseModelRef], tmp_path: Path, kind: str
) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    base, adapter = make_base(tied=False, precision="float32"), tmp_path / "adapter"
    train(base, PROJECTIONS[kind](), adapter, VOCABULARY)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    merged = merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    assert merged.method == "streaming"
    expected = PeftModel.from_pretrained(load(base.path), adapter).merge_and_unload().state_dict()
    found = {name: tensor for shard in merged.path.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("name", ["", "modules_to_save."], ids=["missing", "under an old name"])
def test_a_whole_module_that_is_not_found_in_the_adapter_is_refused(
    make_base: Callable[..., BaseModelRef], tmp_path: Path, name: str
) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter = make_base(tied=False, precision="float32"), tmp_path / "adapter"
    train(base, ENDS["whole head"](), adapter, VOCABULARY)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    head = tensors.pop("base_model.model.lm_head.weight")
    save_file(tensors | ({f"base_model.model.lm_head.{name}weight": head} if name else {}), file)
    with pytest.raises(ArtifactError, match="the adapter cannot be loaded"):
        merge_adapter(base_model=base, adapter_path=adapter, output_dir=tmp_path / "m", run_id="r")
    assert not (tmp_path / "m").exists()
