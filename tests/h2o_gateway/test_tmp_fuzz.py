"""The service against its own description, with made-up requests, fitting and unfitting."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.h2o_gateway.process import KEY, GatewayProcess

bounded = settings(
    max_examples=400,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="session")
def schema(gateway: GatewayProcess) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")


def operations(schema: BaseSchema) -> Iterator[APIOperation]:
    for found in schema.get_all_operations():
        yield found.ok()


def explore(operation: APIOperation, mode: GenerationMode, look: Callable[[Case], None]) -> None:
    @seed(99)
    @bounded
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Case) -> None:
        look(case)

    run()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "unfitting"])
def test_whatever_comes_the_answer_is_one_that_the_description_names_and_no_5xx(
    schema: BaseSchema, mode: GenerationMode
) -> None:
    seen: set[int] = set()

    def look(case: Case) -> None:
        answer = case.call(headers={"Authorization": f"Bearer {KEY}"})
        # No description can say that a dataset must exist; unknown parameters of a query are ignored, as usual.
        case.validate_response(answer, excluded_checks=[positive_data_acceptance, negative_data_rejection])
        assert answer.status_code < 500
        seen.add(answer.status_code)

    for operation in operations(schema):
        # Nothing is sent to it that could be unfitting.
        if (operation.path, mode) != ("/health", GenerationMode.NEGATIVE):
            explore(operation, mode, look)
    assert {200, 404, 422} <= seen


def test_without_the_key_no_request_gets_further_than_401(schema: BaseSchema) -> None:
    paths = set()

    def look(case: Case) -> None:
        answer = case.call(headers={"Authorization": "Bearer guessed"})
        assert answer.status_code == 401
        paths.add(case.path)

    for operation in operations(schema):
        if operation.path != "/health":
            explore(operation, GenerationMode.POSITIVE, look)
    assert len(paths) == 6
