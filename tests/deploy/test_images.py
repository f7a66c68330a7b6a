"""The Dockerfiles, read: images cannot be built here."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lora_assets.cli.demo import EXAMPLES
from tests.deploy.manifests import ROOT
from tests.e2e.conftest import Loop

DOCKERFILES = [ROOT / "deploy" / "Dockerfile", ROOT / "deploy" / "h2o-gateway" / "Dockerfile"]
Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """Keyword and arguments of each instruction, its lines joined, without comments."""
    kept = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(kept))
    return [(line.split()[0].upper(), line.split(None, 1)[1]) for line in joined.splitlines()]


def stages(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each stage, by its name or its image."""
    found: dict[str, list[Instruction]] = {}
    for keyword, arguments in instructions(text):
        if keyword == "FROM":
            name = arguments.split()[-1]
            found[name] = []
        found[name].append((keyword, arguments))
    return found


def problems(text: str) -> list[str]:
    """What a reviewer would refuse."""
    found = []
    names = set(stages(text))
    sources = [arguments.split()[0] for keyword, arguments in instructions(text) if keyword == "FROM"]
    sources += re.findall(r"--from=(\S+)", text)
    pinned = re.compile(r"(:v?\d+\.\d+(\.\d+)?[\w.-]*|@sha256:[0-9a-f]{64})$")
    found += [f"not pinned: {source}" for source in sources if source not in names and not pinned.search(source)]
    for keyword, arguments in instructions(text):
        if keyword == "ADD":
            found.append("ADD: COPY says what it does")
        if keyword in {"ENV", "ARG"}:
            found += [
                f"a secret: {name}" for name in re.findall(r"\w*(?:TOKEN|PASSWORD|SECRET|API_KEY)\b(?==)", arguments)
            ]
        if re.search(r"\bcurl\b.*\|\s*(ba)?sh|\bsudo\b|chmod (-R )?777", arguments):
            found.append(f"unsafe: {arguments[:60]}")
        if "pip install" in arguments and not re.search(r"-c \S+|==", arguments):
            found.append(f"versions are not pinned: {arguments[:80]}")
    last = list(stages(text).values())[-1]
    users = [arguments for keyword, arguments in last if keyword == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        found.append("runs as root, or as a user whose number Kubernetes cannot see")
    if not any(keyword == "HEALTHCHECK" for keyword, _ in last):
        found.append("no health command")
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_nothing_is_to_be_refused(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("python:3.11.14-slim-bookworm AS package", "python AS package", "not pinned: python"),
        ("nvidia/cuda:13.0.2-base-ubuntu24.04", "nvidia/cuda:latest", "not pinned: nvidia/cuda:latest"),
        ("--from=package /dist", "--from=wheels /dist", "not pinned: wheels"),
        ("COPY sensors sensors", "ADD sensors sensors", "ADD"),
        ("USER=lora", "HF_TOKEN=hf_x", "a secret: HF_TOKEN"),
        ("-c /constraints/constraints-images.txt setuptools uv", "setuptools uv", "versions are not pinned"),
        ("USER 1000:1000", "USER root", "runs as root"),
        ("HEALTHCHECK", "LABEL health=", "no health command"),
    ],
)
def test_what_is_to_be_refused_is_seen(old: str, new: str, told: str) -> None:
    text = DOCKERFILES[0].read_text(encoding="utf-8")
    assert old in text
    assert any(told in problem for problem in problems(text.replace(old, new)))


def test_two_targets_share_their_settings_and_differ_in_what_trains() -> None:
    found = stages(DOCKERFILES[0].read_text(encoding="utf-8"))
    assert {"slim", "train"} < set(found)

    def of(stage: str, keyword: str) -> list[str]:
        return [arguments for each, arguments in found[stage] if each == keyword]

    for keyword in ("USER", "WORKDIR", "EXPOSE", "HEALTHCHECK", "CMD"):
        assert of("slim", keyword) == of("train", keyword), keyword
    environments = [set(" ".join(of(stage, "ENV")).split()) for stage in ("slim", "train")]
    assert environments[1] - environments[0] == {"TRITON_CACHE_DIR=/tmp/triton"}
    assert environments[0] <= environments[1]
    # A read-only root file system: what is written goes to these two.
    assert {"HOME=/tmp", "TMPDIR=/tmp", "DATA_ROOT=/data"} <= environments[0]
    installed = {stage: " ".join(of(stage, "RUN")) for stage in ("slim", "train")}
    assert "[train]" in installed["train"]
    assert "[train]" not in installed["slim"]
    assert "torch.version.cuda" in installed["train"]
    for stage in ("slim", "train"):
        labels = " ".join(of(stage, "LABEL"))
        assert all(f"org.opencontainers.image.{name}=" in labels for name in ("title", "version", "licenses"))
        json.loads(of(stage, "CMD")[0])


def test_the_version_is_that_of_the_package_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    told = {found for text in texts for found in re.findall(r"lora-assets:([\d.]+)-(?:slim|train)", text)}
    told |= {found for text in texts for found in re.findall(r'image\.version="([^"]+)"', text)}
    told |= set(re.findall(r"lora-assets:([\d.]+)-slim", (ROOT / "dagster_cloud.yaml").read_text(encoding="utf-8")))
    assert told == {version}


def test_cudas_libraries_are_those_of_the_pinned_pytorch() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return dict(line.split("==") for line in lines if "==" in line)

    ours, images = pins("constraints.txt"), pins("deploy/constraints-images.txt")
    assert not {name.lower() for name in ours} & {name.lower() for name in images}
    assert images["cuda-toolkit"].startswith("13.0."), "the base image and PyTorch are of CUDA 13.0"
    assert "nvidia/cuda:13.0." in DOCKERFILES[0].read_text(encoding="utf-8")
    assert ours["torch"].startswith("2.13.")


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path from the build: the last line that matches it or a parent decides."""
    parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    verdict = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        names = parents + ([Path(each).name for each in parents] if "**/" in line else [])
        if any(fnmatch.fnmatch(each, pattern) for each in names):
            verdict = not line.startswith("!")
    return verdict


def test_the_build_gets_what_it_copies_and_no_secret() -> None:
    for path in (
        ".env",
        "lora_assets/.env",
        "data/x",
        ".git/config",
        "tests/conftest.py",
        "lora_assets/x.pyc",
        ".venv/x",
    ):
        assert ignored(path), path
    for dockerfile in DOCKERFILES:
        for keyword, arguments in instructions(dockerfile.read_text(encoding="utf-8")):
            if keyword == "COPY" and "--from" not in arguments:
                for source in arguments.split()[:-1]:
                    assert (ROOT / source).exists(), source
                    assert not ignored(source), source
    tracked = subprocess.run(
        ["git", "ls-files", "finetune", "lora_assets", "resources", "sensors", "h2o_gateway"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert [path for path in tracked if ignored(path)] == []


# What the slim image lacks, and each import of it a failure.
WITHOUT = """
import sys
for name in ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate", "safetensors", "gguf",
             "xllamacpp", "sentencepiece", "tensorboard"):
    sys.modules[name] = None
import dagster as dg
from lora_assets.definitions import defs
from lora_assets.partitions import dataset_dates
with dg.DagsterInstance.ephemeral() as instance:
    instance.add_dynamic_partitions(dataset_dates.name, ["2026-06-01"])
    result = defs.resolve_job_def("train_and_export").execute_in_process(
        instance=instance,
        partition_key="2026-06-01",
        asset_selection=[
            dg.AssetKey(["brain", name]) for name in ("merged_dataset", "dataset_profile", "training_plan")
        ],
        raise_on_error=False,
    )
    failed = [str(event.step_failure_data.error) for event in result.all_events if event.is_step_failure]
    assert result.success, failed
    print(len([event for event in result.all_events if event.is_step_success]))
"""


def test_the_dataset_steps_run_without_what_the_slim_image_lacks(loop: Loop) -> None:
    loop.layout.exports.mkdir(parents=True)
    for file in EXAMPLES.glob("*2026-06-01*"):
        shutil.copy(file, loop.layout.exports)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=loop.environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 6, "three assets and their checks"
