"""The SHA-256 of an adapter: of what it does, wherever it lies and whoever loads it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from finetune.errors import ArtifactError
from finetune.publishing import canonical_json

# They name places and versions of libraries, not what the adapter does.
_IGNORED = frozenset({"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"})


def adapter_hash(directory: Path) -> str:
    """SHA-256 in hexadecimal over an adapter's configuration and weights in PEFT's layout.

    The configuration counts as canonical JSON without the base model's path; of the weights count, in
    the order of their names, name, type, shape and bytes. So neither the order in which a library wrote
    the file nor its metadata matter.

    Raises:
        ArtifactError: the configuration or the weights are missing or damaged.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    config_path, weights_path = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    digest = hashlib.sha256()
    try:
        config = json.loads(config_path.read_bytes())
        kept = {name: value for name, value in config.items() if name not in _IGNORED}
        for name, value in kept.items():
            # peft writes sets as lists, in no particular order.
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                kept[name] = sorted(value)
        digest.update(canonical_json(kept))
        with safe_open(weights_path, framework="pt") as weights:
            for name in sorted(weights.keys()):
                tensor = weights.get_tensor(name).contiguous()
                digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
                digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise ArtifactError(
            f"the adapter cannot be read: {error}", where=directory, remedy="Materialize the adapter again"
        ) from error
    return digest.hexdigest()
