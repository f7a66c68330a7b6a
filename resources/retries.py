"""Which steps are tried again, and when: those that failed by an error that may pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from finetune.errors import PermanentError

# Pauses of 10 and 30 seconds: a server that starts anew is back by then, and a run is not held up for long.
RETRY_POLICY = dg.RetryPolicy(max_retries=2, delay=10, backoff=dg.Backoff.EXPONENTIAL)


@contextmanager
def no_retry_if_permanent() -> Iterator[None]:
    """End the step at once where trying again cannot help; passing errors are left to its retry policy."""
    try:
        yield
    except PermanentError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
