"""A training that begins with the weights of an adapter: which may, and how they get into the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from finetune.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_hash, read_adapter_config
from finetune.base_model.models import BaseModelRef
from finetune.errors import ArtifactError, ConfigurationError
from finetune.planning.model_config import ModelShape, read_model_shape
from finetune.planning.models import TrainableMethod, TrialConfig
from finetune.planning.overrides import PlanOverrides
from finetune.publishing import is_complete, read_manifest
from finetune.training.models import InitAdapter, TrainingRequest

if TYPE_CHECKING:
    from peft import PeftModel

_EXPERIMENT = "experiment_manifest.json"
_REMEDY = "Restore that adapter from a backup or train it again, or start from the base model"
# What a LoRA of ours never has: an adapter that does is another network than the one that is trained.
_FOREIGN = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "prefix_projection",
)


def read_init_adapter(path: Path) -> InitAdapter:
    """An adapter in PEFT's layout, to begin a training with: a published one, a registered version, or any other.

    Raises:
        ArtifactError: it is incomplete or damaged.
    """
    digest = adapter_hash(path)
    return InitAdapter(path=path, run_id=_origin(path).get("run_id") or path.name, adapter_hash=digest)


def refuse_unfit_start(request: TrainingRequest) -> None:
    """Check that the training can begin with its `init_adapter`, if it has one; no training library is needed.

    Raises:
        ConfigurationError: the adapter is of another kind, size or base model than the plan's.
        ArtifactError: it is missing, damaged, or not the one whose hash the request names.
    """
    init, trial = request.init_adapter, request.plan.trial_config
    if init is None:
        return
    actual = adapter_hash(init.path)
    if actual != init.adapter_hash:
        raise ArtifactError(
            f"the adapter to start from has the hash {actual[:12]}, not {init.adapter_hash[:12]}",
            where=init.path,
            remedy="Restore it from a backup, or make the plan again",
        )
    if differing := differences(init.path, trial, read_model_shape(request.base_model.path), request.base_model):
        raise ConfigurationError(
            f"the plan's adapter cannot start from {init.run_id}: {'; '.join(differing)}",
            where=init.path,
            remedy="Plan with the values of that adapter, or start from the base model",
        )


def differences(path: Path, trial: TrialConfig, shape: ModelShape, base_model: BaseModelRef) -> list[str]:
    """In what an adapter differs from the one that a configuration trains, a phrase for each; empty if it fits.

    An adapter of lora and one of qlora are of one kind, and one that PiSSA made is a plain LoRA of twice the rank. The
    base model is compared where the adapter's manifest names its fingerprint; the tensors' shapes are compared when
    they are loaded.

    Raises:
        ArtifactError: the adapter's configuration is missing or damaged.
    """
    config = {"use_rslora": False, "use_dora": False, **read_adapter_config(path)}
    expected = _expected(trial, shape)
    found = {name: _comparable(config.get(name)) for name in expected}
    told = [
        f"{name} is {found[name]!r} there, {value!r} here" for name, value in expected.items() if found[name] != value
    ]
    if trial.use_pissa:
        told.append("PiSSA starts from the base model's singular vectors")
    told += [f"it has {name}" for name in _FOREIGN if config.get(name)]
    fingerprint = _origin(path).get("base_fingerprint")
    if fingerprint and fingerprint != base_model.fingerprint:
        told.append(f"it was trained on another base model than {base_model.name}")
    return told


def plan_like(path: Path) -> tuple[TrainableMethod, PlanOverrides]:
    """What a plan must be given to go on with an adapter: its method, and its size.

    Raises:
        ArtifactError: the adapter's configuration is missing or damaged.
        ConfigurationError: it is of no kind that is trained here.
    """
    config = read_adapter_config(path)
    try:
        match config.get("peft_type"):
            case "PREFIX_TUNING":
                return "prefix", PlanOverrides(virtual_tokens=config["num_virtual_tokens"])
            case "IA3":
                return "ia3", PlanOverrides()
            case "LORA":
                return "qlora" if _origin(path).get("method") == "qlora" else "lora", PlanOverrides(
                    lora_rank=config["r"],
                    lora_alpha=config["lora_alpha"],
                    target_modules=_comparable(config["target_modules"]),
                    use_rslora=bool(config.get("use_rslora")),
                    use_dora=bool(config.get("use_dora")),
                    use_pissa=False,
                )
    except (KeyError, ValidationError) as error:
        raise ArtifactError(
            f"the adapter's configuration names no size: {error}", where=path / CONFIG_NAME, remedy=_REMEDY
        ) from error
    raise ConfigurationError(
        f"an adapter of the kind {config.get('peft_type')} is not trained here",
        where=path / CONFIG_NAME,
        remedy="Start from the base model, or from an adapter of LoRA, prefix tuning or IA3",
    )


def load_init_weights(model: PeftModel, path: Path) -> None:
    """Give an adapter that was just made the weights of another one of its kind and size.

    PEFT's own way of loading one for training (`PeftModel.from_pretrained` with `is_trainable`) refuses prefixes, and
    only warns of tensors that it misses.

    Raises:
        ArtifactError: the weights are missing, damaged, or not those of this adapter.
    """
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    from safetensors import SafetensorError

    try:
        weights = load_peft_weights(str(path), device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"the adapter to start from cannot be read: {error}", where=path, remedy=_REMEDY) from error
    ours = get_peft_model_state_dict(model, save_embedding_layers=False)
    found, expected = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (weights, ours))
    if found != expected:
        wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        raise ArtifactError(
            f"the adapter to start from does not fit the base model: {len(wrong)} tensors differ, such as {wrong[0]}",
            where=path / WEIGHTS_NAME,
            remedy=_REMEDY,
        )
    set_peft_model_state_dict(model, weights)


def _expected(trial: TrialConfig, shape: ModelShape) -> dict[str, Any]:
    match trial.method:
        case "prefix":
            return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": trial.virtual_tokens}
        case "ia3":
            modules = list(shape.ia3_modules)
            return {"peft_type": "IA3", "target_modules": sorted(modules), "feedforward_modules": modules[-1:]}
        case _:
            return {
                "peft_type": "LORA",
                "r": trial.lora_rank,
                "lora_alpha": trial.lora_alpha,
                "target_modules": sorted(linear.name for linear in shape.targets(trial.target_modules)),
                "use_rslora": trial.use_rslora,
                "use_dora": trial.use_dora,
            }


def _comparable(value: Any) -> Any:
    # PEFT writes sets of module names, whose order changes from run to run.
    return sorted(value) if isinstance(value, list) else value


def _origin(path: Path) -> dict[str, str]:
    """What a published adapter's or a registered version's manifests say of its training; empty for any other."""
    if not is_complete(path):
        return {}
    manifest = read_manifest(path)
    run_id, base, trial = manifest.results.get("run_id"), manifest.inputs.get("base_model", {}), manifest.parameters
    if (path / _EXPERIMENT).is_file():
        try:
            experiment = json.loads((path / _EXPERIMENT).read_bytes())
            run_id, inputs = experiment["run_id"], experiment["inputs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"unreadable: {error}", where=path / _EXPERIMENT, remedy=_REMEDY) from error
        base, trial = {"fingerprint": inputs.get("base_model_fingerprint")}, inputs.get("plan", {})
    found = {"run_id": run_id, "base_fingerprint": base.get("fingerprint"), "method": trial.get("method")}
    return {name: value for name, value in found.items() if value}
