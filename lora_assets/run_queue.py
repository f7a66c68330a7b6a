"""The queue of runs on one machine: runs that came without a place in it get theirs from their dataset date."""

import contextlib

import dagster as dg

from sensors.priority import PRIORITY_TAG, Origin, priority_tags


class DatedRunQueue(dg.QueuedRunCoordinator):
    """Dagster's own queue; of a backfill the newest date goes first, and what a person asks for before that."""

    def submit_run(self, context: dg.SubmitRunContext) -> dg.DagsterRun:
        """Tag a run of one dataset date with its priority, unless it has one, and queue it."""
        run = context.dagster_run
        if PRIORITY_TAG not in run.tags:
            origin: Origin = "backfill" if "dagster/backfill" in run.tags else "arrival"
            # Runs of no partition, or of several at once, keep Dagster's priority of 0.
            with contextlib.suppress(KeyError, ValueError):
                self._instance.add_run_tags(run.run_id, priority_tags(origin, run.tags["dagster/partition"]))
        return super().submit_run(context)


def limit_gpu_pool(instance: dg.DagsterInstance, gpus: int) -> None:
    """Let so many steps of the pool ``gpu`` run at once, over all runs and processes on this instance."""
    instance.event_log_storage.set_concurrency_slots("gpu", gpus)
