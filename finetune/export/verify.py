"""Do GGUF files say what Hugging Face's model says?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.base_model.remote_code import remedy_for
from finetune.errors import ExportError
from finetune.export.prompts import encode_prompts, greedy_tokens
from finetune.export.runtime import GgufRuntime

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.dataset.records import Message

GREEDY_TOKENS = 24
# Alternatives per token that a runtime is asked for; the rest of the distribution is one remainder.
_TOP = 64
_REMEDY = "Delete the gguf directory and materialize the asset again"
TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?",
    "Їжак під'їхав до ґанку о 07:45 — «добрий ранок»!",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "🚀👩‍👩‍👧‍👦 naïve café … ½ №5 日本語",
    "def f(x: int) -> str:\n\treturn f'{x:>8}'  # ok\n\n\nclass A:\n    pass\n",
    "  two  spaces,\ttabs\r\nand lines \n \n\n end ",
)


@dataclass(frozen=True)
class Limits:
    """What a file of one type must reach.

    `tie` excuses a differing token whose logit in the reference is lower by at most this share of the
    reference's largest absolute logit: rounding may order such near-equals either way. `agreement` is
    the least share of greedy tokens that must be equal then; `divergence` bounds the mean
    Kullback-Leibler divergence per token, in nats; `perplexity` how many times the reference's a file's
    perplexity of the reference's answers may be.
    """

    tie: float
    agreement: float
    divergence: float
    perplexity: float


# Divergences measured on small trained models: F16 4e-7, Q8_0 5e-5, Q4_K_M 2e-3, Q2_K 4e-2; llama.cpp's own table for
# an 8B model on running text: Q8_0 1e-3, Q4_K_M 3e-2, Q2_K 0.4. Below Q8_0 answers may change, so that only divergence
# and perplexity are bounded.
LIMITS = {
    "F32": Limits(1e-3, 1.0, 1e-4, 1.01),
    "F16": Limits(1e-2, 1.0, 1e-3, 1.02),
    "BF16": Limits(3e-2, 1.0, 1e-2, 1.1),
    "Q8_0": Limits(3e-2, 1.0, 1e-2, 1.1),
    "Q6_K": Limits(5e-2, 0.0, 5e-2, 1.2),
    "Q5_K_M": Limits(5e-2, 0.0, 0.1, 1.3),
    "Q4_K_M": Limits(5e-2, 0.0, 0.2, 1.5),
    "Q4_0": Limits(5e-2, 0.0, 0.4, 2.0),
    "Q2_K": Limits(5e-2, 0.0, 0.7, 3.0),
}


@dataclass(frozen=True)
class FileComparison:
    """One GGUF file against the reference, over the reference's own answers."""

    agreement: float
    # mean Kullback-Leibler divergence of the file's distribution from the reference's, nats per token
    divergence: float
    # of the reference's answers, by the file
    perplexity: float


class Reference:
    """What Hugging Face's model says: tokens of texts, prompts, greedy answers and their distributions.

    Args:
        model_path: a model in Hugging Face's layout, computed in float32.
        prompts: conversations to answer.
        trust_remote_code: let Python files of the model run.

    Raises:
        ExportError: the model does not load.
    """

    def __init__(self, model_path: Path, prompts: Sequence[list[Message]], *, trust_remote_code: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                model_path, local_files_only=True, trust_remote_code=trust_remote_code
            )
            model, loading = AutoModelForCausalLM.from_pretrained(
                model_path,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                # The error that it would raise does not name the tensor.
                ignore_mismatched_sizes=True,
            )
        except Exception as error:  # transformers raises whatever its parsers raise on a damaged directory
            raise ExportError(
                f"the merged model does not load: {error}", where=model_path, remedy=remedy_for(error, "")
            ) from error
        for name, found, expected in loading["mismatched_keys"]:
            raise ExportError(
                f"the tensor {name} of the merged model has the shape {tuple(found)}, its configuration asks for "
                f"{tuple(expected)}",
                where=model_path,
                remedy="Delete the merged model and materialize the asset again",
            )
        self._model: PreTrainedModel = model.eval()
        tokenizer = self._tokenizer
        if tokenizer.chat_template is None:
            raise ExportError(
                "the merged model has no chat template, so no conversation can be compared",
                where=model_path,
                remedy="Use a base model with an ordinary chat template (an Instruct model)",
            )
        self.prompts = prompts
        self.ids = encode_prompts(tokenizer, prompts)
        self.rendered = [
            str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)) for prompt in prompts
        ]
        # Chat markers: every special token alone, and whole conversations.
        self.texts = [*TEXTS, "".join(tokenizer.all_special_tokens), *self.rendered]
        self.text_ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in self.texts]
        self.answers = [greedy_tokens(self._model, ids, GREEDY_TOKENS) for ids in self.ids]
        self._logits: dict[int, torch.Tensor] = {}

    def logits(self, prompt: int) -> torch.Tensor:
        """Logits before each token of the answer to a prompt: (answer's length, vocabulary), float32."""
        import torch

        if prompt not in self._logits:
            ids, answer = self.ids[prompt], self.answers[prompt]
            with torch.inference_mode():
                result = self._model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0].float()
            self._logits[prompt] = result[len(ids) - 1 : -1]
        return self._logits[prompt]

    def place(
        self, tokens: list[int], chosen: Sequence[tuple[int, dict[int, float]]]
    ) -> Iterator[tuple[int, dict[int, float]]]:
        """Which step each distribution of `complete_with_distributions` belongs to."""
        for step, (token, distribution) in zip(self._whole_steps(tokens), chosen, strict=False):
            if token != tokens[step]:
                return
            yield step, distribution

    def _whole_steps(self, tokens: list[int]) -> list[int]:
        """The tokens after which the text does not end within a UTF-8 character."""
        return [step for step in range(len(tokens)) if "\ufffd" not in self._tokenizer.decode(tokens[: step + 1])]

    @property
    def perplexity(self) -> float:
        """Of its own answers, over the tokens that a runtime gives distributions for."""
        surprise = [
            -float(self.logits(prompt)[step].log_softmax(-1)[answer[step]])
            for prompt, answer in enumerate(self.answers)
            for step in self._whole_steps(answer)
        ]
        return math.exp(sum(surprise) / len(surprise))

    @property
    def context(self) -> int:
        """Tokens that a runtime must have room for."""
        return max(map(len, self.ids)) + GREEDY_TOKENS + 1


def check_tokenization(runtime: GgufRuntime, reference: Reference) -> None:
    """The runtime's tokens of texts, and its rendering of conversations, must equal the tokenizer's.

    Raises:
        ExportError: they differ; the text is named.
    """
    for text, expected in zip(reference.texts, reference.text_ids, strict=True):
        found = runtime.tokenize(text)
        if found != expected:
            raise ExportError(
                f"llama.cpp tokenizes {text!r} as {found[:12]}..., the tokenizer as {expected[:12]}...",
                where=runtime.model,
                remedy="The tokenizer's pre-tokenizer has no equal in llama.cpp: serve this model without GGUF",
            )
    for prompt, expected in zip(reference.prompts, reference.ids, strict=True):
        # As its chat endpoint does: the file's own template, and a BOS token where the file asks for one.
        found = runtime.tokenize(runtime.render(prompt), add_special=True)
        if found != expected:
            raise ExportError(
                f"llama.cpp makes {found[:12]}... of a conversation, the chat template {expected[:12]}...",
                where=runtime.model,
                remedy="Use a base model with an ordinary chat template (an Instruct model)",
            )


def compare(runtime: GgufRuntime, reference: Reference, limits: Limits) -> FileComparison:
    """Compare greedy answers and their distributions with the reference's.

    Raises:
        ExportError: the file is further from the reference than `limits` allow.
    """
    equal = counted = 0
    divergences: list[float] = []
    surprises: list[float] = []
    expected: list[float] = []
    for prompt, answer in enumerate(reference.answers):
        logits = reference.logits(prompt)
        found, chosen = runtime.complete_with_distributions(reference.ids[prompt], len(answer), _TOP)
        same = next((n for n, (a, b) in enumerate(zip(answer, found, strict=False)) if a != b), len(answer))
        equal += same
        counted += len(answer)
        if same < len(answer) and same < len(found):
            row = logits[same]
            if float(row[answer[same]] - row[found[same]]) <= limits.tie * float(row.abs().max()):
                # What follows a different token answers a different question.
                counted -= len(answer) - same
        for step, distribution in reference.place(found, chosen):
            if step <= same and step < len(answer):
                divergences.append(_divergence(logits[step], distribution))
                surprises.append(-distribution.get(answer[step], min(distribution.values())))
                expected.append(-float(logits[step].log_softmax(-1)[answer[step]]))
    comparison = FileComparison(
        agreement=equal / counted if counted else 1.0,
        divergence=sum(divergences) / len(divergences) if divergences else math.nan,
        perplexity=math.exp(sum(surprises) / len(surprises)) if surprises else math.nan,
    )
    # Over the same tokens: after a differing one, the file's perplexity of the rest is not known.
    ratio = comparison.perplexity / math.exp(sum(expected) / len(expected)) if expected else math.nan
    # A comparison with NaN is false, so ask for what must hold.
    if not (
        comparison.agreement >= limits.agreement
        and comparison.divergence <= limits.divergence
        and ratio <= limits.perplexity
    ):
        raise ExportError(
            f"the GGUF file does not answer like the merged model: {comparison.agreement:.0%} of greedy tokens equal "
            f"(at least {limits.agreement:.0%}), divergence {comparison.divergence:.3g} nats "
            f"(at most {limits.divergence:g}), perplexity {ratio:.3g} times the merged model's "
            f"(at most {limits.perplexity:g})",
            where=runtime.adapter or runtime.model,
            remedy=_REMEDY,
        )
    return comparison


def _divergence(logits: Any, distribution: dict[int, float]) -> float:
    """KL(reference || file) in nats over the file's likeliest tokens and one remainder."""
    import torch

    ids = list(distribution)
    p = logits.double().softmax(-1)[ids]
    log_q = torch.tensor([distribution[token] for token in ids], dtype=torch.float64)
    p_rest = max(1.0 - float(p.sum()), 0.0)
    q_rest = max(1.0 - float(log_q.exp().sum()), 1e-12)
    head = float((p * (p.clamp_min(1e-30).log() - log_q)).sum())
    return max(head + (p_rest * math.log(p_rest / q_rest) if p_rest > 0 else 0.0), 0.0)
