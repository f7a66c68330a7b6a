"""What an evaluation found."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """One held-out prompt answered greedily by base and adapter."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    reference: str
    base: str
    adapter: str


class EvalReport(BaseModel):
    """Base against adapter on held-out data; losses in nats per token of the assistant's side."""

    model_config = ConfigDict(frozen=True)

    path: Path
    run_id: str
    eval_loss: float
    eval_perplexity: float
    base_loss: float
    base_perplexity: float
    # eval_loss - base_loss: negative when the adapter is better
    delta_vs_base_loss: float
    # bootstrap 95 % confidence interval of the delta over records
    delta_ci95: tuple[float, float]
    token_accuracy: float
    base_token_accuracy: float
    exact_match: float | None
    base_exact_match: float | None
    records: int
    tokens: int
    seconds: float
    answers: list[Answer]
    reused: bool = False
