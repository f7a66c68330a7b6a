"""The experiments in PostgreSQL, by Optuna's storage.

Optuna's tables lie in a schema of their own in the run log's database, so that its own tools read them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from finetune.errors import ConfigurationError
from finetune.planning.models import Range
from finetune.search.pruning import pruner_of
from finetune.search.spec import ExperimentSpec, spec_of
from resources.database import Execute
from resources.experiment import Experiment, storage_fault_named
from resources.lease import LEASE_SECONDS, has_ended
from resources.run_log import RunLog

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

SCHEMA = "optuna"
# The study's user attribute that tells what it is.
_ABOUT = "about"


class StudyStore(RunLog):
    """The run log, with Optuna's studies in the same database."""

    _storage: Any = PrivateAttr(default=None)

    def close(self) -> None:
        """Let go of the connections and of the embedded server; the next call takes them up again."""
        self._storage = None
        super().close()

    def open_experiment(
        self, name: str, spec: ExperimentSpec, space: dict[str, Range], *, lease_seconds: float = LEASE_SECONDS
    ) -> Experiment:
        """The experiment of that name, made if need be; the specification that it is run with now is kept.

        Args:
            name: as `ExperimentSpec.identity` gives it.
            spec: what to search, and what ends it.
            space: the ranges.
            lease_seconds: after how long a worker that is not heard of counts as dead.

        Raises:
            RemoteError: the database cannot be reached.
            ConfigurationError: its tables cannot be made or used.
        """
        import optuna

        with storage_fault_named(), self.exclusively(name):
            study = optuna.create_study(
                storage=self._optuna(),
                study_name=name,
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(seed=0),
                pruner=pruner_of(spec.strategy, hyperband=spec.hyperband),
            )
            spans = {key: span.model_dump() for key, span in space.items()}
            study.set_user_attr(_ABOUT, {"spec": spec.model_dump(mode="json"), "space": spans})
        return Experiment(self, study, spec, space, lease_seconds)

    def find_experiment(self, name: str) -> Experiment:
        """An experiment that was run before.

        Raises:
            ConfigurationError: there is none of that name.
            RemoteError: the database cannot be reached.
        """
        import optuna

        known = self.experiments()
        if name not in known:
            raise ConfigurationError(
                f"no experiment is named {name}",
                where="the run log's database",
                remedy=f"Known are {', '.join(known[-5:])}"
                if known
                else "Run one: lora-assets experiment run SPEC.yaml",
            )
        with storage_fault_named():
            study = optuna.load_study(study_name=name, storage=self._optuna(), sampler=optuna.samplers.RandomSampler())
            about = study.user_attrs[_ABOUT]
        spec = spec_of(about["spec"], ExperimentSpec, where=name)
        study.pruner = pruner_of(spec.strategy, hyperband=spec.hyperband)
        space = {key: Range.model_validate(span) for key, span in about["space"].items()}
        return Experiment(self, study, spec, space, LEASE_SECONDS)

    def experiments(self) -> list[str]:
        """The names of all experiments, in the order in which they were begun."""
        import optuna

        with storage_fault_named():
            studies = optuna.get_all_study_summaries(self._optuna(), include_best_trial=False)
        # One without was killed in the moment of its beginning, and is begun when it is run again.
        return [study.study_name for study in studies if _ABOUT in study.user_attrs]

    @contextmanager
    def exclusively(self, name: str) -> Iterator[Execute]:
        """Hold a lock for the block that one process at a time gets.

        It ends with the process, or when the process has been paused for as long as a lease holds.
        """
        with self.transaction() as execute:
            execute(f"SET LOCAL idle_in_transaction_session_timeout = '{LEASE_SECONDS:g}s'", {})
            execute("SELECT pg_advisory_xact_lock(hashtextextended(:name, 1))", {"name": name})
            yield execute

    def is_held(self, lease: str) -> bool:
        """Whether a living process holds a lease."""
        with self.transaction() as execute:
            rows = execute(
                "SELECT process FROM lora_training_leases "
                "WHERE training_run_id = :lease AND expires_at > clock_timestamp()",
                {"lease": lease},
            )
        return any(not has_ended(row["process"]) for row in rows)

    def _optuna(self) -> "BaseStorage":
        """Optuna's storage; several processes make its tables once."""
        if self._storage is None:
            from optuna.storages import RDBStorage
            from sqlalchemy import NullPool

            logging.getLogger("optuna").setLevel(logging.WARNING)
            with self.exclusively(SCHEMA) as execute:
                execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}", {})
            url = self._engine.url
            # Behind those of the setting, such as the endpoint that a hosted server goes by.
            options = f"{url.query.get('options', '')} -csearch_path={SCHEMA}".strip()
            url = url.update_query_dict({"options": options})
            with self.exclusively(SCHEMA):
                self._storage = RDBStorage(
                    url.render_as_string(hide_password=False),
                    engine_kwargs={"poolclass": NullPool, "connect_args": {"connect_timeout": 10}},
                )
        storage: BaseStorage = self._storage
        return storage
