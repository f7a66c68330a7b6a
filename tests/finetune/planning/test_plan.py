from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from finetune.dataset.models import DatasetProfile, Truncation
from finetune.errors import ConfigurationError
from finetune.planning import rules
from finetune.planning.models import Method, TrialConfig
from finetune.planning.overrides import PlanOverrides
from finetune.planning.plan import make_plan, trial_id_of
from finetune.training.data import training_order

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


def profile_of(records: int = 1000, **fields: object) -> DatasetProfile:
    known: dict[str, object] = {
        "total_samples": records,
        "format_detected": "jsonl",
        "has_instruction": True,
        "has_output": True,
        "avg_tokens": 200.0,
        "max_tokens": 3000,
        "columns": ["instruction", "output"],
        "duplicates_found": 0,
        "total_tokens": 200 * records,
        "truncation": [
            Truncation(max_length=512, records=80, record_share=0.08, token_share=0.1),
            Truncation(max_length=1024, records=4, record_share=0.004, token_share=0.02),
            Truncation(max_length=2048, records=1, record_share=0.001, token_share=0.01),
        ],
    }
    return DatasetProfile.model_validate({**known, **fields})


def test_the_length_is_the_shortest_that_hardly_truncates(llama_8b: Path) -> None:
    plan = make_plan(llama_8b, profile_of())
    assert plan.trial_config.max_length == 1024
    assert "max_length 1024: truncates 0.4 % of records" in plan.explanations


def test_the_length_never_exceeds_what_the_model_knows(llama_8b: Path) -> None:
    assert make_plan(llama_8b, profile_of(max_tokens=20000, truncation=[])).trial_config.max_length == 8192


def test_short_records_need_no_long_length(llama_8b: Path) -> None:
    assert make_plan(llama_8b, profile_of(max_tokens=70, truncation=[])).trial_config.max_length == 128


def test_values_given_are_kept_and_the_rest_is_chosen(llama_8b: Path) -> None:
    given = PlanOverrides(
        lora_rank=4, epochs=7, learning_rate=5e-5, micro_batch=3, max_length=333, target_modules=["q_proj"], seed=7
    )
    plan = make_plan(llama_8b, profile_of(), overrides=given)
    kept = plan.trial_config.model_dump(include=set(given.model_fields_set))
    assert kept == given.model_dump(exclude_none=True)
    assert plan.trial_config.lora_alpha == 8
    assert "lora_rank 4: given" in plan.explanations


def test_the_rate_follows_the_published_ones(llama_8b: Path) -> None:
    def rate(hidden: int) -> float:
        (llama_8b / "config.json").write_text(json.dumps({**LLAMA_8B, "hidden_size": hidden}))
        return make_plan(llama_8b, profile_of()).trial_config.learning_rate

    assert rate(4096) == pytest.approx(2e-4)
    assert rate(8192) == pytest.approx(1.2e-4)
    assert 1e-3 < rate(256) < 3e-3


def test_a_small_dataset_gets_small_batches_and_a_large_one_never_more_than_32(llama_8b: Path) -> None:
    assert make_plan(llama_8b, profile_of(100)).trial_config.effective_batch == 8
    assert make_plan(llama_8b, profile_of(1_000_000)).trial_config.effective_batch <= 32


def test_memory_is_saved_in_order_and_said_so(llama_8b: Path) -> None:
    plenty = make_plan(llama_8b, profile_of(), device="cuda")
    batch = plenty.trial_config.effective_batch
    seen = []
    for limit in range(int(plenty.memory_estimate.vram_gb) + 1, 4, -1):
        try:
            plan = make_plan(llama_8b, profile_of(), device="cuda", vram_limit_gb=limit)
        except ConfigurationError:
            break
        trial = plan.trial_config
        assert plan.memory_estimate.vram_gb <= limit
        assert trial.effective_batch == batch
        state = (-trial.micro_batch, trial.gradient_checkpointing, trial.method == "qlora", -trial.max_length)
        seen.append(state)
    assert seen == sorted(seen)
    assert seen[0] == (-plenty.trial_config.micro_batch, False, False, -1024)
    assert any(state[1] and not state[2] for state in seen)
    assert any(state[2] for state in seen)
    assert any(line.startswith("method now qlora: before, the estimate was") for line in plan.explanations)


def test_a_model_that_cannot_fit_is_refused_with_the_numbers(llama_8b: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"needs about \d+\.\d+ GB and 2 GB are there \(weights \d"):
        make_plan(llama_8b, profile_of(), device="cuda", vram_limit_gb=2)


def test_a_fixed_value_is_not_given_up_to_fit(llama_8b: Path) -> None:
    given = PlanOverrides(micro_batch=8, gradient_checkpointing=False, max_length=1024)
    with pytest.raises(ConfigurationError, match="give up a value that was fixed"):
        make_plan(llama_8b, profile_of(), device="cuda", vram_limit_gb=16, overrides=given)


@pytest.mark.parametrize(
    ("method", "given", "complaint"),
    [
        ("prefix", PlanOverrides(gradient_checkpointing=True), "prefix tuning does not work"),
        ("prefix", PlanOverrides(packing=True), "prefix tuning does not work"),
        ("qlora", PlanOverrides(use_pissa=True), "PiSSA"),
        ("lora", PlanOverrides(attention="flash_attention_2"), "flash attention needs a GPU"),
        ("lora", PlanOverrides(optimizer="paged_adamw_8bit"), "needs a GPU"),
    ],
)
def test_contradictions_are_refused(llama_8b: Path, method: str, given: PlanOverrides, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        make_plan(llama_8b, profile_of(), method=method, overrides=given)  # type: ignore[arg-type]


def test_equal_plans_have_equal_names_and_any_change_gives_another(llama_8b: Path) -> None:
    first, second = (make_plan(llama_8b, profile_of()).trial_config for _ in range(2))
    assert first.trial_id == second.trial_id
    assert trial_id_of(first.model_copy(update={"seed": 1})) != first.trial_id


ALWAYS = {
    "method",
    "learning_rate",
    "lr_schedule",
    "warmup_ratio",
    "weight_decay",
    "micro_batch",
    "accumulation",
    "epochs",
    "max_length",
    "packing",
    "precision",
    "seed",
}
LORA = {"lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules"}


@pytest.mark.parametrize(
    ("method", "names"),
    [("lora", ALWAYS | LORA), ("qlora", ALWAYS | LORA), ("prefix", ALWAYS | {"virtual_tokens"}), ("ia3", ALWAYS)],
)
def test_the_search_space_has_all_hyper_parameters_and_holds_the_choice(
    llama_8b: Path, method: Method, names: set[str]
) -> None:
    given = PlanOverrides(max_length=333, micro_batch=3, accumulation=5, warmup_ratio=0.2, seed=7)
    for overrides in (PlanOverrides(), given):
        plan = make_plan(llama_8b, profile_of(), method=method, overrides=overrides, device="cuda")
        assert set(plan.search_space) == names
        for name, dimension in plan.search_space.items():
            value = getattr(plan.trial_config, name)
            if dimension.choices is not None:
                assert value in dimension.choices
            else:
                assert dimension.low is not None
                assert dimension.high is not None
                assert dimension.low <= value <= dimension.high


def test_the_search_space_holds_nothing_that_the_memory_cannot(llama_8b: Path) -> None:
    wide = make_plan(llama_8b, profile_of(), device="cuda", vram_limit_gb=1000)
    limit = math.ceil(wide.memory_estimate.vram_gb)
    tight = make_plan(llama_8b, profile_of(), device="cuda", vram_limit_gb=limit)
    for name in ("micro_batch", "max_length"):
        chosen = getattr(tight.trial_config, name)
        assert max(wide.search_space[name].choices or []) == 2 * chosen
        assert max(tight.search_space[name].choices or []) == chosen


def test_a_method_given_is_kept_where_it_does_not_fit(llama_8b: Path) -> None:
    assert make_plan(llama_8b, profile_of(), device="cuda", vram_limit_gb=12).trial_config.method == "qlora"
    with pytest.raises(ConfigurationError, match="give up a value that was fixed"):
        make_plan(llama_8b, profile_of(), device="cuda", vram_limit_gb=12, method="lora")


def test_models_that_bound_their_attention_scores_get_eager_attention(llama_8b: Path) -> None:
    (llama_8b / "config.json").write_text(
        json.dumps({**LLAMA_8B, "model_type": "gemma2", "attn_logit_softcapping": 50.0})
    )
    assert make_plan(llama_8b, profile_of()).trial_config.attention == "eager"
    with pytest.raises(ConfigurationError, match="have no sdpa"):
        make_plan(llama_8b, profile_of(), overrides=PlanOverrides(attention="sdpa"))


def test_every_choice_is_explained_in_one_line(llama_8b: Path) -> None:
    plan = make_plan(llama_8b, profile_of(), device="cuda", vram_limit_gb=12)
    explained = {line.split()[0] for line in plan.explanations}
    assert explained >= set(plan.trial_config.model_dump(exclude={"trial_id", "task", "max_steps", "virtual_tokens"}))
    assert all("\n" not in line and ": " in line for line in plan.explanations)


def test_each_rule_names_its_source() -> None:
    functions = [value for name, value in vars(rules).items() if inspect.isfunction(value) and name[0] != "_"]
    assert len(functions) >= 14
    assert [function.__name__ for function in functions if "Source: " not in (function.__doc__ or "")] == []


def test_steps_are_those_that_the_trainer_counts(llama_8b: Path) -> None:
    sevens = {"micro_batch": 7, "accumulation": 1, "epochs": 0.7}
    for records, given in [
        (1001, {}),
        (40, {"micro_batch": 3, "accumulation": 3}),
        (999, {"epochs": 0.5}),
        (10, sevens),
    ]:
        plan = make_plan(llama_8b, profile_of(records), overrides=PlanOverrides.model_validate(given))
        order = training_order(records, plan.trial_config)
        assert plan.estimated_steps == math.ceil(len(order) / plan.trial_config.effective_batch)


def test_planning_needs_no_training_library() -> None:
    code = (
        "import sys, finetune.planning.plan, finetune.chat.encode;"
        "assert not {'torch', 'transformers', 'peft', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokens_are_those_that_truncation_leaves(llama_8b: Path) -> None:
    plan = make_plan(llama_8b, profile_of(), overrides=PlanOverrides(epochs=2))
    assert plan.estimated_tokens == round(200_000 * 0.98 * 2)
    steps = make_plan(llama_8b, profile_of(), overrides=PlanOverrides(max_steps=10, micro_batch=4, accumulation=1))
    assert steps.estimated_steps == 10
    assert steps.estimated_tokens == round(200_000 * 0.98 * 40 / 1000)


@pytest.mark.parametrize("wrong", [{"lora_rnk": 64}, {"max_steps": 0}, {"seed": -1}], ids=str)
def test_a_configuration_changed_by_hand_is_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        TrialConfig.model_validate({"trial_id": "x", **wrong})
