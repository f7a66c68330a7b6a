"""The name of a training: equal inputs give an equal name, so that nothing is trained twice."""

from __future__ import annotations

from finetune.base_model.models import BaseModelRef
from finetune.planning.models import TrialConfig
from finetune.publishing import sha256_json

# To be raised whenever the code comes to train another adapter from the same inputs.
CODE_VERSION = 3


def training_run_id(
    *,
    date: str,
    dataset_fingerprint: str,
    trial: TrialConfig,
    base_model: BaseModelRef,
    backend: str,
    init_adapter: str | None = None,
) -> str:
    """A short stable id, such as ``20260601-1a2b3c4d5e``: the date, and a hash of all that decides the adapter.

    It holds lower-case letters, digits and a dash, so that it can serve as an Ollama tag and as an
    idempotency key.

    Args:
        date: the dataset's date in ISO format.
        dataset_fingerprint: of the prepared dataset.
        trial: the configuration; its own name does not matter.
        base_model: its fingerprint and revision matter, its path does not.
        backend: ``hf-peft`` or ``h2o``.
        init_adapter: hash of the adapter that the training begins with, if it begins with one.
    """
    digest = sha256_json(
        {
            "code_version": CODE_VERSION,
            "date": date,
            "dataset": dataset_fingerprint,
            "trial": trial.model_dump(exclude={"trial_id"}),
            "base_model": [base_model.name, base_model.revision, base_model.fingerprint],
            "backend": backend,
            **({} if init_adapter is None else {"init_adapter": init_adapter}),
        }
    )
    return f"{date.replace('-', '')}-{digest[:10]}"
