"""Figures of runs for Prometheus: a file for node_exporter's textfile collector, or a push to a Pushgateway.

Totals come from the run log, so that they only grow, whichever process writes them; what tells of the last
run is a gauge. No label has more values than there are pipelines, backends, statuses and reasons of rejection:
dates and runs are no labels.
"""

import logging
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import dagster as dg
from prometheus_client import CollectorRegistry, push_to_gateway, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune.dataset.models import PreparedDataset
from finetune.errors import FinetuneError
from finetune.evaluation.models import EvalReport
from finetune.registry.promotion import champion
from finetune.training.models import TrainingResult
from lora_assets.freshness import read_value
from lora_assets.logs import PARTITION
from lora_assets.settings import Settings
from resources.run_log import RunLog

_logger = logging.getLogger(__name__)

_PREFIX = "lora_assets"
_PUSH_SECONDS = 5.0


class _Figure(NamedTuple):
    name: str
    meaning: str
    value: float | None
    labels: Mapping[str, str] = MappingProxyType({})


class RunFigures(Collector):
    """What is known after a run: totals of all trainings, and figures of this run, its date and the champion.

    Args:
        settings: in force.
        instance: where the run's history is.
        run: the run that has ended.
    """

    def __init__(self, settings: Settings, instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
        self._settings = settings
        self._instance = instance
        self._run = run

    def collect(self) -> Iterator[Metric]:
        """The metrics; of what is not known there is none."""
        gauges: dict[str, GaugeMetricFamily] = {}
        for figure in (*self._of_runs(), *self._of_date(), *self._of_champion()):
            if figure.value is not None:
                labels = {"pipeline": self._settings.pipeline_name, **figure.labels}
                family = gauges.setdefault(
                    figure.name, GaugeMetricFamily(f"{_PREFIX}_{figure.name}", figure.meaning, labels=list(labels))
                )
                family.add_metric(list(labels.values()), figure.value)
        yield from gauges.values()
        try:
            yield from self._totals()
        except FinetuneError as error:
            _logger.warning("the totals of trainings are left out: %s", error)

    def _of_runs(self) -> Iterator[_Figure]:
        """The last run of each way to end: a failure does not make the last success forgotten."""
        for status in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED):
            labels = {"status": status.value}
            for record in self._instance.get_run_records(dg.RunsFilter(statuses=[status]), limit=1):
                ended, began = record.end_time, record.start_time
                yield _Figure("run_end_timestamp_seconds", "When the last run ended.", ended, labels)
                if ended is not None and began is not None:
                    waited = max(0.0, began - record.create_timestamp.timestamp())
                    yield _Figure("run_duration_seconds", "How long the last run took.", ended - began, labels)
                    yield _Figure("run_queue_seconds", "From the last run's creation to its start.", waited, labels)

    def _of_date(self) -> Iterator[_Figure]:
        date = self._run.tags.get(PARTITION)
        if date is None:
            return
        if prepared := read_value(self._settings, "merged_dataset", date, PreparedDataset):
            counts = prepared.counts
            yield _Figure("dataset_lines", "Lines of the last run's dataset.", counts.lines)
            yield _Figure("dataset_rejected_lines", "Of these, the rejected ones.", counts.rejected)
            yield _Figure("dataset_train_records", "Records to train on.", counts.train)
            yield _Figure("dataset_eval_records", "Records held out.", counts.eval)
        if result := read_value(self._settings, "adapter", date, TrainingResult):
            labels = {"backend": result.backend}
            yield _Figure("training_gpu_hours", "GPU-hours of the last run's training.", result.gpu_hours, labels)
            yield _Figure("training_tokens", "Tokens that it saw.", result.tokens_seen, labels)
            yield _Figure("training_tokens_per_second", "Its throughput.", result.tokens_per_second, labels)
            yield _Figure("training_loss", "Its final loss.", result.final_loss, labels)
        if report := read_value(self._settings, "eval_report", date, EvalReport):
            rival = report.champion
            yield _Figure("eval_loss", "Held-out loss, in nats per token.", report.eval_loss)
            yield _Figure(
                "eval_delta_vs_base", "It less the base model's: below 0 is better.", report.delta_vs_base_loss
            )
            against = rival.delta_vs_champion if rival else None
            yield _Figure("eval_delta_vs_champion", "It less the champion's: below 0 is better.", against)

    def _of_champion(self) -> Iterator[_Figure]:
        if reigning := champion(self._settings.layout.registry):
            made = reigning.created_at.timestamp()
            yield _Figure("champion_version", "Number of the reigning version.", reigning.number)
            yield _Figure("champion_created_timestamp_seconds", "When it was registered.", made)
            loss = reigning.metrics.get("eval_loss")
            yield _Figure("champion_eval_loss", "Its held-out loss, in nats per token.", loss)

    def _totals(self) -> Iterator[Metric]:
        url = self._settings.database_url
        run_log = RunLog(database_url=url.get_secret_value() if url else "", data_dir=str(self._settings.data_root))
        try:
            rows = run_log.totals()
        finally:
            run_log.close()
        labels = ["backend", "status"]
        for name, column, meaning in (
            ("trainings", "runs", "Trainings of the run log."),
            ("trainings_gpu_hours", "gpu_hours", "GPU-hours of these trainings."),
            ("trainings_tokens", "tokens", "Tokens that they saw."),
            ("trainings_seconds", "seconds", "Seconds that they took, from start to end."),
        ):
            family = CounterMetricFamily(f"{_PREFIX}_{name}", meaning, labels=labels)
            for row in rows:
                family.add_metric([row["backend"], row["status"]], float(row[column]))
            yield family


def publish_metrics(settings: Settings, instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Write or push the figures of a run that has ended, where METRICS_TEXTFILE_DIR or METRICS_PUSHGATEWAY_URL is set.

    Neither is worth a run: what goes wrong is logged.
    """
    if settings.metrics_textfile_dir is None and settings.metrics_pushgateway_url is None:
        return
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunFigures(settings, instance, run))
    name = settings.pipeline_name
    if directory := settings.metrics_textfile_dir:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_to_textfile(str(directory / f"{_PREFIX}_{name}.prom"), registry)
        except OSError as error:
            _logger.warning("the metrics were not written to %s: %s", directory, error)
    if url := settings.metrics_pushgateway_url:
        try:
            push_to_gateway(url, job=_PREFIX, registry=registry, grouping_key={"pipeline": name}, timeout=_PUSH_SECONDS)
        except OSError as error:
            _logger.warning("the metrics were not pushed to %s: %s", url, error)
