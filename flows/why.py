"""Why a flow run was started: what its starter says, else what Prefect knows of it."""

from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.runtime import flow_run as current

from koala.console import harmless

_LONGEST = 100  # characters of a reason, which an event may give


def why(because: str) -> str:
    """Return why the current flow run was started: `because`, else `schedule`, the automation's name, or `by hand`."""
    if because:
        return harmless(because)[:_LONGEST]
    with get_client(sync_client=True) as client:
        by = client.read_flow_run(UUID(str(current.get_id()))).created_by
    if by and by.type == "SCHEDULE":
        return "schedule"
    if by and by.type == "AUTOMATION":
        return f"event: {harmless(by.display_value or '')}"[:_LONGEST]
    return "by hand"
