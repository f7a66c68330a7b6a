"""The real launcher and executor run the real graph on a Kubernetes API as strict as the real one."""

from __future__ import annotations

import dagster as dg
import pytest

from finetune.base_model.models import BaseModelRef
from tests.e2e.conftest import data_root
from tests.kubernetes.aftermath import assert_nothing_is_wrong, rows
from tests.kubernetes.deployment import IMAGE, STEP, TRAIN_IMAGE, Deployment

pytestmark = pytest.mark.e2e
ON_GPUS = {"brain__adapter", "brain__eval_report"}
IN_TRAINING_IMAGE = {*ON_GPUS, "brain__merged_model", "brain__merged_model_merged_equals_base_plus_adapter"}


def test_the_graph_runs_to_success_although_the_pod_that_trains_is_deleted(tiny_model: BaseModelRef) -> None:
    settings = {"EXPORT_TARGETS": "vllm", "CHECKPOINT_SECONDS": "1", "TRAIN_EPOCHS": "2"}
    with data_root() as root:
        deployment = Deployment(root, tiny_model, settings)
        with deployment.running():
            run_id = deployment.launch()
            pod = deployment.training(run_id)
            deployment.cluster.delete_pod(pod)
            runs = deployment.wait(run_id, 900)

            assert [run.status for run in runs] == [dg.DagsterRunStatus.SUCCESS], deployment.report()
            first, second = deployment.history(STEP)
            assert "deletionTimestamp" in first.pod["metadata"], "otherwise the fault did not strike"
            assert "deletionTimestamp" not in second.pod["metadata"]
            assert deployment.result().resumed_from_step > 0
            [row] = rows(deployment)
            assert (row.status, row.attempts) == ("COMPLETED", 2)
            assert_nothing_is_wrong(deployment, runs)
            assert_each_step_got_what_it_asks_for(deployment)


def assert_each_step_got_what_it_asks_for(deployment: Deployment) -> None:
    steps = {
        pod.labels["dagster/op"]: pod.pod for pod in deployment.cluster.history.values() if "dagster/op" in pod.labels
    }
    assert len(steps) == 14
    for name, pod in steps.items():
        [container] = pod["spec"]["containers"]
        assert pod["spec"]["nodeName"].startswith("gpu-") == (name in ON_GPUS), name
        assert container["image"] == (TRAIN_IMAGE if name in IN_TRAINING_IMAGE else IMAGE), name
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        # A step has no business with the cluster: no token is mounted.
        assert pod["spec"]["automountServiceAccountToken"] is False
    for job in deployment.cluster.jobs():
        assert job["spec"]["backoffLimit"] == 0
        assert job["spec"]["ttlSecondsAfterFinished"] == 86400
        is_step = "dagster/op" in job["metadata"]["labels"]
        assert bool(job["metadata"].get("ownerReferences")) == is_step
