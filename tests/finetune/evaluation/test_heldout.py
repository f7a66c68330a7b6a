"""Which held-out records ask something else."""

from __future__ import annotations

from pathlib import Path

from finetune.evaluation.heldout import HeldOut, other_prompts


def test_a_prompt_is_the_same_however_white_space_and_accents_are_written() -> None:
    """As in the split and in the look for duplicates."""
    asked = ["Where  is\tthe cafe\u0301?\n", "Where is the cafe?", "  Who?", "Who is?"]
    records = [{"prompt": prompt, "completion": "There."} for prompt in asked]
    held_out = HeldOut(Path("eval.jsonl"), records, encoded=[], lines=[], truncated=0, skipped=0)
    assert other_prompts(held_out, ["Where is the caf\u00e9?", "Who? "]).tolist() == [1, 3]
    assert other_prompts(held_out, []).tolist() == [0, 1, 2, 3]
    assert other_prompts(held_out, asked).tolist() == []
