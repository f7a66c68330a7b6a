"""Which steps are tried again, and when: those that failed by an error that may pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from finetune.errors import PermanentError

# Pauses of 10 and 30 seconds: a server that starts anew is back by then, and a run is not held up for long.
RETRY_POLICY = dg.RetryPolicy(max_retries=2, delay=10, backoff=dg.Backoff.EXPONENTIAL)
# Of the runs that happen in the process of a command.
_ENTRY = "lora-assets/entry"


@contextmanager
def no_retry_if_permanent() -> Iterator[None]:
    """End the step at once where trying again cannot help; passing errors are left to its retry policy.

    A step whose process is asked to end, though nobody has cancelled its run, is tried again too: its pod was
    deleted, or its node is drained. To Dagster alone, that would be the end of the run.
    """
    try:
        yield
    except PermanentError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
    except dg.DagsterExecutionInterruptedError as error:
        context = dg.AssetExecutionContext.get()
        run = context.instance.get_run_by_id(context.run.run_id)
        # (Ctrl-C on `lora-assets run` means it.)
        if run is None or run.status != dg.DagsterRunStatus.STARTED or _ENTRY in run.tags:
            raise
        raise dg.RetryRequested(RETRY_POLICY.max_retries, RETRY_POLICY.delay) from error
