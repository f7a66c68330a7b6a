"""Steps on a GPU wait for each other across runs, as many at once as there are GPUs."""

import threading
import time
from pathlib import Path

import dagster as dg
import pytest

from lora_assets.run_queue import limit_gpu_pool


@pytest.mark.parametrize("gpus", [1, 2])
def test_as_many_steps_compute_at_once_as_there_are_gpus_and_no_more(tmp_path: Path, gpus: int) -> None:
    inside, most = 0, 0
    lock, together = threading.Lock(), threading.Barrier(gpus)

    @dg.op(pool="gpu")
    def compute() -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        together.wait(60)
        # Another run would begin meanwhile, if it were let.
        time.sleep(1)
        with lock:
            inside -= 1

    @dg.job
    def train() -> None:
        compute()

    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        limit_gpu_pool(instance, gpus)
        results: list[bool] = []
        runs = [
            threading.Thread(target=lambda: results.append(train.execute_in_process(instance=instance).success))
            for _ in range(2)
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join(120)
        assert results == [True, True]
        assert most == gpus
        assert not instance.event_log_storage.get_concurrency_info("gpu").claimed_slots
