"""What an adapter does to the base model's tensors, one by one, read from disk without peft."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune.adapter_files import WEIGHTS_NAME
from finetune.errors import ArtifactError
from finetune.export.adapter import module_rank, module_scale
from finetune.export.safetensors_files import StoredTensor, read_safetensors_header

if TYPE_CHECKING:
    import torch

    # Some rows of a weight, float32 (rows, columns), and the number of the first one.
    Rows = tuple[torch.Tensor, int]
    # Merges such rows, in place where it can.
    Merger = Callable[[torch.Tensor, int], torch.Tensor]

_PREFIX = re.escape("base_model.model.")
_PART = re.compile(
    rf"{_PREFIX}(.+?)\.(?:token_adapter\.)?"
    r"(lora_(?:embedding_)?[AB]|lora_B\.bias|lora_magnitude_vector|ia3_l|trainable_tokens_delta)(?:\.weight)?"
)
_WHOLE = re.compile(rf"{_PREFIX}(.+?)(?:\.token_adapter)?(?:\.base_layer)?\.(weight|bias)")
# Copies that peft writes beside the tensor itself where the vocabulary has changed.
_COPY = re.compile(r"\.(modules_to_save|original_module)(?=\.)")
_DIMENSIONS = {"lora_magnitude_vector": 1, "lora_B.bias": 1}
_KINDS = {"LORA", "IA3", "TRAINABLE_TOKENS"}
# Adapters with any of these do more than change tensors one by one.
_NOT_BY_TENSOR = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Any other start, such as PiSSA's, has taken something out of the base's weights.
_STARTS_BESIDE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_REMEDY = "Train the adapter again"


class Change(Protocol):
    """What is done to one tensor, which counts as a matrix: of one column if it is a vector."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be changed so."""

    def merger(self, scratch: torch.Tensor, rows: Callable[[], Iterator[Rows]]) -> Merger:
        """The change, to be called for all rows in turn.

        Args:
            scratch: memory of as many float32 numbers as the tensor has, to be written over: fresh memory for every
                tensor costs more than the change.
            rows: reads the tensor, for what must be known of all of it before.
        """


@dataclass(frozen=True)
class LoraPair:
    """The weight's update is ``scale * B @ A``, transposed where `fan_in_fan_out` (and in an embedding).

    `a` is (rank, in), `b` (out, rank), in the type in which they are stored, and in the file's memory until they are
    used. With DoRA (arXiv:2402.09353) `magnitude`, (out,), is the length that every output's weights get in the sum of
    weight and update.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    fan_in_fan_out: bool
    magnitude: torch.Tensor | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """The weight of the module, or its bias as one column."""
        own = (self.b.shape[0], self.a.shape[1])
        return (shape if len(shape) > 1 else (*shape, 1)) == (own[::-1] if self.fan_in_fan_out else own)

    def delta(self, scratch: torch.Tensor) -> torch.Tensor:
        """The update in the weight's own layout, float32, in the memory of `scratch`."""
        import torch

        outputs, inputs = self.b.shape[0], self.a.shape[1]
        # As a whole: a product in parts is not equal to the bit.
        product = torch.mm(self.b.float(), self.a.float(), out=scratch[: outputs * inputs].view(outputs, inputs))
        return (product.T if self.fan_in_fan_out else product).mul_(self.scale)

    def merger(self, scratch: torch.Tensor, rows: Callable[[], Iterator[Rows]]) -> Merger:
        """Adds the update, and stretches what DoRA gives a length."""
        import torch

        delta = self.delta(scratch)

        def add(weight: torch.Tensor, start: int) -> torch.Tensor:
            return weight.add_(delta[start : start + len(weight)])

        if self.magnitude is None:
            return add
        magnitude = self.magnitude.float()
        if not self.fan_in_fan_out:

            def add_and_stretch(weight: torch.Tensor, start: int) -> torch.Tensor:
                merged = add(weight, start)
                lengths = magnitude[start : start + len(weight)] / torch.linalg.norm(merged, dim=1)
                return merged.mul_(lengths[:, None])

            return add_and_stretch
        # An output's weights are a column here, and all of it has to be seen first.
        squares = torch.zeros(len(magnitude), dtype=torch.float64)
        for weight, start in rows():
            squares += add(weight, start).double().square_().sum(0)
        lengths = (magnitude / squares.sqrt()).float()
        return lambda weight, start: add(weight, start).mul_(lengths)


@dataclass(frozen=True)
class Scaling:
    """IA3 (arXiv:2205.05638): rows or columns are multiplied by `factor`, (rows, 1) or (1, columns)."""

    factor: torch.Tensor

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Where the factor has more than one element, the tensor has as many."""
        return all(own in (1, wanted) for own, wanted in zip(self.factor.shape, (*shape, 1), strict=False))

    def merger(self, scratch: torch.Tensor, rows: Callable[[], Iterator[Rows]]) -> Merger:
        """Multiplies."""
        factor = self.factor.float()
        if len(factor) == 1:
            return lambda weight, start: weight.mul_(factor)
        return lambda weight, start: weight.mul_(factor[start : start + len(weight)])


@dataclass(frozen=True)
class NewRows:
    """Trained tokens: the rows `indices` become `rows`, (indices, columns)."""

    indices: tuple[int, ...]
    rows: torch.Tensor

    def fits(self, shape: tuple[int, ...]) -> bool:
        """All tokens are rows of the tensor, and each has a new one."""
        return (len(self.indices), *shape[1:]) == self.rows.shape and max(self.indices, default=0) < shape[0]

    def merger(self, scratch: torch.Tensor, rows: Callable[[], Iterator[Rows]]) -> Merger:
        """Replaces the tokens' rows."""

        def replace(weight: torch.Tensor, start: int) -> torch.Tensor:
            for index, row in zip(self.indices, self.rows, strict=True):
                if start <= index < start + len(weight):
                    weight[index - start] = row
            return weight

        return replace


@dataclass(frozen=True)
class Updates:
    """What an adapter does to a model's tensors, by their names.

    `brought` are those that the adapter's file has itself: modules that were `trained` as a whole, biases, and
    embeddings with rows for added tokens. `changes` are made to them, or else to the base's. With
    `ensure_weight_tying`, input embeddings and output head were trained as one. `fan_in_fan_out` is how the changes
    take all weights but embeddings to lie. `targets` are ends of the names of modules all of which were trained, as far
    as the configuration names them.
    """

    changes: dict[str, Change]
    brought: dict[str, StoredTensor]
    trained: frozenset[str]
    ensure_weight_tying: bool
    fan_in_fan_out: bool
    targets: tuple[str, ...] = ()


def read_updates(adapter_path: Path, config: Mapping[str, Any]) -> Updates | None:
    """What LoRA with all its variants, IA3 and trained tokens do, or None where the adapter holds anything else.

    Raises:
        ArtifactError: a pair is incomplete or does not fit together, or the weights are damaged.
    """
    from safetensors import SafetensorError

    if (
        config["peft_type"] not in _KINDS
        or any(config.get(name) for name in _NOT_BY_TENSOR)
        or config.get("init_lora_weights") not in _STARTS_BESIDE_THE_BASE
    ):
        return None
    path = adapter_path / WEIGHTS_NAME
    try:
        read = _read_parts(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"unreadable adapter weights: {error}", where=path, remedy=_REMEDY) from error
    if read is None:
        return None
    parts, brought = read
    changes: dict[str, Change] = {}
    for module, own in parts.items():
        if "ia3_l" in own:
            changes |= _scalings(module, own["ia3_l"], config)
        elif "trainable_tokens_delta" in own:
            changes[f"{module}.weight"] = NewRows(_trained_tokens(module, config), own["trainable_tokens_delta"])
        else:
            changes |= _lora_pairs(module, own, config, path)
    saved = tuple(config.get("modules_to_save") or ())
    return Updates(
        changes,
        brought,
        frozenset(name for name in brought if name.rpartition(".")[0].endswith(saved)),
        bool(config.get("ensure_weight_tying")),
        bool(config.get("fan_in_fan_out")),
        (*saved, *_targets(config)),
    )


def _targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return ()
    return tuple(f".{target}" for target in targets)


def read_lora_pairs(adapter_path: Path, config: Mapping[str, Any]) -> dict[str, LoraPair] | None:
    """The pairs of a plain LoRA adapter of linear layers by module name, float32, or None if it holds anything else.

    Raises:
        ArtifactError: a pair is incomplete or does not fit together, or the weights are damaged.
    """
    if config["peft_type"] != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        return None
    updates = read_updates(adapter_path, config)
    if updates is None or updates.brought:
        return None
    pairs = {}
    for name, change in updates.changes.items():
        if not isinstance(change, LoraPair) or not name.endswith(".weight"):
            return None
        if change.fan_in_fan_out != bool(config.get("fan_in_fan_out")):
            return None
        pairs[name.removesuffix(".weight")] = replace(change, a=change.a.float(), b=change.b.float())
    return pairs


def _read_parts(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, StoredTensor]] | None:
    """What belongs to each module, and whole tensors; None where there is anything else."""
    from safetensors import safe_open

    parts: dict[str, dict[str, torch.Tensor]] = {}
    brought: dict[str, StoredTensor] = {}
    copied = set()
    with safe_open(path, "pt") as tensors:
        for name, stored in read_safetensors_header(path).items():
            if match := _PART.fullmatch(name):
                parts.setdefault(match[1], {})[match[2]] = tensors.get_tensor(name)
                if len(stored.shape) != _DIMENSIONS.get(match[2], 2):
                    return None
            elif match := _WHOLE.fullmatch(_COPY.sub("", name)):
                own = f"{match[1]}.{match[2]}"
                if _COPY.search(name):
                    copied.add(own)
                else:
                    brought[own] = stored
            else:
                return None
    return (parts, brought) if copied <= brought.keys() else None


def _lora_pairs(module: str, own: dict[str, torch.Tensor], config: Mapping[str, Any], path: Path) -> dict[str, Change]:
    import torch

    embedding = "lora_embedding_A" in own or "lora_embedding_B" in own
    side = {kind.removeprefix("lora_").removeprefix("embedding_"): tensor for kind, tensor in own.items()}
    bias = side.pop("B.bias", None)
    if side.keys() != ({"A", "B", "magnitude_vector"} if config.get("use_dora") else {"A", "B"}):
        raise ArtifactError(f"the adapter has only one half of {module}", where=path, remedy=_REMEDY)
    rank, scale, outputs = module_rank(config, module), module_scale(config, module), len(side["B"])
    if not len(side["A"]) == side["B"].shape[1] == rank or len(side.get("magnitude_vector", side["B"])) != outputs:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(side.items()))
        raise ArtifactError(
            f"the adapter's tensors of {module} do not fit each other and rank {rank}: {shapes}",
            where=path,
            remedy=_REMEDY,
        )
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    pairs: dict[str, Change] = {
        f"{module}.weight": LoraPair(side["A"], side["B"], scale, transposed, side.get("magnitude_vector"))
    }
    if bias is not None:
        pairs[f"{module}.bias"] = LoraPair(torch.ones(1, 1), bias[:, None], scale, fan_in_fan_out=False)
    return pairs


def _scalings(module: str, factor: torch.Tensor, config: Mapping[str, Any]) -> dict[str, Change]:
    """(outputs, 1) multiplies what a module gives, and so its bias too; (1, inputs) what it gets."""
    changes: dict[str, Change] = {f"{module}.weight": Scaling(factor.T if config.get("fan_in_fan_out") else factor)}
    if len(factor) > 1:
        changes[f"{module}.bias"] = Scaling(factor)
    return changes


def _trained_tokens(module: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Of peft's two ways to write them: of the embeddings, or by the end of a module's name."""
    tokens = config.get("trainable_token_indices") or config.get("token_indices") or ()
    if isinstance(tokens, dict):
        return next((tuple(indices) for name, indices in tokens.items() if module.endswith(name)), ())
    return tuple(tokens)
