"""An ensemble as a person writes it down, and the weights of its members."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune.search.spec import TrainingSpec

Diversity = Literal["seeds", "ranks", "folds"]
Weighting = Literal["uniform", "inverse_loss", "softmax_loss", "greedy_soup"]
Combination = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]

# Part of an ensemble's name: raise it when the same members come to be combined or judged otherwise.
METHOD = 1
# They combine the factors A and B each for itself, and so need equal ranks.
BY_FACTOR: frozenset[Combination] = frozenset({"linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"})
# They keep all of an update.
_WHOLE: frozenset[Combination] = frozenset({"cat", "linear", "svd"})
_MEMBERS = 4
_TEMPERATURE = 0.05
_DENSITY = 0.5
# What has a smaller share is lost in the rounding of 32 bits, and what is left is no combination.
_SMALLEST_WEIGHT = 2.0**-24
# A loss of zero would get all of the weight, and has none to give it.
_SMALLEST_LOSS = 1e-12


class EnsembleSpec(TrainingSpec):
    """All fields of an ensemble of LoRA adapters."""

    may_change: ClassVar[frozenset[str]] = TrainingSpec.may_change | {"tokens_per_second"}

    method: Literal["lora", "qlora"] = "lora"
    # in what the members differ; `folds`: each is trained without one of as many parts of the records
    diversity: Diversity = "seeds"
    # 4 unless given, or as many as `ranks`
    n_members: int | None = Field(None, ge=2, le=64)
    # of diversity `ranks`: one member each
    ranks: list[int] = Field(default_factory=list)
    weighting: Weighting = "greedy_soup"
    # of `softmax_loss`, in nats per token; 0.05 unless given
    temperature: float | None = Field(None, gt=0)
    combination: Combination = "cat"
    # share of an update that `ties`, `dare` and `magnitude_prune` keep; 0.5 unless given
    density: float | None = Field(None, gt=0, lt=1)
    # rank of what ends in `svd`; the members' largest unless given
    svd_rank: int | None = Field(None, ge=1)
    # of the first member, and of what `dare` drops
    seed: int = Field(42, ge=0)

    @model_validator(mode="after")
    def _of_ranks(self) -> EnsembleSpec:
        if self.diversity != "ranks":
            if self.ranks:
                raise ValueError("ranks is for diversity ranks")
            return self
        if len(self.ranks) < 2 or len(set(self.ranks)) < len(self.ranks) or min(self.ranks) < 1:
            raise ValueError("diversity ranks needs two or more different ranks, as ranks: [4, 8, 16]")
        if self.n_members not in (None, len(self.ranks)):
            raise ValueError(f"n_members is {self.n_members}, and there are {len(self.ranks)} ranks")
        if self.fixed.lora_rank is not None:
            raise ValueError("lora_rank cannot be both fixed and what the members differ in")
        if self.combination in BY_FACTOR:
            raise ValueError(
                f"PEFT's {self.combination} needs members of one rank: choose cat, or a combination that ends in svd"
            )
        return self

    @model_validator(mode="after")
    def _fitting(self) -> EnsembleSpec:
        if self.fixed.seed is not None:
            raise ValueError("fixed.seed: the members' seeds follow from seed")
        if self.fixed.use_dora:
            raise ValueError("fixed.use_dora: PEFT combines updates, and drops DoRA's magnitudes without a word")
        if self.temperature is not None and self.weighting != "softmax_loss":
            raise ValueError("temperature is for weighting softmax_loss")
        if self.density is not None and self.combination in _WHOLE:
            raise ValueError(f"density is for ties, dare and magnitude_prune; {self.combination} keeps all")
        if self.svd_rank is not None and not self.combination.endswith("svd"):
            raise ValueError("svd_rank is for a combination that ends in svd")
        return self

    @property
    def members(self) -> list[MemberSpec]:
        """The members in turn."""
        count = len(self.ranks) or self.n_members or _MEMBERS
        match self.diversity:
            case "ranks":
                return [MemberSpec(f"rank {rank}", {"seed": self.seed, "lora_rank": rank}) for rank in self.ranks]
            case "folds":
                return [
                    MemberSpec(f"without fold {index + 1} of {count}", {"seed": self.seed}, fold=index)
                    for index in range(count)
                ]
            case _:
                return [MemberSpec(f"seed {seed}", {"seed": seed}) for seed in range(self.seed, self.seed + count)]

    @property
    def kept_share(self) -> float | None:
        """The share of an update that is kept, None where nothing is dropped."""
        return None if self.combination in _WHOLE else self.density or _DENSITY

    def name(self, *of: str) -> str:
        """The ensemble's name: of what is trained and combined, and on what. A default written down is the same.

        Args:
            of: fingerprints of the dataset and of the base model.
        """
        temperature = (self.temperature or _TEMPERATURE) if self.weighting == "softmax_loss" else None
        whole = {"n_members": len(self.members), "density": self.kept_share, "temperature": temperature}
        return f"ensemble-{self.model_copy(update=whole).identity(str(METHOD), *of)}"

    def weights(self, losses: Sequence[float]) -> list[float]:
        """`loss_weights` as this ensemble wants them; not for ``greedy_soup``, which has to try."""
        return loss_weights(losses, self.weighting, temperature=self.temperature or _TEMPERATURE)


@dataclass(frozen=True)
class MemberSpec:
    """One member: its name for a person, its values of the plan, and the fold that it is trained without."""

    name: str
    params: Mapping[str, int]
    fold: int | None = None


def loss_weights(losses: Sequence[float], weighting: Weighting, *, temperature: float) -> list[float]:
    """Weights that sum to 1; a member whose loss is no number, or whose share would be lost in rounding, gets none.

    ``inverse_loss`` is ``1 / loss``, ``softmax_loss`` is ``exp(-loss / temperature)``, both divided by their sum.

    Args:
        losses: of each member, in nats per token.
        weighting: how.
        temperature: nats per token in which a weight falls to 1/e of another.

    Raises:
        ValueError: no loss is a number, or the weighting has no formula.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        raise ValueError("no member has a loss")
    match weighting:
        case "uniform":
            raw = [1.0 for _ in losses]
        case "inverse_loss":
            raw = [1 / max(loss, _SMALLEST_LOSS) for loss in losses]
        case "softmax_loss":
            # Of differences, so that nothing overflows.
            raw = [math.exp((min(finite) - loss) / temperature) if math.isfinite(loss) else 0.0 for loss in losses]
        case _:
            raise ValueError(f"{weighting} has no formula")
    raw = [weight if math.isfinite(loss) else 0.0 for weight, loss in zip(raw, losses, strict=True)]
    raw = [weight if weight >= _SMALLEST_WEIGHT * sum(raw) else 0.0 for weight in raw]
    return [weight / sum(raw) for weight in raw]


class Taste(BaseModel):
    """One step of the greedy soup: the member that was added, the soup's loss with it, and whether it stayed."""

    model_config = ConfigDict(frozen=True)

    member: int
    loss: float | None
    kept: bool


def greedy_soup(losses: Sequence[float], loss_of: Callable[[Sequence[int]], float]) -> list[Taste]:
    """Members by their loss, each kept if the soup does not get worse with it (Wortsman et al. 2022, recipe 1).

    Args:
        losses: of each member; one whose loss is no number is never tried.
        loss_of: the loss of several members combined with equal weights, NaN where it is no number.

    Raises:
        ValueError: no loss is a number.
    """
    order = sorted((loss, member) for member, loss in enumerate(losses) if math.isfinite(loss))
    if not order:
        raise ValueError("no member has a loss")
    best, first = order[0]
    tastes, soup = [Taste(member=first, loss=best, kept=True)], [first]
    for _, member in order[1:]:
        loss = loss_of([*soup, member])
        kept = loss <= best
        tastes.append(Taste(member=member, loss=loss if math.isfinite(loss) else None, kept=kept))
        if kept:
            best = loss
            soup.append(member)
    return tastes


def soup_weights(tastes: Sequence[Taste], count: int) -> list[float]:
    """Equal weights of the members that stayed, of so many in all."""
    soup = [taste.member for taste in tastes if taste.kept]
    return [1 / len(soup) if member in soup else 0.0 for member in range(count)]
