# ruff: noqa: N815 - the chart's own names
"""The values of Dagster's chart 1.13 that we set, as strict models written after the schema that it publishes.

The chart's own schema lets most misspelt names pass; here a name that is none of these fails.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tests.deploy.manifests import check

Objects = list[dict[str, Any]]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Image(Strict):
    repository: str
    tag: str
    pullPolicy: Literal["Always", "IfNotPresent", "Never"]


class Named(Strict):
    name: str


class Enabled(Strict):
    enabled: bool


class Container(Strict):
    """What a role's pod is made of; Kubernetes' own schema judges the parts that the chart copies into it."""

    image: Image
    podSecurityContext: dict[str, Any]
    securityContext: dict[str, Any]
    resources: dict[str, Any]
    volumes: Objects
    volumeMounts: Objects

    def model_post_init(self, _: Any) -> None:
        check(
            pod(
                self.podSecurityContext,
                self.volumes,
                securityContext=self.securityContext,
                resources=self.resources,
                volumeMounts=self.volumeMounts,
            )
        )


def pod(security: dict[str, Any], volumes: Objects, **container: Any) -> dict[str, Any]:
    """A pod with one container."""
    containers = [{"name": "it", "image": "it:1", **container}]
    spec = {"securityContext": security, "volumes": volumes, "containers": containers}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "it"}, "spec": spec}


class Webserver(Container):
    replicaCount: int


class RunMonitoring(Strict):
    enabled: bool
    pollIntervalSeconds: int
    startTimeoutSeconds: int
    cancelTimeoutSeconds: int
    maxResumeRunAttempts: int
    freeSlotsAfterRunEndSeconds: int


class RunRetries(Strict):
    enabled: bool
    maxRetries: int
    retryOnAssetOrOpFailure: bool


class Configurable(Strict):
    module: str
    name: str = Field(alias="class")
    config: dict[str, Any]


class RunCoordinatorConfig(Strict):
    customRunCoordinator: Configurable


class RunCoordinator(Strict):
    enabled: bool
    type: Literal["CustomRunCoordinator"]
    config: RunCoordinatorConfig


class Daemon(Container):
    enabled: bool
    runCoordinator: RunCoordinator
    runMonitoring: RunMonitoring
    runRetries: RunRetries


class Runs(Strict):
    maxConcurrentRuns: int


class Pools(Strict):
    defaultLimit: int
    granularity: Literal["op", "run"]


class Concurrency(Strict):
    enabled: bool
    runs: Runs
    pools: Pools


class PodSpec(Strict):
    securityContext: dict[str, Any]


class JobSpec(Strict):
    backoffLimit: int
    ttlSecondsAfterFinished: int


class RunK8sConfig(Strict):
    podSpecConfig: PodSpec
    jobSpecConfig: JobSpec


class K8sRunLauncher(Strict):
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"]
    loadInclusterConfig: bool
    envConfigMaps: list[Named]
    envSecrets: list[Named]
    volumes: Objects
    volumeMounts: Objects
    resources: dict[str, Any]
    securityContext: dict[str, Any]
    runK8sConfig: RunK8sConfig

    def model_post_init(self, _: Any) -> None:
        check(
            pod(
                self.runK8sConfig.podSpecConfig.securityContext,
                self.volumes,
                securityContext=self.securityContext,
                resources=self.resources,
                volumeMounts=self.volumeMounts,
            )
        )


class RunLauncherConfig(Strict):
    k8sRunLauncher: K8sRunLauncher


class RunLauncher(Strict):
    type: Literal["K8sRunLauncher"]
    config: RunLauncherConfig


class ServiceAccount(Strict):
    create: bool
    name: str


class UserDeployment(Container):
    name: str
    dagsterApiGrpcArgs: list[str]
    port: int
    includeConfigInLaunchedRuns: Enabled
    envConfigMaps: list[Named]
    envSecrets: list[Named]


class UserDeployments(Strict):
    enabled: bool
    rbacEnabled: bool
    serviceAccount: ServiceAccount
    deployments: list[UserDeployment]


class Port(Strict):
    port: int


class Postgresql(Strict):
    enabled: bool
    image: Image
    postgresqlHost: str
    postgresqlUsername: str
    postgresqlDatabase: str
    service: Port


class Global(Strict):
    postgresqlSecretName: str
    dagsterHome: str


class ComputeLogManager(Strict):
    type: Literal["NoOpComputeLogManager"]


class Handler(Strict):
    name: Literal["lora_assets.logs.RunLines"] = Field(alias="class")


class HandlerConfig(Strict):
    handlers: dict[Literal["lines"], Handler]


class PythonLogs(Strict):
    managedPythonLoggers: list[Literal["finetune", "resources"]]
    dagsterHandlerConfig: HandlerConfig


class InstanceConfig(Strict):
    nux: Enabled


class Values(Strict):
    rbacEnabled: bool
    serviceAccount: ServiceAccount
    globals: Global = Field(alias="global")
    generatePostgresqlPasswordSecret: bool
    postgresql: Postgresql
    rabbitmq: Enabled
    redis: Enabled
    flower: Enabled
    telemetry: Enabled
    dagsterWebserver: Webserver
    dagsterDaemon: Daemon
    concurrency: Concurrency
    runLauncher: RunLauncher
    computeLogManager: ComputeLogManager
    pythonLogs: PythonLogs
    additionalInstanceConfig: InstanceConfig
    user_deployments: UserDeployments = Field(alias="dagster-user-deployments")

    @field_validator("user_deployments")
    @classmethod
    def _named_once(cls, value: UserDeployments) -> UserDeployments:
        assert len({each.name for each in value.deployments}) == len(value.deployments)
        return value

    def instance(self) -> dict[str, Any]:
        """What the chart writes into dagster.yaml of them."""
        monitoring, retries = self.dagsterDaemon.runMonitoring, self.dagsterDaemon.runRetries
        return {
            "telemetry": self.telemetry.model_dump(),
            "nux": self.additionalInstanceConfig.nux.model_dump(),
            "run_monitoring": {
                "enabled": monitoring.enabled,
                "poll_interval_seconds": monitoring.pollIntervalSeconds,
                "start_timeout_seconds": monitoring.startTimeoutSeconds,
                "cancel_timeout_seconds": monitoring.cancelTimeoutSeconds,
                "max_resume_run_attempts": monitoring.maxResumeRunAttempts,
                "free_slots_after_run_end_seconds": monitoring.freeSlotsAfterRunEndSeconds,
            },
            "run_retries": {
                "enabled": retries.enabled,
                "max_retries": retries.maxRetries,
                "retry_on_asset_or_op_failure": retries.retryOnAssetOrOpFailure,
            },
            "python_logs": {
                "managed_python_loggers": self.pythonLogs.managedPythonLoggers,
                "dagster_handler_config": self.pythonLogs.dagsterHandlerConfig.model_dump(by_alias=True),
            },
            "concurrency": {
                "runs": {"max_concurrent_runs": self.concurrency.runs.maxConcurrentRuns},
                "pools": {
                    "default_limit": self.concurrency.pools.defaultLimit,
                    "granularity": self.concurrency.pools.granularity,
                },
            },
        }

    def launcher(self) -> dict[str, Any]:
        """What the chart writes into the run launcher's config of them, as the launcher itself spells it."""
        from dagster_k8s.models import k8s_snake_case_dict
        from kubernetes import client

        launcher = self.runLauncher.config.k8sRunLauncher
        run = launcher.runK8sConfig
        return {
            "load_incluster_config": launcher.loadInclusterConfig,
            "env_config_maps": [each.name for each in launcher.envConfigMaps],
            "env_secrets": [each.name for each in launcher.envSecrets],
            "volumes": [k8s_snake_case_dict(client.V1Volume, each) for each in launcher.volumes],
            "volume_mounts": [k8s_snake_case_dict(client.V1VolumeMount, each) for each in launcher.volumeMounts],
            "resources": launcher.resources,
            "security_context": k8s_snake_case_dict(client.V1SecurityContext, launcher.securityContext),
            "run_k8s_config": {
                "pod_spec_config": k8s_snake_case_dict(client.V1PodSpec, run.podSpecConfig.model_dump()),
                "job_spec_config": k8s_snake_case_dict(client.V1JobSpec, run.jobSpecConfig.model_dump()),
            },
        }
