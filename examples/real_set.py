"""Run the data stages on folders of pictures that a package installed, by URLs of a server on loopback.

    apt-get install tuxpaint-stamps-default openclipart-png
    python examples/real_set.py /usr/share/tuxpaint/stamps /usr/share/openclipart/png --out real

Captions stand in the first line of a text file of the picture's name (Tux Paint's further lines are translations: about
a fifth of the pictures get one of them, so that captions of other languages are there too); a picture without gets its file's name.
"""

import argparse
import contextlib
import csv
import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

from koala.console import show
from koala.data.config import DownloadConfig, DownloadMachine, EncodeConfig, EncodeMachine, FilterConfig, NearDuplicates
from koala.data.download import download
from koala.data.encode import encode
from koala.data.filter import filter as filter_stage
from koala.data.rules.aspect import Aspect
from koala.data.rules.blank import Blank
from koala.data.rules.boilerplate import Boilerplate
from koala.data.rules.characters import Characters
from koala.data.rules.control import Control
from koala.data.rules.language import Language
from koala.data.rules.markup import Markup
from koala.data.rules.personal import Personal
from koala.data.rules.repetition import Repetition
from koala.data.rules.size import Size
from koala.data.rules.urls import Urls
from koala.data.rules.words import Words
from koala.data.score import score
from koala.data.scores.base import Scorer
from koala.data.scores.config import ScoreConfig, ScoreMachine
from koala.data.scores.nsfw import Nsfw
from koala.data.scores.text import TextArea
from koala.data.source import source
from koala.data.tables import TableSource
from koala.run import NoRun

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg")
RULES = (
    Size(at_least=64),
    Aspect(at_most=3),
    Words(at_least=2),
    Characters(),
    Control(),
    Markup(),
    Urls(),
    Boilerplate(),
    Personal(),
    Repetition(),
    Language(),
    Blank(),
)


def captioned(folders: Sequence[Path]) -> Iterator[tuple[Path, str, str]]:
    """Yield pictures with their captions, and the captions' language where a text file says it."""
    for folder in folders:
        for number, file in enumerate(sorted(folder.rglob("*"))):
            if file.suffix.lower() not in PICTURES or not file.is_file():
                continue
            text = file.with_suffix(".txt")
            lines = text.read_text(errors="replace").splitlines() if text.is_file() else []
            named = [line.partition("=") for line in lines[1:] if ".utf8=" in line]
            translated = [(name.partition(".")[0], caption) for name, _, caption in named if caption.strip()]
            if number % 5 == 4 and translated:
                language, caption = translated[number // 5 % len(translated)]
            elif lines and lines[0].strip():
                language, caption = "en", lines[0]
            else:
                language, caption = "", file.stem.replace("_", " ").replace("-", " ")
            yield file, caption.strip(), language


@contextmanager
def served(root: Path) -> Iterator[str]:
    """Serve a folder on loopback inside the block, and give the server's HOST:PORT."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing: a request a line is too much."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def scorers() -> tuple[Scorer, ...]:
    """Return the scores whose models are installed: those of the extra `scores`."""
    found = []
    for scorer in (Nsfw(), TextArea()):
        with contextlib.suppress(Exception):
            scorer.check()
            found.append(scorer)
    return tuple(found)


def timed(name: str, stage: Callable[[], None]) -> None:
    """Run a stage, and say how long it took; the figures are of a machine that may do other things too."""
    begin = time.perf_counter()
    stage()
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    show(f"{name}: {time.perf_counter() - begin:.1f} s; peak so far {max(peaks) / 2**10:,.0f} MiB")


def main() -> None:
    """Read the command line; run source, download, score, filter and, with a teacher, encode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("real"))
    parser.add_argument("--teacher", type=Path, help="a pipeline's folder, whose VAE encodes; left out: nothing does")
    parser.add_argument(
        "--size", type=int, default=256, help="pixels of the shorter side to which pictures are made smaller"
    )
    parser.add_argument("--score", action="store_true", help="score the pictures first")
    arguments = parser.parse_args()
    folders = [folder.resolve() for folder in arguments.folders]
    root = Path(os.path.commonpath(folders))
    out = {name: arguments.out / name for name in ("table", "images", "scores", "kept", "latents")}
    for folder in out.values():
        folder.mkdir(parents=True, exist_ok=True)
    with served(root) as address:
        table = arguments.out / "list.csv"
        with table.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("url", "caption", "caption_language"))
            for picture, caption, language in captioned(folders):
                rows.writerow((f"http://{address}/{quote(str(picture.relative_to(root)))}", caption, language))
        listed = TableSource(kind="file", location=str(table), carry=("caption_language",), private_hosts=True)
        timed("source", lambda: source(listed, out=out["table"], run=NoRun()))
        fetched = DownloadConfig(
            image_size=arguments.size, shard_size=1000, allow=(address,), machine=DownloadMachine(processes=2)
        )
        timed("download", lambda: download(fetched, table=out["table"], out=out["images"], run=NoRun()))
    scored = ScoreConfig(scorers=scorers() if arguments.score else (), machine=ScoreMachine(threads=2))
    timed("score", lambda: score(scored, images=out["images"], out=out["scores"], run=NoRun()))
    kept = FilterConfig(rules=RULES, near_duplicates=NearDuplicates())
    timed("filter", lambda: filter_stage(kept, out["images"], out["scores"], out["kept"], NoRun()))
    if arguments.teacher:
        size = arguments.size
        buckets = EncodeConfig(
            buckets=((size, size), (size, size * 3 // 2), (size * 3 // 2, size)), machine=EncodeMachine()
        )
        timed("encode", lambda: encode(buckets, out["kept"], arguments.teacher, out["latents"], NoRun()))
    for name in (
        "table/stats.json",
        "images/stats.json",
        "scores/stats.json",
        "kept/report.json",
        "latents/stats.json",
    ):
        file = arguments.out / name
        if file.is_file():
            found = json.loads(file.read_text())
            found.pop("caption_words", None)
            show(f"{name}: {json.dumps(found)}")
    show(f"look at {out['kept'] / 'report.html'}")


if __name__ == "__main__":
    main()
