"""Figures of runs for Prometheus: a file for node_exporter's textfile collector, or a push to a Pushgateway.

Totals come from the run log, so that they only grow, whichever process writes them; what tells of the last
run is a gauge. No label has more values than there are pipelines, backends, statuses and reasons of rejection:
dates and runs are no labels.
"""

import logging
from collections.abc import Iterator

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
        yield from self._of_run()
        yield from self._of_date()
        yield from self._of_champion()
        try:
            yield from self._totals()
        except FinetuneError as error:
            _logger.warning("the totals of trainings are left out: %s", error)

    def _gauge(self, name: str, meaning: str, value: float | None, **labels: str) -> Iterator[Metric]:
        if value is not None:
            labels = {"pipeline": self._settings.pipeline_name, **labels}
            family = GaugeMetricFamily(f"{_PREFIX}_{name}", meaning, labels=list(labels))
            family.add_metric(list(labels.values()), value)
            yield family

    def _of_run(self) -> Iterator[Metric]:
        record = self._instance.get_run_record_by_id(self._run.run_id)
        if record is None or record.end_time is None:
            return
        status = record.dagster_run.status.value
        yield from self._gauge("run_end_timestamp_seconds", "When the last run ended.", record.end_time, status=status)
        if record.start_time is not None:
            began = record.create_timestamp.timestamp()
            seconds = record.end_time - record.start_time
            yield from self._gauge("run_duration_seconds", "How long the last run took.", seconds, status=status)
            waited = max(0.0, record.start_time - began)
            yield from self._gauge("run_queue_seconds", "From the last run's creation to its start.", waited)

    def _of_date(self) -> Iterator[Metric]:
        date = self._run.tags.get(PARTITION)
        if date is None:
            return
        if prepared := read_value(self._settings, "merged_dataset", date, PreparedDataset):
            counts = prepared.counts
            yield from self._gauge("dataset_lines", "Lines of the last run's dataset.", counts.lines)
            yield from self._gauge("dataset_rejected_lines", "Of these, the rejected ones.", counts.rejected)
            yield from self._gauge("dataset_train_records", "Records to train on.", counts.train)
            yield from self._gauge("dataset_eval_records", "Records held out.", counts.eval)
        if result := read_value(self._settings, "adapter", date, TrainingResult):
            labels = {"backend": result.backend}
            yield from self._gauge("training_gpu_hours", "GPU-hours of the last training.", result.gpu_hours, **labels)
            yield from self._gauge("training_tokens", "Tokens of the last training.", result.tokens_seen, **labels)
            speed = result.tokens_per_second
            yield from self._gauge("training_tokens_per_second", "Throughput of the last training.", speed, **labels)
            yield from self._gauge("training_loss", "Final loss of the last training.", result.final_loss, **labels)
        if report := read_value(self._settings, "eval_report", date, EvalReport):
            against_base = report.delta_vs_base_loss
            yield from self._gauge("eval_loss", "Held-out loss, in nats per token.", report.eval_loss)
            yield from self._gauge("eval_delta_vs_base", "That less the base model's; below 0 is better.", against_base)
            if report.champion:
                delta = report.champion.delta_vs_champion
                yield from self._gauge("eval_delta_vs_champion", "That less the champion's; below 0 is better.", delta)

    def _of_champion(self) -> Iterator[Metric]:
        reigning = champion(self._settings.layout.registry)
        if reigning is not None:
            made = reigning.created_at.timestamp()
            yield from self._gauge("champion_version", "Number of the reigning version.", reigning.number)
            yield from self._gauge("champion_created_timestamp_seconds", "When it was registered.", made)
            loss = reigning.metrics.get("eval_loss")
            yield from self._gauge("champion_eval_loss", "Its held-out loss, in nats per token.", loss)

    def _totals(self) -> Iterator[Metric]:
        url = self._settings.database_url
        run_log = RunLog(database_url=url.get_secret_value() if url else "", data_dir=str(self._settings.data_root))
        try:
            rows = run_log.totals()
        finally:
            run_log.close()
        labels = ["backend", "status"]
        for name, meaning in (
            ("runs", "Trainings of the run log."),
            ("gpu_hours", "GPU-hours of these trainings."),
            ("tokens", "Tokens that they saw."),
            ("seconds", "Seconds that they took, from start to end."),
        ):
            family = CounterMetricFamily(f"{_PREFIX}_trainings_{name}".replace("_runs", ""), meaning, labels=labels)
            for row in rows:
                family.add_metric([row["backend"], row["status"]], float(row[name]))
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
