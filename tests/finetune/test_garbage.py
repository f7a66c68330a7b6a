"""Each rule of the collection removes what it is for, and nothing that anybody may need."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.adapter_files import adapter_hash
from finetune.errors import ArtifactError, TransientError
from finetune.garbage import find_garbage, remove_garbage
from finetune.layout import DataLayout
from finetune.publishing import publish_directory, read_manifest
from finetune.registry.promotion import promote
from finetune.registry.store import collect_garbage, list_versions, register_adapter, verify_version

DAYS = 14
Found = Callable[..., set[str]]


@pytest.fixture
def layout(tmp_path: Path) -> DataLayout:
    return DataLayout(tmp_path)


@pytest.fixture
def found(layout: DataLayout) -> Found:
    """What is found, as paths below the data root."""

    def find(keep: int = 1, live: tuple[str, ...] = (), busy: bool = False) -> set[str]:
        garbage = find_garbage(layout.root, keep=keep, days=DAYS, live=frozenset(live), busy=busy)
        return {str(each.path.relative_to(layout.root)) for each in garbage}

    return find


def aged(path: Path, days: float) -> Path:
    then = time.time() - days * 24 * 3600
    for each in [*path.rglob("*"), path]:
        os.utime(each, (then, then))
    return path


def made(path: Path, days: float = 0, kind: str = "thing") -> Path:
    with publish_directory(path, kind=kind) as staging:
        (staging.path / "file").write_bytes(b"x" * 1000)
    return aged(path, days)


def version(layout: DataLayout, run_id: str, days: float = 30, pipeline: str = "brain") -> None:
    """A registered adapter with all its exports."""
    from safetensors.numpy import save_file

    own = DataLayout(layout.root, pipeline)
    adapter = own.adapter(run_id)
    with publish_directory(adapter, kind="adapter") as staging:
        weights = np.random.default_rng(abs(hash(run_id))).normal(size=(4, 4))
        save_file({"base_model.model.l.lora_A.weight": weights}, staging.path / "adapter_model.safetensors")
        (staging.path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    facts: dict[str, Any] = {"trial_id": "t", "metrics": {}, "tags": {}, "lineage": {}}
    register_adapter(own.registry, adapter_path=adapter, adapter_hash=adapter_hash(adapter), run_id=run_id, **facts)
    for part in ("evaluation", "merged", "gguf", "ollama", "lmstudio"):
        made(layout.model(run_id, part), days)
    aged(adapter, days)


def remove(layout: DataLayout, **changes: Any) -> list[str]:
    garbage = find_garbage(layout.root, **{"keep": 1, "days": DAYS, "live": frozenset()} | changes)
    return [each.rule for each in remove_garbage(garbage, hold=lambda run_id: nullcontext())]


EXPORTS = {"merged", "gguf", "ollama", "lmstudio"}


def exports(run_id: str) -> set[str]:
    return {f"models/{run_id}/{part}" for part in EXPORTS}


def test_what_killed_writers_left_goes_after_a_day_wherever_it_lies(layout: DataLayout, found: Found) -> None:
    dead = [
        "prepared/brain/2026-06-01/.abc.tmp-12-0af3",
        "prepared/brain/.index/.abc.tmp-12-0af3",
        "adapters/brain/.r1.tmp-12-0af3",
        "registry/brain/.v1.tmp-12-0af3",
        "models/r1/.merged.tmp-12-0af3",
        "assets/brain/adapter/.2026-06-01.json.tmp-12-0af3",
        "work/r1/.h2o.json.tmp-12-0af3",
        "base_models/.embedded-ab.tmp-12-0af3",
        "base_models/gguf/.ab.tmp-12-0af3",
    ]
    # Others' names that look alike, locks, and what lies where we never write.
    kept = [
        "prepared/brain/2026-06-01/.notes",
        "registry/brain/.tmp-mine",
        "models/r1/merged.tmp-12-0af3",
        "base_models/.embedded-ab.lock",
        "base_models/hub/.x.tmp-12-0af3",
        "datasets/brain/.brain_dataset.tmp-12-0af3",
        "postgres/.x.tmp-12-0af3",
    ]
    for name in dead + kept:
        (layout.root / name).mkdir(parents=True)
        (layout.root / name / "half").write_text("half")
        aged(layout.root / name, 1.1)
    assert found() == set(dead)
    os.utime(layout.root / dead[0] / "half")
    assert found() == set(dead[1:]), "its writer is at work: a file grows, which does not change the directory"
    assert remove(layout) == ["temporary"] * 8
    assert all((layout.root / name).exists() for name in [*kept, dead[0]])
    assert found() == set()


def test_checkpoints_go_when_their_training_is_done_and_stay_while_it_may_go_on(
    layout: DataLayout, found: Found
) -> None:
    for run_id in ("done", "failed", "live", "old", "old-live"):
        made(layout.work(run_id) / "checkpoints" / "checkpoint-5")
        (layout.work(run_id) / "training_log.jsonl").write_text("{}")
    for run_id in ("done", "live"):
        made(layout.adapter(run_id))
    for run_id in ("old", "old-live"):
        aged(layout.work(run_id), DAYS + 1)
    aged(layout.work("failed"), DAYS - 1)
    assert found(live=("live", "old-live")) == {"work/done/checkpoints", "work/old"}
    remove(layout, live=frozenset({"live", "old-live"}))
    assert (layout.work("done") / "training_log.jsonl").exists()
    assert sorted(path.name for path in (layout.root / "work").iterdir()) == ["done", "failed", "live", "old-live"]


def test_exports_stay_of_the_newest_of_those_that_reigned_and_of_the_living(layout: DataLayout, found: Found) -> None:
    for run_id in ("r1", "r2", "r3", "r4", "r5"):
        version(layout, run_id)
    promote(layout.registry, "v1", reason="first", by="test")
    promote(layout.registry, "v3", reason="better", by="test")
    assert found() == exports("r1") | exports("r2") | exports("r4"), "v3 reigns, v5 is the newest"
    assert found(keep=2) == exports("r2"), "and v1, to which a rollback leads, and v4"
    assert found(live=("r1",)) == exports("r2") | exports("r4")
    assert found(busy=True) == set(), "a run may read whatever exports there are"
    aged(layout.model("r2", "gguf"), DAYS - 1)
    assert found(keep=2) == exports("r2") - {"models/r2/gguf"}
    remove(layout, keep=2)
    assert sorted(path.name for path in (layout.root / "models" / "r2").iterdir()) == ["evaluation", "gguf"]
    for run_id in ("r1", "r3", "r4", "r5"):
        for part in EXPORTS:
            read_manifest(layout.model(run_id, part), verify="hashes")


def test_pipelines_that_share_a_data_root_keep_their_own(layout: DataLayout, found: Found) -> None:
    version(layout, "r1")
    version(layout, "other", pipeline="second")
    assert found() == set()
    made(layout.model("nobodys", "gguf"), 30)
    assert found() == {"models/nobodys/gguf"}


def test_adapters_go_that_are_of_no_version_and_versions_are_never_touched(layout: DataLayout, found: Found) -> None:
    for run_id in ("r1", "r2", "r3"):
        version(layout, run_id)
    made(layout.adapter("never-registered"), DAYS + 1)
    made(layout.adapter("being-evaluated"), DAYS - 1)
    promote(layout.registry, "v3", reason="best", by="test")
    collect_garbage(layout.registry, keep=1, by="test")
    assert [each.status for each in list_versions(layout.registry)] == ["collected", "collected", "champion"]
    adapters = {name for name in found(keep=9) if name.startswith("adapters")}
    assert adapters == {"adapters/brain/r1", "adapters/brain/r2", "adapters/brain/never-registered"}
    assert not any(name.startswith("adapters") for name in found(live=("r1", "r2", "never-registered")))
    before = sorted(path for path in layout.registry.rglob("*"))
    remove(layout)
    assert sorted(path for path in layout.registry.rglob("*")) == before
    assert verify_version(layout.registry, "v3").status == "champion"
    assert sorted(path.name for path in (layout.root / "adapters" / "brain").iterdir()) == ["being-evaluated", "r3"]


def test_the_adapter_of_a_curriculum_stays_with_its_report_and_those_of_its_stages_go(
    layout: DataLayout, found: Found
) -> None:
    version(layout, "r1")
    for name in ("curriculum-1a2b", "20260601-stage"):
        made(layout.adapter(name), 20)
    report = made(layout.experiment("curriculum-1a2b"), 20)
    assert {name for name in found() if name.startswith("adapters")} == {"adapters/brain/20260601-stage"}
    report.rename(report.with_name("elsewhere"))
    assert "adapters/brain/curriculum-1a2b" in found()


def test_while_a_registry_is_away_nothing_goes_that_its_versions_may_need(layout: DataLayout, found: Found) -> None:
    for run_id in ("r1", "r2"):
        version(layout, run_id)
    version(layout, "other", pipeline="finance")
    assert found() == {f"models/r1/{part}" for part in EXPORTS}
    layout.registry.rename(layout.root / "elsewhere")
    assert found() == set()
    (layout.root / "elsewhere").rename(layout.registry)
    assert found() == {f"models/r1/{part}" for part in EXPORTS}


def test_an_index_goes_when_nobody_used_it_for_long_and_prepared_datasets_never_do(
    layout: DataLayout, found: Found
) -> None:
    index = layout.root / "prepared" / "brain" / ".index"
    made(index / "old", DAYS + 1)
    made(index / "used", DAYS - 1)
    made(layout.prepared("2026-06-01", "abc"), 300)
    assert found() == {"prepared/brain/.index/old"}


def test_values_between_steps_go_with_age_and_the_assets_own_never_do(layout: DataLayout, found: Found) -> None:
    for name, days in {".steps/old": DAYS + 1, ".steps/new": DAYS - 1, "brain/adapter": 300.0}.items():
        path = layout.asset_values / name
        path.mkdir(parents=True)
        (path / "value.json").write_text("{}")
        aged(path, days)
    assert found() == {"assets/.steps/old"}


def test_a_preparation_renews_the_age_of_the_indexes_that_it_uses(layout: DataLayout) -> None:
    from finetune.dataset.discovery import discover_exports
    from finetune.dataset.parameters import PrepareParameters
    from finetune.dataset.prepare import prepare_dataset

    layout.exports.mkdir(parents=True)
    lines = "".join(f'{{"instruction": "Say {n}", "output": "{n}"}}\n' for n in range(40))
    (layout.exports / "brain_dataset_2026-06-01.jsonl").write_text(lines)
    for fraction in (0.2, 0.3):
        files = discover_exports(layout.exports, "*.jsonl")
        parameters = PrepareParameters(eval_fraction=fraction)
        prepare_dataset(files, date="2026-06-01", layout=layout, parameters=parameters)
        [index] = (layout.root / "prepared" / "brain" / ".index").iterdir()
        assert time.time() - index.stat().st_mtime < 60
        aged(index, 100)


def test_what_somebody_takes_up_meanwhile_stays_and_the_rest_goes(layout: DataLayout) -> None:
    for run_id in ("taken", "free"):
        aged(made(layout.work(run_id) / "checkpoints").parent, 100)
    held: list[str] = []

    @contextmanager
    def hold(run_id: str) -> Iterator[None]:
        held.append(run_id)
        if run_id == "taken":
            raise TransientError("another process trains this")
        yield

    garbage = find_garbage(layout.root, keep=1, days=DAYS, live=frozenset())
    assert [each.run_id for each in remove_garbage(garbage, hold=hold)] == ["free"]
    assert sorted(held) == ["free", "taken"]
    assert (layout.work("taken") / "checkpoints" / "manifest.json").exists()


def test_nothing_is_collected_where_a_registry_cannot_be_read(layout: DataLayout) -> None:
    version(layout, "r1")
    (layout.registry / "v1" / "experiment_manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="v1"):
        find_garbage(layout.root, keep=1, days=DAYS, live=frozenset())


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from finetune import publishing
from finetune.publishing import withdraw
shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
withdraw(Path(sys.argv[1]))
"""


def test_a_collection_that_is_killed_leaves_nothing_half_and_the_next_one_ends_it(
    layout: DataLayout, found: Found
) -> None:
    path = made(layout.model("nobodys", "gguf"), 30)
    done = subprocess.run([sys.executable, "-c", KILLED, path], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -9, "otherwise the fault did not strike"
    assert not path.exists(), "for readers it is gone as a whole"
    [left] = found()
    assert left.startswith("models/nobodys/.gguf.tmp-")
    assert remove(layout) == ["temporary"]
    assert remove(layout) == []


def test_bytes_that_are_linked_from_elsewhere_are_not_counted_as_freed(layout: DataLayout) -> None:
    path = made(layout.model("nobodys", "lmstudio"), 30)
    own = sum(file.stat().st_size for file in path.iterdir())
    os.link(path / "file", layout.root / "linked")
    [garbage] = find_garbage(layout.root, keep=1, days=DAYS, live=frozenset())
    assert garbage.size == own - 1000
