"""LM Studio's ``model.yaml``.

Format: model.yaml, Draft 1.0 (https://github.com/modelyaml/modelyaml, https://lmstudio.ai/docs/app/modelyaml);
``VirtualModelDefinition.ts`` of lmstudio-js is its schema.
"""

from __future__ import annotations

from typing import Any

import yaml


def model_yaml(config: dict[str, Any], *, hub_repo: str | None) -> str:
    """The model of a ``lmstudio_config.json`` in LM Studio's own format.

    Args:
        config: that file's content.
        hub_repo: ``owner/name`` on the Hugging Face hub from which LM Studio may download the model.
    """
    publisher, folder, _ = config["model"]["file"].split("/")
    facts, suggested = config["model"]["gguf"], config["suggested"]
    overrides = {
        "domain": "llm",
        "architectures": [facts["architecture"]],
        "compatibilityTypes": ["gguf"],
        "paramsStrings": [facts["size_label"]],
        "minMemoryUsageBytes": config["model"]["size"],
        "contextLengths": [facts["context_length"]],
        "vision": False,
    }
    sources = []
    if hub_repo:
        user, repo = hub_repo.split("/")
        sources.append({"type": "huggingface", "user": user, "repo": repo})
    definition = {
        "model": f"{publisher}/{folder}".lower().replace("_", "-"),
        "base": [{"key": f"{publisher}/{folder}", "sources": sources}],
        "metadataOverrides": {name: value for name, value in overrides.items() if value not in (None, [None])},
        "config": {
            "load": {
                "fields": [{"key": "llm.load.contextLength", "value": suggested["load"]["context_length"]}],
            },
            "operation": {
                "fields": [
                    {"key": "llm.prediction.temperature", "value": suggested["prediction"]["temperature"]},
                    {"key": "llm.prediction.stopStrings", "value": suggested["prediction"]["stop_strings"]},
                ],
            },
        },
    }
    return yaml.safe_dump(definition, sort_keys=False, allow_unicode=True)
