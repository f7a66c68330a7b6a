"""Fixed prompts and what is expected of their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import ConfigurationError
from finetune.evaluation.evaluate import evaluate_adapter
from finetune.evaluation.regressions import Expectation, read_regressions


def write(directory: Path, *cases: Any, name: str = "cases.jsonl") -> Path:
    directory.mkdir(exist_ok=True)
    lines = [case if isinstance(case, str) else json.dumps(case, ensure_ascii=False) for case in cases]
    (directory / name).write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("expectation", "answer", "faults"),
    [
        ({"equals": "Paris"}, " paris. ", []),
        ({"equals": "Paris"}, "Lyon", ["is not 'Paris'"]),
        ({"contains": ["Річка", "ліс"]}, "річка", ["lacks 'ліс'"]),
        ({"excludes": ["sorry"]}, "Sorry, no", ["contains 'sorry'"]),
        ({"matches": r"\d{4}"}, "in 1991", []),
        ({"matches": r"^\d{4}$", "contains": ["x"]}, "in 1991", ["lacks 'x'", r"does not match '^\\d{4}$'"]),
    ],
)
def test_an_answer_is_held_against_what_is_expected(
    expectation: dict[str, Any], answer: str, faults: list[str]
) -> None:
    assert Expectation(**expectation).faults(answer) == faults


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not a regression case"),
        ({"id": "b", "prompt": "q", "expect": {}}, "give one of equals"),
        ({"id": "b", "prompt": "q", "expect": {"equal": "a"}}, "equal"),
        ({"id": "b", "expect": {"equals": "a"}}, "give either prompt or messages"),
        ({"id": "b", "prompt": "q", "expect": {"matches": "("}}, "not a regular expression"),
        ({"id": "a", "prompt": "q", "expect": {"equals": "a"}}, "repeats the id a"),
    ],
)
def test_a_line_that_is_no_case_is_named(line: Any, message: str, tmp_path: Path) -> None:
    directory = write(tmp_path / "regressions", {"id": "a", "prompt": "q", "expect": {"equals": "a"}}, line)
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_regressions(directory)
    assert "cases.jsonl" in str(caught.value)


def test_a_missing_directory_is_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is missing"):
        read_regressions(tmp_path / "nowhere")


def test_an_evaluation_reports_the_prompts_that_fail(
    random_base: BaseModelRef, random_adapter: Path, held_out_file: Path, tmp_path: Path
) -> None:
    directory = write(
        tmp_path / "regressions",
        {"id": "anything", "prompt": "Say something.", "expect": {"matches": ""}, "max_new_tokens": 4},
        {
            "id": "impossible",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "What?"}],
            "expect": {"contains": ["what no random model says"]},
            "max_new_tokens": 4,
        },
    )

    def evaluate() -> Any:
        return evaluate_adapter(
            base_model=random_base,
            adapter_path=random_adapter,
            dataset=held_out_file,
            output_dir=tmp_path / "out",
            run_id="run-1",
            regressions=directory,
            max_length=512,
            sample_answers=0,
        )

    report = evaluate()
    assert report.regressions == 2
    assert [case.id for case in report.failed_regressions] == ["impossible"]
    page = (report.path / "report.html").read_text(encoding="utf-8")
    assert "1 of 2 hold" in page
    assert "what no random model says" in page
    assert evaluate().reused
    write(directory, {"id": "third", "prompt": "q", "expect": {"matches": ""}}, name="more.jsonl")
    assert not evaluate().reused
