"""Evaluation of real adapters on a random model."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.adapter_files import WEIGHTS_NAME, adapter_hash
from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.dataset.records import prompt_text
from finetune.errors import ArtifactError, BaseModelError, DatasetError
from finetune.evaluation.adapters import attached, load_base
from finetune.evaluation.evaluate import evaluate_adapter
from finetune.evaluation.models import ChampionRef, EvalReport
from finetune.progress import ProgressEvent
from finetune.publishing import read_manifest

MakeAdapter = Callable[..., Path]


def evaluate(base: BaseModelRef, adapter: Path, dataset: Path, output: Path, **changes: Any) -> EvalReport:
    settings: dict[str, Any] = {"run_id": "run-1", "max_length": 512, "sample_answers": 6} | changes
    return evaluate_adapter(base_model=base, adapter_path=adapter, dataset=dataset, output_dir=output, **settings)


def plain_loss(base: BaseModelRef, adapter: Path | None, dataset: Path, max_length: int = 512) -> float:
    """One record at a time, with transformers' own loss."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    records = [json.loads(line) for line in dataset.read_text(encoding="utf-8").splitlines()]
    nats = tokens = 0.0
    for record in RecordEncoder.load(base.path).encode(records):
        labels = [
            token if trained else -100 for token, trained in zip(record.input_ids, record.trained_mask, strict=True)
        ][:max_length]
        count = sum(label != -100 for label in labels[1:])
        if not count:
            continue
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([record.input_ids[:max_length]]), labels=torch.tensor([labels])).loss
        nats += float(loss) * count
        tokens += count
    return nats / tokens


@pytest.fixture(scope="module")
def report(
    random_base: BaseModelRef, random_adapter: Path, held_out_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> EvalReport:
    return evaluate(random_base, random_adapter, held_out_file, tmp_path_factory.mktemp("report") / "evaluation")


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "whole-modules", "ia3", "prefix"])
def test_losses_equal_those_of_transformers_one_record_at_a_time(
    make_adapter: MakeAdapter, method: str, random_base: BaseModelRef, held_out_file: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(random_base, tmp_path / "adapter", method)
    found = evaluate(random_base, adapter, held_out_file, tmp_path / "out", sample_answers=2)
    assert found.base_loss == pytest.approx(plain_loss(random_base, None, held_out_file), abs=1e-6)
    assert found.eval_loss == pytest.approx(plain_loss(random_base, adapter, held_out_file), abs=1e-6)
    assert found.eval_loss != found.base_loss


def test_records_are_cut_as_in_training(
    random_base: BaseModelRef, random_adapter: Path, held_out_file: Path, tmp_path: Path
) -> None:
    found = evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", max_length=40)
    assert found.truncated > 0
    assert found.eval_loss == pytest.approx(plain_loss(random_base, random_adapter, held_out_file, 40), abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "dora", "whole-modules", "ia3", "prefix"])
def test_the_base_is_itself_again_to_the_bit_after_every_adapter(
    method: str, make_adapter: MakeAdapter, random_base: BaseModelRef, tmp_path: Path
) -> None:
    import torch

    adapter = make_adapter(random_base, tmp_path / method, method)
    model = load_base(random_base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(20)[None]
    with torch.no_grad():
        bare = model(ids).logits
        with attached(model, adapter) as adapted:
            assert not torch.equal(adapted(ids).logits, bare)
        assert torch.equal(model(ids).logits, bare)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_champion_of_another_kind_is_compared_on_the_same_records(
    make_adapter: MakeAdapter, random_base: BaseModelRef, random_adapter: Path, held_out_file: Path, tmp_path: Path
) -> None:
    other = make_adapter(random_base, tmp_path / "prefix", "prefix")
    champion = ChampionRef(
        version="v1", adapter_path=other, adapter_hash=adapter_hash(other), base_fingerprint="random-0"
    )
    found = evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", champion=champion)
    assert found.champion is not None
    assert found.champion.champion_loss == pytest.approx(plain_loss(random_base, other, held_out_file), abs=1e-6)
    assert found.champion.delta_vs_champion == pytest.approx(found.eval_loss - found.champion.champion_loss)
    low, high = found.champion.delta_ci95
    assert low <= found.champion.delta_vs_champion <= high
    page = (found.path / "report.html").read_text(encoding="utf-8")
    assert "Reigning champion v1" in page


def test_a_champion_is_compared_on_the_records_whose_prompts_it_has_not_learned(
    make_adapter: MakeAdapter, random_base: BaseModelRef, random_adapter: Path, held_out_file: Path, tmp_path: Path
) -> None:
    other = make_adapter(random_base, tmp_path / "other", seed=5)
    lines = held_out_file.read_text(encoding="utf-8").splitlines(keepends=True)
    asked = [prompt_text(json.loads(line)) for line in lines]
    champion = ChampionRef(
        version="v1",
        adapter_path=other,
        adapter_hash=adapter_hash(other),
        base_fingerprint="random-0",
        # As another dataset may have written them.
        learned=[f" {unicodedata.normalize('NFD', prompt)}\n" for prompt in asked[::3]],
        unknown=["v0"],
    )
    found = evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", champion=champion)
    rest = tmp_path / "rest.jsonl"
    rest.write_text("".join(line for number, line in enumerate(lines) if number % 3), encoding="utf-8")
    theirs, ours = (plain_loss(random_base, adapter, rest) for adapter in (other, random_adapter))
    assert found.champion is not None
    assert found.champion.left_out == 8
    assert found.champion.champion_loss == pytest.approx(theirs, abs=1e-6)
    assert found.champion.delta_vs_champion == pytest.approx(ours - theirs, abs=1e-6)
    assert found.records == 24
    assert found.eval_loss == pytest.approx(plain_loss(random_base, random_adapter, held_out_file), abs=1e-6)
    page = (found.path / "report.html").read_text(encoding="utf-8")
    assert "left out of the comparison: 8 of the held-out records, on whose prompts v1" in page
    assert "nobody can tell whether other held-out prompts were trained on: the dataset of v0 is gone" in page

    def again(**changes: Any) -> EvalReport:
        rival = champion.model_copy(update=changes)
        return evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", champion=rival)

    assert again().reused
    # As many others are left out: another comparison.
    swapped = again(learned=asked[1::3])
    assert not swapped.reused
    assert swapped.champion is not None
    assert swapped.champion.left_out == 8
    assert swapped.champion.delta_vs_champion != found.champion.delta_vs_champion
    assert not again(learned=asked[1::3], unknown=[]).reused
    nothing_left = again(learned=asked)
    assert nothing_left.champion is not None
    assert (nothing_left.champion.left_out, nothing_left.champion.delta_ci95) == (24, None)
    assert "there is no record left to compare it on" in (found.path / "report.html").read_text(encoding="utf-8")


def test_a_champion_on_another_base_model_is_not_compared(
    random_base: BaseModelRef, random_adapter: Path, held_out_file: Path, tmp_path: Path
) -> None:
    champion = ChampionRef(
        version="v1", adapter_path=tmp_path / "elsewhere", adapter_hash="f" * 64, base_fingerprint="another"
    )
    found = evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", champion=champion)
    assert found.champion is None


def test_the_report_of_a_candidate_that_has_become_champion_is_used_again(
    make_adapter: MakeAdapter, random_base: BaseModelRef, random_adapter: Path, held_out_file: Path, tmp_path: Path
) -> None:
    def as_champion(version: str, adapter: Path) -> ChampionRef:
        return ChampionRef(
            version=version, adapter_path=adapter, adapter_hash=adapter_hash(adapter), base_fingerprint="random-0"
        )

    older = as_champion("v1", make_adapter(random_base, tmp_path / "older", seed=5))
    itself = as_champion("v2", random_adapter)
    first = evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", champion=older)
    again = evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", champion=itself)
    assert again.reused
    assert again.champion == first.champion
    assert evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", champion=older).reused
    assert not evaluate(random_base, random_adapter, held_out_file, tmp_path / "out").reused


def test_the_figures_of_a_report_agree_with_each_other(report: EvalReport) -> None:
    assert report.delta_vs_base_loss == pytest.approx(report.eval_loss - report.base_loss)
    low, high = report.delta_ci95
    assert low < report.delta_vs_base_loss < high
    assert report.records == 24
    for groups in (report.by_format, report.by_source, report.by_length):
        assert sum(group.records for group in groups) == report.records
        assert sum(group.tokens for group in groups) == report.tokens
        whole = sum(group.eval_loss * group.tokens for group in groups) / report.tokens
        assert whole == pytest.approx(report.eval_loss)
    assert {group.name for group in report.by_source} == {"loop", "chat", "(none)"}
    assert 0 <= report.token_accuracy <= 1
    changes = [record.eval_loss - record.base_loss for record in report.worst]
    assert changes == sorted(changes, reverse=True)
    assert all(change > 0 for change in changes)
    assert len(report.answers) == 6


def test_greedy_answers_do_not_depend_on_their_neighbours(random_base: BaseModelRef) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.evaluation.generation import greedy_answers

    model = AutoModelForCausalLM.from_pretrained(random_base.path, dtype=torch.float32).eval()
    encoder = RecordEncoder.load(random_base.path)
    prompts = [encoder.encode_prompt([{"role": "user", "content": "word " * count}]) for count in (1, 9, 4)]
    together = greedy_answers(model, encoder, prompts, max_new_tokens=12)
    alone = [greedy_answers(model, encoder, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together == alone


def test_the_report_page_shows_what_a_person_looks_for(report: EvalReport) -> None:
    page = (report.path / "report.html").read_text(encoding="utf-8")
    assert f"Evaluation of {report.run_id}" in page
    assert f"{report.eval_loss:.4f}" in page
    assert f"{report.base_loss:.4f}" in page
    assert "95&nbsp;% confidence interval" in page
    assert "Answers side by side" in page
    assert report.answers[0].reference in page
    assert page.count("data:image/png;base64,") == 2
    assert "http://" not in page
    assert "https://" not in page
    assert (report.path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_text_from_the_data_cannot_become_markup(
    random_base: BaseModelRef, random_adapter: Path, tmp_path: Path
) -> None:
    dataset = tmp_path / "eval.jsonl"
    hostile = {"instruction": "<script>alert(1)</script>", "output": "<b>bold</b> & more"}
    dataset.write_text(json.dumps(hostile) + "\n", encoding="utf-8")
    found = evaluate(random_base, random_adapter, dataset, tmp_path / "out")
    page = (found.path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>" not in page


def test_progress_ends_at_the_whole(
    random_base: BaseModelRef, random_adapter: Path, held_out_file: Path, tmp_path: Path
) -> None:
    events: list[ProgressEvent] = []
    evaluate(random_base, random_adapter, held_out_file, tmp_path / "out", on_progress=events.append)
    assert events[-1].done == events[-1].total == 48


def test_a_report_is_used_again_until_something_it_was_made_from_changes(
    write_records: Callable[..., Path],
    make_adapter: MakeAdapter,
    random_base: BaseModelRef,
    random_adapter: Path,
    held_out_file: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    first = evaluate(random_base, random_adapter, held_out_file, output)
    again = evaluate(random_base, random_adapter, held_out_file, output)
    assert not first.reused
    assert again.reused
    assert again.model_copy(update={"reused": False}) == first
    dataset = write_records(tmp_path / "more.jsonl", count=30)
    assert not evaluate(random_base, random_adapter, dataset, output).reused
    other = make_adapter(random_base, tmp_path / "other", seed=2)
    assert not evaluate(random_base, other, dataset, output).reused
    assert not evaluate(random_base, other, dataset, output, max_length=50).reused
    (output / "report.json").write_text("{}", encoding="utf-8")
    repaired = evaluate(random_base, other, dataset, output, max_length=50)
    assert not repaired.reused
    read_manifest(output, kind="evaluation", verify="hashes")


def damage_truncate(adapter: Path) -> None:
    weights = adapter / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-100])


def damage_header(adapter: Path) -> None:
    (adapter / WEIGHTS_NAME).write_bytes(b"not safetensors at all")


def damage_drop_tensor(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / WEIGHTS_NAME)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, adapter / WEIGHTS_NAME)


def damage_rename_tensor(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / WEIGHTS_NAME)
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = next(iter(tensors.values())).clone()
    save_file(tensors, adapter / WEIGHTS_NAME)


def damage_nan(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / WEIGHTS_NAME)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, adapter / WEIGHTS_NAME)


def damage_shape(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["r"] = 2
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def damage_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{", encoding="utf-8")


def damage_remove(adapter: Path) -> None:
    (adapter / WEIGHTS_NAME).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_header,
        damage_drop_tensor,
        damage_rename_tensor,
        damage_nan,
        damage_shape,
        damage_config,
        damage_remove,
    ],
)
def test_a_damaged_adapter_is_an_error_and_never_a_score(
    damage: Any, random_base: BaseModelRef, random_adapter: Path, held_out_file: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(random_adapter, adapter)
    damage(adapter)
    with pytest.raises(ArtifactError) as caught:
        evaluate(random_base, adapter, held_out_file, tmp_path / "out")
    assert str(adapter) in str(caught.value)
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def damage_base_garbage(weights: Path) -> None:
    weights.write_bytes(b"garbage")


def damage_base_drop_tensor(weights: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage_base_garbage, "cannot be loaded"), (damage_base_drop_tensor, "lacks 1 tensors such as .*up_proj")],
)
def test_a_damaged_base_model_is_named(
    damage: Callable[[Path], None],
    message: str,
    random_base: BaseModelRef,
    random_adapter: Path,
    held_out_file: Path,
    tmp_path: Path,
) -> None:
    broken = tmp_path / "base"
    shutil.copytree(random_base.path, broken)
    damage(broken / "model.safetensors")
    with pytest.raises(BaseModelError, match=message):
        evaluate(random_base.model_copy(update={"path": broken}), random_adapter, held_out_file, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "nothing to evaluate"),
        ('{"instruction": "q", "output": "a"}\n\n{"instruction"', "line 3 is not JSON"),
        ("[1]\n", "line 1 is not an object"),
        ('{"foo": 1}\n', r"record 1: not a training record.*eval\.jsonl"),
    ],
)
def test_held_out_records_that_cannot_be_scored_are_named(
    content: str, message: str, random_base: BaseModelRef, random_adapter: Path, tmp_path: Path
) -> None:
    dataset = tmp_path / "eval.jsonl"
    dataset.write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=message):
        evaluate(random_base, random_adapter, dataset, tmp_path / "out")


def test_a_missing_held_out_file_is_named(random_base: BaseModelRef, random_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"cannot be read.*nowhere\.jsonl"):
        evaluate(random_base, random_adapter, tmp_path / "nowhere.jsonl", tmp_path / "out")
