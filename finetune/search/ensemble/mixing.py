"""Several LoRA adapters on one base model, combined into one by PEFT's `add_weighted_adapter`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.errors import ConfigurationError
from finetune.evaluation.adapters import load_base
from finetune.evaluation.heldout import read_heldout
from finetune.evaluation.scoring import score
from finetune.progress import Progress, ProgressEvent
from finetune.search.ensemble.spec import BY_FACTOR, Combination, EnsembleSpec, Taste, greedy_soup, soup_weights
from finetune.training.adapters import save_adapter
from finetune.training.disk import any_full_disk_named

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# The only one of a model's adapters that PEFT saves into the directory itself.
_COMBINED = "default"


def peft_weights(weights: Sequence[float], combination: Combination) -> list[float]:
    """What PEFT is given, so that every combination is a mean: equal members combine to what each of them is.

    PEFT's ``cat`` and what ends in ``svd`` weigh the updates ``scale * B @ A``. The others weigh A and B each for
    itself, by the square root of the weight, so that ``linear`` of equal members with equal weights would be as many
    times one of them as there are: given squares it is the mean of the factors. ``ties`` divides by the number of
    members that agree, which weights that sum to 1 would do a second time.

    Args:
        weights: of the members, which sum to 1.
        combination: how they are combined.
    """
    scale = len(weights) if "ties" in combination else 1
    scaled = [weight * scale for weight in weights]
    return [weight**2 for weight in scaled] if combination in BY_FACTOR else scaled


class Mixer:
    """The members on their base model, to be combined with one weighting after the other."""

    def __init__(self, model: PeftModel, members: Sequence[str], spec: EnsembleSpec) -> None:
        self._model, self._members, self._spec = model, members, spec

    def combined(self, weights: Sequence[float]) -> PeftModel:
        """The base model with the combination alone, in evaluation mode; members of no weight are left out.

        Args:
            weights: of all members, which sum to 1.
        """
        import torch

        self._drop(_COMBINED)
        chosen = [(name, weight) for name, weight in zip(self._members, weights, strict=True) if weight > 0]
        # A draw of what `dare` drops belongs to the ensemble's seed, not to what was drawn before.
        with torch.random.fork_rng():
            torch.manual_seed(self._spec.seed)
            self._model.base_model.add_weighted_adapter(
                adapters=[name for name, _ in chosen],
                weights=peft_weights([weight for _, weight in chosen], self._spec.combination),
                adapter_name=_COMBINED,
                combination_type=self._spec.combination,
                density=self._spec.kept_share,
                svd_rank=self._spec.svd_rank,
                svd_full_matrices=False,
            )
        self._model.set_adapter(_COMBINED)
        return self._model.eval()

    def save(self, directory: Path, base_model: BaseModelRef) -> None:
        """Write the last combination in PEFT's layout; the members leave the model.

        Raises:
            StorageFullError: the disk is full.
        """
        for name in self._members:
            self._drop(name)
        with any_full_disk_named(directory):
            save_adapter(self._model, directory, base_model, pissa_start=directory)

    def _drop(self, name: str) -> None:
        if name in self._model.peft_config:
            rest = next(other for other in self._model.peft_config if other != name)
            self._model.set_adapter(rest)
            self._model.delete_adapter(name)


@contextmanager
def mixing(model: PreTrainedModel, adapters: Sequence[Path], spec: EnsembleSpec) -> Iterator[Mixer]:
    """Put several LoRA adapters on a model; afterwards it is as it was before.

    Args:
        model: the base model, in evaluation mode.
        adapters: their directories; each was seen to fit the model.
        spec: how they are combined.

    Raises:
        ConfigurationError: PEFT cannot combine adapters of this kind.
    """
    from peft import PeftModel

    names = [f"member_{index}" for index in range(len(adapters))]
    peft_model = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name=names[0], local_files_only=True)
    try:
        for name, path in zip(names[1:], adapters[1:], strict=True):
            peft_model.load_adapter(str(path), adapter_name=name, local_files_only=True)
        for name, path in zip(names, adapters, strict=True):
            config = peft_model.peft_config[name]
            if config.use_dora or config.bias != "none" or config.modules_to_save or config.lora_bias:
                raise ConfigurationError(
                    "PEFT combines the updates of plain LoRA adapters alone, without DoRA's magnitudes, biases and "
                    "whole layers",
                    where=path,
                    remedy="Train the members without them",
                )
            # What is combined has the members' scales in its factors. PEFT 0.21 hands this flag on all the same, and
            # the combination would come out times the root of its rank (huggingface/peft#3449).
            config.use_rslora = False
        yield Mixer(peft_model, names, spec)
    finally:
        peft_model.base_model.unload()


@dataclass(frozen=True)
class Mix:
    """The members' weights, which sum to 1, and how a greedy soup came by them; one weight alone is no combination."""

    weights: list[float]
    tastes: list[Taste]

    @property
    def is_one_member(self) -> bool:
        """Whether nothing was combined."""
        return sum(weight > 0 for weight in self.weights) == 1


def mix(
    spec: EnsembleSpec,
    members: Sequence[Path],
    losses: Sequence[float],
    *,
    base_model: BaseModelRef,
    dataset: Path,
    selection: Sequence[int],
    max_length: int,
    output: Path,
    on_progress: Progress,
) -> Mix:
    """Weigh the members and write their combination in PEFT's layout; nothing is written where one has all weight.

    Args:
        spec: how they are weighed and combined.
        members: directories of two or more LoRA adapters of the base model.
        losses: theirs on the selection, in nats per token.
        base_model: theirs.
        dataset: the held-out records, JSONL.
        selection: those by which soups are tried, by their place among the records that can be scored.
        max_length: records are cut at so many tokens.
        output: a directory for the combination, made if need be.
        on_progress: told of every soup that is tried.

    Raises:
        BaseModelError: the base model cannot be loaded.
        ConfigurationError: PEFT cannot combine adapters of this kind.
        StorageFullError: the disk is full.
    """
    encoder = RecordEncoder.load(base_model.path)
    held_out = read_heldout(dataset, encoder, max_length=max_length)
    records = [held_out.encoded[index] for index in selection]
    model = load_base(base_model)
    with mixing(model, members, spec) as mixer:

        def loss_of(soup: Sequence[int]) -> float:
            on_progress(ProgressEvent("soup", len(soup), None, "members"))
            weights = [1 / len(soup) if member in soup else 0.0 for member in range(len(members))]
            return score(
                mixer.combined(weights),
                records,
                vocabulary=model.config.get_text_config().vocab_size,
                pad_token_id=encoder.pad_token_id,
                after_batch=lambda done: None,
            ).loss

        tastes = greedy_soup(losses, loss_of) if spec.weighting == "greedy_soup" else []
        found = Mix(soup_weights(tastes, len(members)) if tastes else spec.weights(losses), tastes)
        if not found.is_one_member:
            mixer.combined(found.weights)
            mixer.save(output, base_model)
    return found
