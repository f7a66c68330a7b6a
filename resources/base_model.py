"""The base model as a Dagster resource."""

from pathlib import Path

import dagster as dg
from pydantic import Field

from finetune.base_model.models import BaseModelRef
from finetune.progress import Progress


class BaseModelSource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Finds, fetches or makes the base model that every step of a run shares."""

    name: str | None = Field(None, description="Local directory, hub name or short name; unset: the embedded model.")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub repository.")
    cache_dir: str = Field(description="Where fetched and made models are kept.")
    token: str | None = Field(None, description="Token for gated repositories.")
    trust_remote_code: bool = Field(False, description="Allow code from the repository to run.")

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine anyway: the embedded model, or a local directory."""
        return self.name is None or Path(self.name).expanduser().is_dir()

    def resolve(self, on_progress: Progress, *, weights: bool = True) -> BaseModelRef:
        """The base model in a local directory.

        Args:
            on_progress: told while the model is fetched or made.
            weights: without them, only configuration, tokenizer and chat template are fetched.

        Raises:
            BaseModelError: it can't be found, reached, or is damaged.
        """
        from finetune.base_model.resolve import resolve_base_model

        return resolve_base_model(
            self.name,
            cache_dir=Path(self.cache_dir),
            revision=self.revision,
            token=self.token,
            trust_remote_code=self.trust_remote_code,
            weights=weights,
            on_progress=on_progress,
        )
