"""What a person sees of a training while it runs."""

import dagster as dg

from finetune.progress import ProgressEvent
from lora_assets.assets.training import _observed


def test_the_figures_of_a_running_training_are_on_its_asset() -> None:
    told: list[ProgressEvent] = []

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["2026-06-01"]))
    def trained(context: dg.AssetExecutionContext) -> None:
        listen = _observed(context, "2026-06-01", told.append)
        listen(ProgressEvent("loading the base model", 0, None, "models"))
        for step in (1, 2):
            listen(ProgressEvent("training", step, 9, "steps", {"loss": 2.5 / step, "peak_memory_gb": 1.5}))

    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([trained], partition_key="2026-06-01", instance=instance).success
        (record,) = instance.fetch_observations(trained.key, limit=10).records
    assert len(told) == 3
    observed = record.asset_observation
    assert observed is not None
    assert observed.partition == "2026-06-01"
    shown = {name: value.value for name, value in observed.metadata.items()}
    assert shown == {"step": 1, "total_steps": 9, "loss": 2.5, "peak_memory_gb": 1.5}
