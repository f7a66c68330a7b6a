"""`lora-assets trainjob`: a training on several machines of a cluster, for `kubectl apply`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
import yaml

from finetune.training.models import Sharding
from lora_assets.cli.console import plain_errors
from lora_assets.kubeflow import train_job


@plain_errors
def trainjob(
    name: Annotated[str, typer.Option(help="Name of the TrainJob.")],
    image: Annotated[str, typer.Option(help="Image with lora-assets[train].")],
    base_model: Annotated[str, typer.Option("--base-model", help="As for train; a directory lies under /data.")],
    dataset: Annotated[str, typer.Option("--dataset", help="Records under /data, as JSONL.")],
    output: Annotated[str, typer.Option("--output", help="Directory under /data that is made.")],
    plan: Annotated[
        str | None, typer.Option(help="JSON of `plan --json` under /data; without it, one is made.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 2,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each machine; 0 trains on CPUs.")] = 1,
    cpu: Annotated[str, typer.Option(help="Cores of each pod.")] = "8",
    memory: Annotated[str, typer.Option(help="Memory of each pod.")] = "64Gi",
    claim: Annotated[str, typer.Option(help="ReadWriteMany volume claim that is /data in every pod.")] = "lora-assets",
    sharding: Annotated[Sharding, typer.Option(help="TRAIN_SHARDING of the pods.")] = "ddp",
    variable: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the pods; may be repeated.")] = None,
) -> None:
    """Print a Kubeflow TrainJob that runs `train` on several machines: pipe it to `kubectl apply -f -`."""
    command = ["lora-assets", "train", "--base-model", base_model, "--dataset", dataset, "--output", output]
    given = dict(text.split("=", 1) for text in variable or [])
    manifest = train_job(
        name=name,
        image=image,
        command=[*command, *(["--plan", plan] if plan else [])],
        nodes=nodes,
        gpus=gpus,
        cpu=cpu,
        memory=memory,
        claim=claim,
        environment={"DATA_ROOT": "/data", "TRAIN_SHARDING": sharding, **given},
    )
    yaml.safe_dump(manifest, sys.stdout, sort_keys=False)
