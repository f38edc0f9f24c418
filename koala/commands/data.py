"""The commands `koala data ...`."""

from pathlib import Path
from typing import Annotated

import typer

from koala.commands.options import ProfileName
from koala.errors import KoalaError

app = typer.Typer(no_args_is_help=True, help="See and pin the list of images, and follow a sample.")


@app.command("sample")
def data_sample(
    count: Annotated[int, typer.Argument(metavar="N", min=1, help="rows")] = 16,
    pictures: Annotated[bool, typer.Option(help="fetch their pictures too")] = True,
    out: Annotated[Path, typer.Option(help="the sheet of pictures")] = Path("sample.png"),
    profile: ProfileName = None,
) -> None:
    """Show the first usable rows of the source, and their pictures."""
    from koala import params as parameters
    from koala.data.config import DownloadConfig
    from koala.data.sample import sample

    loaded = parameters.load(profile=profile)
    download = loaded.config("download")
    assert isinstance(download, DownloadConfig)
    sample(loaded.source, download, count, out if pictures else None)


@app.command("update")
def data_update(profile: ProfileName = None) -> None:
    """Pin the source's content as it is now; say what changed."""
    from koala import params as parameters
    from koala.data.tables import TableSource
    from koala.data.update import update
    from koala.runner import artifact

    loaded = parameters.load(profile=profile)
    if not isinstance(loaded.source, TableSource):
        raise KoalaError(f"the source of profile {loaded.profile} is made by the project: it needs no pin")
    update(loaded.profile, loaded.source, artifact("table", profile=loaded.profile))


@app.command("forget")
def data_forget(
    because: Annotated[str, typer.Option(help="why it is taken down")],
    url: Annotated[str | None, typer.Option(help="the image's URL, as the table has it")] = None,
    sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="of the stored image, or of the fetched file")
    ] = None,
    dhash: Annotated[
        str | None, typer.Option(metavar="HEX", help="perceptual hash: what looks like it goes too")
    ] = None,
) -> None:
    """Take an image down: the next filter leaves it and its duplicates out."""
    from koala.console import show
    from koala.data import forget
    from koala.runner import artifact

    folders = [artifact(noun) for noun in ("images", "kept", "latents")]
    entry = forget.add(because, url=url, sha256=sha256, dhash=dhash)
    from koala.data.whereabouts import whereabouts

    for noun, keys in whereabouts(entry, *folders).items():
        names = ", ".join(sorted(keys)[:10]) + (", ..." if len(keys) > 10 else "")
        show(f"{noun}: {len(keys)}{' (' + names + ')' if keys else ''}")
    show(
        f"added to {forget.FILE}: `dvc repro` leaves it out of all that follows the filter; the images stay as they are fetched"
    )


@app.command("explain")
def data_explain(
    sample: Annotated[str, typer.Argument(metavar="KEY|URL", help="a sample's key, or its image's URL")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON only")] = False,
) -> None:
    """Show a sample's way: table, download, verdict, latents."""
    from koala.data.explain import explain, show_way
    from koala.runner import artifact

    folders = {noun: artifact(noun) for noun in ("table", "images", "kept", "latents")}
    show_way(explain(sample, **folders), as_json)
