"""The data root as a Dagster resource, and the small values that assets hand to each other."""

from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import BaseModel, Field, TypeAdapter

from finetune.errors import ArtifactError
from finetune.layout import DataLayout, path_part
from finetune.publishing import write_bytes_atomically
from resources.retries import no_retry_if_permanent


class ArtifactStore(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Where artifacts lie. Steps in different pods see the same volume under the same path."""

    data_root: str = Field(description="Absolute path of the data root.")
    pipeline: str = Field(description="The loop's name, part of paths.")

    @property
    def layout(self) -> DataLayout:
        """Paths under the data root."""
        return DataLayout(Path(self.data_root), self.pipeline)


class ValueStore(dg.ConfigurableIOManager):
    """Keeps what an asset returns, a small pydantic model with paths and hashes, as one JSON file.

    Large files never pass through it: they lie where the store says, and the value names them.
    """

    directory: str = Field(description="Absolute path of the folder of values.")

    def path_of(self, asset_key: dg.AssetKey, partition: str | None) -> Path:
        """Where the value of one asset and partition lies.

        Raises:
            ConfigurationError: the partition's key cannot be part of a path.
        """
        return Path(self.directory, *asset_key.path, f"{path_part(partition or 'value')}.json")

    def handle_output(self, context: dg.OutputContext, obj: BaseModel) -> None:
        """Write the value atomically."""
        write_bytes_atomically(self._path(context), (obj.model_dump_json(indent=2) + "\n").encode())

    def load_input(self, context: dg.InputContext) -> Any:
        """Read the value back as the type that the consumer's parameter is annotated with.

        Raises:
            Failure: it was never materialized for this partition, which trying again does not change.
        """
        path = self._path(context)
        with no_retry_if_permanent():
            try:
                content = path.read_bytes()
            except FileNotFoundError as error:
                partition = context.asset_partition_key if context.has_asset_partitions else None
                name = context.asset_key.to_user_string() if context.has_asset_key else context.name
                raise ArtifactError(
                    f"{name} was never materialized for {partition}",
                    where=path,
                    remedy="Materialize it first",
                ) from error
        return TypeAdapter(context.dagster_type.typing_type).validate_json(content)

    def _path(self, context: dg.OutputContext | dg.InputContext) -> Path:
        if context.has_asset_key:
            partition = context.asset_partition_key if context.has_asset_partitions else None
            return self.path_of(context.asset_key, partition)
        # Between the steps of one asset; under the run, beside the assets' values.
        step = context if isinstance(context, dg.OutputContext) else context.upstream_output
        if step is None:
            raise ArtifactError("a value of no step", where=self.directory, remedy="Only assets' steps hand values on")
        return Path(self.directory, ".steps", *step.get_identifier()).with_suffix(".json")
