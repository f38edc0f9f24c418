"""The commands `koala worker ...`."""

import os
import sys
from pathlib import Path

import typer

from koala.errors import KoalaError

app = typer.Typer(no_args_is_help=True, help="Join a team's pool of machines.")


@app.command("join", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def worker_join(context: typer.Context) -> None:
    """Check this machine, and join a pool with it: --pool gpu --server URL.

    `python -m flows.join --help` lists all options.
    """
    if not Path("flows/join.py").is_file():
        raise KoalaError("flows/join.py is not here: run this in the checkout of the repository")
    # In place of this process, since Prefect is imported by flows alone.
    os.execv(sys.executable, [sys.executable, "-m", "flows.join", *context.args])
