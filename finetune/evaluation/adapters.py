"""A base model in memory, and adapters on it one after the other: one load serves them all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.adapter_files import WEIGHTS_NAME, read_adapter_config
from finetune.base_model.models import BaseModelRef
from finetune.base_model.remote_code import remedy_for
from finetune.errors import ArtifactError, BaseModelError
from finetune.publishing import is_complete, read_manifest

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Module
    from transformers import PreTrainedModel

_BASE_REMEDY = "Delete the directory to have it made or downloaded again, or set BASE_MODEL_NAME to another model"
# They travel along when training has changed the vocabulary, and a tied end with the other.
EMBEDDINGS = re.compile(
    r"\b(embed_tokens|wte|word_embeddings|lm_head)(\.(base_layer|modules_to_save|original_module))?\.weight$"
)
_REMEDY = "Train the adapter again, or use the base model that it was trained on"


def load_base(base_model: BaseModelRef) -> PreTrainedModel:
    """The base model in evaluation mode: float32 on a CPU, its own precision on a GPU.

    An adapter trained on a quantized base (QLoRA) is evaluated on the base in full precision too: that
    is what it is merged into and served with.

    Raises:
        BaseModelError: the model is missing or damaged.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    gpu = torch.cuda.is_available()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            base_model.path,
            dtype="auto" if gpu else torch.float32,
            local_files_only=True,
            trust_remote_code=base_model.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            f"the base model {base_model.name} cannot be loaded: {error}",
            where=base_model.path,
            remedy=remedy_for(error, _BASE_REMEDY),
        ) from error
    # What a checkpoint lacks is filled with random numbers, and only a warning says so.
    if loading["missing_keys"] or loading["mismatched_keys"]:
        lacking = sorted(map(str, loading["missing_keys"] or loading["mismatched_keys"]))
        raise BaseModelError(
            f"the base model {base_model.name} lacks {len(lacking)} tensors such as {lacking[0]}",
            where=base_model.path,
            remedy=_BASE_REMEDY,
        )
    return model.to("cuda" if gpu else "cpu").eval()


def check_adapter(adapter_path: Path) -> None:
    """Refuse an adapter that is incomplete or was altered since it was published.

    Raises:
        ArtifactError: files are missing, or differ from the manifest where there is one.
    """
    if is_complete(adapter_path):
        read_manifest(adapter_path, verify="hashes")
    read_adapter_config(adapter_path)
    weights = adapter_path / WEIGHTS_NAME
    if not weights.is_file():
        raise ArtifactError(f"no adapter here: {WEIGHTS_NAME} is missing", where=adapter_path, remedy=_REMEDY)


def load_adapter(model: PreTrainedModel, adapter_path: Path) -> PeftModel:
    """The model with an adapter of any of PEFT's kinds put on, in evaluation mode.

    PEFT only warns of tensors that it did not find, and stays silent about those that fit nowhere; here
    both are errors, because such a model is the base itself, or half of it is.

    Raises:
        ArtifactError: the adapter is damaged or does not fit the base model.
    """
    peft_model = _load(model, adapter_path)
    _refuse_misfit(peft_model, adapter_path)
    return peft_model


@contextmanager
def attached(model: PreTrainedModel, adapter_path: Path) -> Iterator[Module]:
    """As `load_adapter`; afterwards the model is as it was before."""
    check_adapter(adapter_path)
    tree = [(module, dict(module.named_children())) for module in model.modules()]
    peft_model = _load(model, adapter_path)
    try:
        _refuse_misfit(peft_model, adapter_path)
        yield peft_model
    finally:
        config = peft_model.active_peft_config
        if not config.is_prompt_learning:
            peft_model.base_model.unload()
        # `unload` leaves what `modules_to_save` has trained in the place of the base model's own.
        for module, children in tree:
            for name, child in children.items():
                if getattr(module, name) is not child:
                    setattr(module, name, child)


def _load(model: PreTrainedModel, adapter_path: Path) -> PeftModel:
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(model, str(adapter_path), local_files_only=True).eval()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"the adapter cannot be loaded: {error}", where=adapter_path, remedy=_REMEDY) from error


def _refuse_misfit(peft_model: PeftModel, adapter_path: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter_path / WEIGHTS_NAME, framework="pt") as weights:
        found = set(weights.keys())
    expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    missing = sorted(expected - found)
    surplus = sorted(name for name in found - expected if not EMBEDDINGS.search(name))
    if missing or surplus:
        fault = f"lacks {len(missing)} tensors such as {missing[0]}" if missing else f"has {surplus[0]} beside them"
        raise ArtifactError(
            f"the adapter does not fit the base model: of the tensors that it should hold it {fault}",
            where=adapter_path,
            remedy=_REMEDY,
        )
