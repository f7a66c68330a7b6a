"""The routes: the four calls of the trainer's client, and what goes with them."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from h2o_gateway.gateway import Gateway
from h2o_gateway.models import Dataset, Experiment, ExperimentRequest, Experiments, Health, Problem
from h2o_gateway.sources import check_base_model
from h2o_gateway.store import Row
from h2o_gateway.studio import refusals
from h2o_gateway.upload import receive_upload

DATASETS_ROUTE = "/api/datasets"
_FORM = {
    "type": "object",
    "required": ["file", "sha256"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JSONL, one record a line."},
        "sha256": {"type": "string", "pattern": "^[0-9a-fA-F]{64}$", "description": "Of the file, in hexadecimal."},
        "name": {"type": "string"},
    },
}


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Problem, "description": HTTPStatus(code).phrase} for code in codes}


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


Works = Annotated[Gateway, Depends(_gateway)]


def _experiment(experiment_id: str, gateway: Works) -> Row:
    row = gateway.store.get(experiment_id)
    if row is None:
        raise HTTPException(404, "no such experiment")
    return row


Known = Annotated[Row, Depends(_experiment)]

health = APIRouter()
# The guard has looked at the key before a body is read; the dependency puts it into the documentation.
api = APIRouter(
    prefix="/api", dependencies=[Depends(HTTPBearer(auto_error=False))], responses=_problems(401, 408, 413, 503, 507)
)


@health.get("/health", responses={503: {"model": Health}})
def get_health(gateway: Works, response: Response) -> Health:
    """Whether experiments are looked after; needs no key."""
    working = gateway.supervisor.is_working
    response.status_code = 200 if working else 503
    return Health(
        status="ok" if working else "failing",
        queued=gateway.store.count("queued"),
        running=gateway.store.count("running"),
        gpus=len(gateway.settings.slots),
    )


@health.get("/metrics", include_in_schema=False)
def get_metrics(request: Request) -> Response:
    """What Prometheus scrapes; needs no key, and tells of no experiment by its name."""
    return Response(generate_latest(request.app.state.metrics), media_type=CONTENT_TYPE_LATEST)


@api.post(
    "/datasets",
    status_code=201,
    responses=_problems(422) | {200: {"model": Dataset, "description": "It was there already"}},
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
)
async def upload_dataset(request: Request, response: Response, gateway: Works) -> Dataset:
    """Upload a dataset as a multipart form; it is written to the disk as it comes, and checked."""
    target = gateway.datasets.new_upload()
    try:
        upload = await receive_upload(request, target)
        if upload.fields.get("sha256", "").lower() != upload.sha256:
            raise HTTPException(422, f"sha256: the file that came has {upload.sha256}")
        name = upload.fields.get("name", "")
        dataset, new = await run_in_threadpool(gateway.datasets.keep, target, name=name, sha256=upload.sha256)
    finally:
        target.unlink(missing_ok=True)
    response.status_code = 201 if new else 200
    return dataset


@api.post(
    "/experiments",
    status_code=201,
    responses=_problems(400, 409, 422) | {200: {"model": Experiment, "description": "The key's experiment"}},
)
def create_experiment(
    body: ExperimentRequest,
    response: Response,
    gateway: Works,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> Experiment:
    """Queue an experiment; the same idempotency key, in the body or in the header, gives the same one again."""
    if body.idempotency_key is None:
        body = body.model_copy(update={"idempotency_key": idempotency_key})
    elif idempotency_key not in (None, body.idempotency_key):
        raise HTTPException(422, "idempotency_key: another one in the header")
    if gateway.datasets.path(body.dataset_id) is None:
        raise HTTPException(422, "dataset_id: no such dataset; upload it first")
    reasons = [*check_base_model(gateway.settings, body), *refusals(body.config)]
    if reasons:
        raise HTTPException(422, "; ".join(reasons))
    row, new = gateway.store.create(body)
    if not new and row.request != body:
        raise HTTPException(409, f"idempotency_key: {row.id} was created with it from another request")
    gateway.supervisor.look_soon()
    response.status_code = 201 if new else 200
    return gateway.shown(row)


@api.get("/experiments", responses=_problems(422))
def list_experiments(
    gateway: Works,
    idempotency_key: Annotated[str | None, Query(description="Only that of this key.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0, le=1 << 53)] = 0,
) -> Experiments:
    """Experiments, the newest first."""
    rows, total = gateway.store.page(idempotency_key, limit, offset)
    return Experiments(experiments=[gateway.shown(row, log=False) for row in rows], total=total)


@api.get("/experiments/{experiment_id}", responses=_problems(404, 422))
def get_experiment(row: Known, gateway: Works) -> Experiment:
    """An experiment's state."""
    return gateway.shown(row)


@api.post("/experiments/{experiment_id}/cancel", responses=_problems(404, 422))
def cancel_experiment(row: Known, gateway: Works) -> Experiment:
    """Stop an experiment: at once where it waits, soon where it trains; one that has ended stays as it is."""
    stopped = gateway.store.stop(row.id)
    gateway.supervisor.look_soon()
    return gateway.shown(stopped)


@api.get(
    "/experiments/{experiment_id}/logs",
    response_class=Response,
    responses=_problems(404, 422)
    | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Lines of text"}},
)
def get_logs(row: Known, gateway: Works, lines: Annotated[int, Query(ge=1, le=10000)] = 1000) -> PlainTextResponse:
    """The last lines of the training's log, of its last MiB at most."""
    found = gateway.supervisor.attempt(row).log_lines(lines)
    return PlainTextResponse("".join(f"{line}\n" for line in found))


@api.get(
    "/experiments/{experiment_id}/download",
    response_class=FileResponse,
    responses=_problems(404, 409, 422)
    | {
        200: {"content": {"application/zip": {}}, "description": "The adapter in PEFT's layout"},
        206: {"content": {"application/zip": {}}, "description": "The range that was asked for"},
        400: {"content": {"text/plain": {}}, "description": "A Range that cannot be read"},
        416: {"content": {"text/plain": {}}, "description": "A Range behind the end"},
    },
)
def download_adapter(row: Known, gateway: Works) -> FileResponse:
    """The finished adapter as a zip archive; Range and If-Range continue a download that broke off."""
    if row.status != "finished":
        raise HTTPException(409, f"the experiment is {row.status}, not finished")
    return FileResponse(
        gateway.supervisor.archive(row),
        media_type="application/zip",
        filename=f"{row.id}.zip",
        headers={"ETag": f'"{row.sha256}"', "X-Checksum-Sha256": row.sha256 or "", "Accept-Ranges": "bytes"},
    )
