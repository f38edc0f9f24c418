"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

MODEL = "a release (koala-700m, koala-700m@v2), a model folder, a .safetensors file, or owner/name of the Hub"
StudentName = Annotated[str, typer.Argument(metavar="STUDENT", help="a student of params.yaml, such as koala-700m")]
ProfileName = Annotated[str | None, typer.Option("--profile", help="in place of params.yaml's")]
MachineName = Annotated[str | None, typer.Option("--machine", help="in place of params.yaml's")]
Out = Annotated[Path | None, typer.Option(help="write the raw figures to this JSON file")]
Plot = Annotated[Path | None, typer.Option(help="write a plot to this PNG file")]
