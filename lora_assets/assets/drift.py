"""How the champion does on what has arrived since it was trained."""

import dagster as dg

from finetune.dataset.discovery import discover_exports
from finetune.dataset.prepare import load_prepared, prepare_dataset
from finetune.errors import ArtifactError, DatasetError
from finetune.evaluation.drift import DriftReport, measure_drift
from finetune.registry.champion import LEAST_RECORDS, as_rival
from finetune.registry.promotion import champion
from lora_assets.assets.common import OWNERS, PREFIX, SETTINGS, key, log_progress, path
from lora_assets.assets.evaluation import eval_report
from resources.artifact_store import ArtifactStore
from resources.base_model import BaseModelSource
from resources.retries import RETRY_POLICY, no_retry_if_permanent


@dg.asset(
    key_prefix=PREFIX,
    owners=OWNERS,
    deps=[key("registered_adapter"), key("brain_exports")],
    group_name="monitoring",
    kinds={"pytorch"},
    code_version="1",
    retry_policy=RETRY_POLICY,
    pool="gpu",
    # On the same kind of machine.
    op_tags=dict(eval_report.op.tags),
    description="The champion's loss on all held-out data that arrived since its training, against its loss on the "
    "held-out data of its own dataset.",
)
@no_retry_if_permanent()
def drift_report(
    context: dg.AssetExecutionContext, base_model: BaseModelSource, store: ArtifactStore
) -> dg.MaterializeResult[DriftReport]:
    """Evaluate the champion on held-out data that it never met."""
    report = log_progress(context)
    reigning = champion(store.layout.registry)
    if reigning is None:
        raise ArtifactError("no version reigns yet", where=store.layout.registry, remedy="Train a date first")
    files = discover_exports(SETTINGS.exports, SETTINGS.pattern)
    if not files:
        raise DatasetError("no exports", where=SETTINGS.exports, remedy="Wait for exports, or set EXPORTS_DIR")
    lineage = reigning.lineage
    known = load_prepared(store.layout.prepared(lineage["date"], lineage["dataset_fingerprint"]))
    # What is older than a window that slides is not new. A prompt's side of the split is the same in every window.
    since = "" if SETTINGS.dataset_window == "all" else min(known.window_dates)
    arrived = prepare_dataset(
        [file for file in files if file.date >= since],
        date=files[-1].date,
        layout=store.layout,
        parameters=SETTINGS.prepare_parameters.model_copy(update={"window": "all"}),
        workers=SETTINGS.prepare_workers,
        on_progress=report,
    )
    drift = measure_drift(
        base_model=base_model.resolve(report),
        champion=as_rival(reigning, arrived, store.layout),
        known_eval=known.eval_path,
        arrived=arrived.eval_path,
        output_dir=store.layout.model(reigning.run_id, "drift"),
        max_length=lineage["plan"]["max_length"],
        on_progress=report,
    )
    figures = drift.model_dump(exclude={"path", "drift_ci95", "delta_ci95"}, exclude_none=True)
    return dg.MaterializeResult(
        value=drift,
        metadata={**figures, "trained_on": lineage["date"], "until": files[-1].date, "path": path(drift.path)},
    )


@dg.asset_check(asset=drift_report)
def champion_drift(drift_report: DriftReport) -> dg.AssetCheckResult:
    """The champion's loss on what arrived since is within DRIFT_TOLERANCE of its loss before.

    Fails when the whole confidence interval lies beyond the tolerance, as an error when the champion does no
    longer beat its base model either.
    """
    if drift_report.drift is None or drift_report.drift_ci95 is None or drift_report.delta_ci95 is None:
        return dg.AssetCheckResult(passed=True, description="no held-out data has arrived since its training")
    low, high = drift_report.drift_ci95
    few = min(drift_report.records, drift_report.known_records) < LEAST_RECORDS
    useless = drift_report.delta_ci95[0] > 0
    unknown = ", ".join(drift_report.unknown)
    return dg.AssetCheckResult(
        passed=few or not (low > SETTINGS.drift_tolerance or useless),
        severity=dg.AssetCheckSeverity.ERROR if useless else dg.AssetCheckSeverity.WARN,
        description=f"{drift_report.version}: loss {drift_report.loss:.4f} on {drift_report.records} new held-out "
        f"records against {drift_report.known_loss:.4f} on {drift_report.known_records} of its own dataset: "
        f"{drift_report.drift:+.4f}, 95 % between {low:+.4f} and {high:+.4f}, at most {SETTINGS.drift_tolerance:+g} "
        f"(DRIFT_TOLERANCE); against the base model on what is new {drift_report.delta_vs_base_loss:+.4f}"
        + ("; too few to tell" if few else "")
        + (f"; of the new ones it may know some: the dataset of {unknown} is gone or damaged" if unknown else ""),
        metadata={"drift": drift_report.drift, "new_loss": drift_report.loss or 0.0, "records": drift_report.records},
    )
