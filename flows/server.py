"""Prefect's server, as its clients meet it."""

from prefect.client.orchestration import get_client

from flows.services import ServiceError


def require_server() -> None:
    """Raise ServiceError where Prefect's server does not answer."""
    with get_client(sync_client=True) as client:
        if error := client.api_healthcheck():
            raise ServiceError(
                f"Prefect at {client.api_url} does not answer ({type(error).__name__}): `make serve` starts one, "
                "PREFECT_API_URL names another"
            )
