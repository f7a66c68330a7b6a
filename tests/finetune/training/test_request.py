from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.training.models import TrainingRequest
from finetune.training.request import request_for_file

MakeRequest = Callable[..., TrainingRequest]


def test_a_file_that_was_moved_is_trained_on_where_it_is_now(make_request: MakeRequest, tmp_path: Path) -> None:
    """The old place may hold other records by now, which nobody asked for."""
    like = make_request()

    def asked(dataset: Path) -> TrainingRequest:
        return request_for_file(dataset, plan=like.plan, base_model=like.base_model, output=tmp_path / "adapter")

    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text('{"text": "ours"}\n')
    first = asked(old)
    old.rename(new)
    old.write_text('{"text": "others"}\n')
    again = asked(new)
    assert again == first.model_copy(update={"dataset": again.dataset})
    assert again.dataset.train_path.read_bytes() == new.read_bytes()
