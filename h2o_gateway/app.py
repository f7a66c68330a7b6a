"""The HTTP service."""

import logging
import sqlite3

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry

from finetune.errors import DatasetError, StorageFullError
from h2o_gateway.gateway import Gateway
from h2o_gateway.guard import Guard
from h2o_gateway.metrics import Experiments, Measured
from h2o_gateway.routes import DATASETS_ROUTE, api, health
from h2o_gateway.settings import Settings

_logger = logging.getLogger(__name__)
# What a form needs around its file, with its boundaries and other fields.
_FORM_BYTES = 1 << 16


def create_app(settings: Settings, key: str) -> FastAPI:
    """The service.

    Args:
        settings: the gateway's.
        key: the Bearer key that the API asks for.
    """
    gateway = Gateway(settings)
    app = FastAPI(
        title="H2O LLM Studio gateway",
        version="1",
        description="Trains LoRA adapters with an installed open-source H2O LLM Studio.",
        lifespan=gateway.running,
        redoc_url=None,
    )
    app.state.gateway = gateway
    # One for each service: the library's own is the process's.
    app.state.metrics = CollectorRegistry()
    app.state.metrics.register(Experiments(gateway))
    app.include_router(health)
    app.include_router(api)
    app.add_exception_handler(RequestValidationError, _refuse_request)
    app.add_exception_handler(DatasetError, _refuse_dataset)
    app.add_exception_handler(StorageFullError, _storage_full)
    app.add_exception_handler(sqlite3.Error, _database_fails)
    limits = {DATASETS_ROUTE: settings.max_dataset_bytes + _FORM_BYTES}
    app.add_middleware(
        Guard,
        key=key,
        limit=lambda path: limits.get(path, settings.max_request_bytes),
        idle=settings.body_idle_seconds,
    )
    app.add_middleware(Measured, registry=app.state.metrics)
    return app


def _refuse_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - what it is registered for
    # Without the input: it may hold what JSON cannot.
    lines = (f"{'.'.join(map(str, fault['loc'][1:]))}: {fault['msg']}" for fault in error.errors())
    detail = "; ".join(lines).encode(errors="replace").decode()
    return JSONResponse({"detail": detail[:2000]}, 422)


def _refuse_dataset(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


def _storage_full(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 507)


def _database_fails(_: Request, error: Exception) -> JSONResponse:
    _logger.error("the gateway's database: %s", error)
    return JSONResponse({"detail": f"the gateway's database: {error}"}, 503)
