"""A pod for each step, on clusters that lose pods, nodes and their own API server.

Dagster's `k8s_job_executor` launches the steps and looks after them. What it leaves open is closed here:

- the pod of an earlier attempt may still be at work: of this run's step, or of the run that this one retries,
  whose worker was lost while its steps were not. It is ended, and waited for, before the step starts again;
- a pod that never starts (no image, no node) would be waited for without end;
- a step that is launched while the API server is away, or slow to answer, would fail its whole run.
"""

import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar

import dagster as dg
from dagster._core.executor.step_delegating import CheckStepHealthResult, StepHandler, StepHandlerContext
from dagster_k8s import k8s_job_executor
from dagster_k8s.client import DagsterK8sUnrecoverableAPIError
from dagster_k8s.utils import sanitize_k8s_label
from kubernetes.client import ApiException, BatchV1Api, CoreV1Api, V1Job, V1Pod
from urllib3.exceptions import HTTPError

from lora_assets.kubernetes import any_step
from lora_assets.settings import Settings

Answer = TypeVar("Answer")
_logger = logging.getLogger(__name__)

# How long an API server may be away, as during an upgrade of a managed cluster.
_PATIENCE_SECONDS = 600.0
# A pod gets so long to end: more than the grace period of any step. A node that is cut off never answers.
_END_SECONDS = 180.0
_POLL_SECONDS = 2.0


def pod_per_step(settings: Settings) -> dg.ExecutorDefinition:
    """`k8s_job_executor` with what this module adds."""

    def create(context: dg.InitExecutorContext) -> dg.Executor:
        executor: Any = k8s_job_executor.executor_creation_fn(context)  # type: ignore[misc]  # it has one
        # Dagster's executor takes no step handler from outside.
        executor._step_handler = StepPods(executor._step_handler, settings.pod_start_seconds)
        return executor  # type: ignore[no-any-return]  # Any for the line above

    return dg.ExecutorDefinition(
        name="pod_per_step",
        config_schema=k8s_job_executor.config_schema,  # type: ignore[arg-type]  # it takes what it gives
        requirements=k8s_job_executor._requirements_fn,
        executor_creation_fn=create,
    ).configured({"step_k8s_config": any_step(settings), "enable_owner_references": True})


class StepPods(StepHandler):
    """Launches steps, looks after them and ends them.

    Args:
        steps: Dagster's own handler.
        start_seconds: how long a pod may take to start.
    """

    def __init__(self, steps: StepHandler, start_seconds: float) -> None:
        super().__init__()
        self._steps = steps
        self._start_seconds = start_seconds
        self._jobs, self._pods = BatchV1Api(), CoreV1Api()

    @property
    def name(self) -> str:
        """What the run's events call the handler."""
        return type(self).__name__

    def launch_step(self, step_handler_context: StepHandlerContext) -> Iterator[dg.DagsterEvent]:
        """Start a step when no earlier attempt of it is at work any more."""
        _patiently(lambda: self._end_earlier(step_handler_context))
        known = _patiently(lambda: self._jobs_of(step_handler_context))
        try:
            yield from self._steps.launch_step(step_handler_context)
        except DagsterK8sUnrecoverableAPIError as error:
            # The answer came too late, and Dagster asked again for the Job that it had made.
            conflict = isinstance(error.k8s_api_exception, ApiException) and error.k8s_api_exception.status == 409
            if not conflict or len(self._jobs_of(step_handler_context)) == len(known):
                raise

    def check_step_health(self, step_handler_context: StepHandlerContext) -> CheckStepHealthResult:
        """Tell whether a step's pod has failed, or has not started in time."""
        health = self._steps.check_step_health(step_handler_context)
        if not health.is_healthy:
            why = "; ".join(filter(None, map(_why_ended, self._pods_of(step_handler_context)))) or "its pod is gone"
            return CheckStepHealthResult.unhealthy(reason=f"{health.unhealthy_reason} {why}")
        reason = self._waits_too_long(step_handler_context)
        if reason is None:
            return health
        # Or it would start later, beside the next attempt.
        list(self._steps.terminate_step(step_handler_context))
        return CheckStepHealthResult.unhealthy(reason=reason)

    def terminate_step(self, step_handler_context: StepHandlerContext) -> Iterator[dg.DagsterEvent]:
        """End a step, as its run ends."""
        return self._steps.terminate_step(step_handler_context)

    def _end_earlier(self, context: StepHandlerContext) -> None:
        """End the pods of this step's earlier attempts, and those of the runs that this run retries."""
        namespace = _namespace(context)
        selectors = [_selector(context)]
        earlier = context.dagster_run.parent_run_id
        while earlier and (run := context.instance.get_run_by_id(earlier)):
            if run.is_finished:
                selectors.append(f"dagster/run-id={run.run_id}")
            earlier = run.parent_run_id
        for selector in selectors:
            for job in self._jobs.list_namespaced_job(namespace, label_selector=selector).items:
                if not job.status.conditions:
                    _logger.warning("ending Job %s of an earlier attempt", job.metadata.name)
                    self._delete(job.metadata.name, namespace)
            deadline = time.monotonic() + _END_SECONDS
            while left := self._at_work(selector, namespace):
                if time.monotonic() > deadline:
                    # Its node does not answer. Whether it still trains is decided by the training's lease.
                    _logger.warning("pod %s of an earlier attempt does not end", left[0].metadata.name)
                    break
                time.sleep(_POLL_SECONDS)

    def _delete(self, job: str, namespace: str) -> None:
        try:
            # By default the pods would be left alone.
            self._jobs.delete_namespaced_job(job, namespace, propagation_policy="Background")
        except ApiException as error:
            if error.status != 404:
                raise

    def _at_work(self, selector: str, namespace: str) -> list[V1Pod]:
        pods = self._pods.list_namespaced_pod(namespace, label_selector=selector).items
        return [pod for pod in pods if pod.status.phase not in ("Succeeded", "Failed")]

    def _jobs_of(self, context: StepHandlerContext) -> list[V1Job]:
        found: list[V1Job] = self._jobs.list_namespaced_job(
            _namespace(context), label_selector=_selector(context)
        ).items
        return found

    def _pods_of(self, context: StepHandlerContext) -> list[V1Pod]:
        found: list[V1Pod] = self._pods.list_namespaced_pod(
            _namespace(context), label_selector=_selector(context)
        ).items
        return found

    def _waits_too_long(self, context: StepHandlerContext) -> str | None:
        """Why the step's pod has not started, if it has taken too long."""
        pods = self._pods_of(context)
        if any(pod.status.phase != "Pending" for pod in pods):
            return None
        waiting = [job for job in self._jobs_of(context) if not job.status.conditions]
        if not waiting:
            return None
        waited = datetime.now(UTC) - min(job.metadata.creation_timestamp for job in waiting)
        if waited.total_seconds() < self._start_seconds:
            return None
        why = "; ".join(filter(None, map(_why_pending, pods))) or "its Job could make no pod"
        return f"its pod did not start within {self._start_seconds:.0f} seconds (POD_START_SECONDS): {why}"


def _namespace(context: StepHandlerContext) -> str:
    launcher: Any = context.instance.run_launcher
    return str(launcher.get_container_context_for_run(context.dagster_run).namespace)


def _selector(context: StepHandlerContext) -> str:
    [step] = context.execute_step_args.step_keys_to_execute or []
    return f"dagster/run-id={context.dagster_run.run_id},dagster/op={sanitize_k8s_label(step)}"


def _why_pending(pod: V1Pod) -> str | None:
    for status in pod.status.container_statuses or []:
        if status.state and status.state.waiting:
            return f"{status.state.waiting.reason}: {status.state.waiting.message}"
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{condition.reason}: {condition.message}"
    return None


def _why_ended(pod: V1Pod) -> str | None:
    """What its container's end tells, such as OOMKilled."""
    for status in pod.status.container_statuses or []:
        ended = status.state and status.state.terminated
        if ended and ended.exit_code:
            return f"{pod.metadata.name}: {ended.reason}, exit code {ended.exit_code}"
    return None


def _patiently(call: Callable[[], Answer]) -> Answer:
    """Call the API; a server that is away is waited for.

    Raises:
        ApiException: the server refuses the call.
        HTTPError: the server has been away for too long.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return call()
        except (ApiException, HTTPError) as error:
            refused = isinstance(error, ApiException) and error.status is not None and error.status < 500
            if refused or time.monotonic() > deadline:
                raise
            _logger.warning("the Kubernetes API does not answer: %s", error)
        time.sleep(_POLL_SECONDS)
