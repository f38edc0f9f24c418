"""The filter's report as one HTML file. Captions, URLs and names of the table come from outside: they are shown as text only."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL.Image import Image

from koala.console import harmless
from koala.data.tally import Verdict
from koala.page import embedded, page, thumbnail

Shown = tuple[Verdict, str]
"""A sample, and what is said of it before its caption."""

Sheets = Mapping[str, Sequence[Shown]]
"""Samples under titles."""

Pictures = Mapping[tuple[str, str], Image]
"""Thumbnails by shard and key, of images that can be decoded."""

Frequent = Mapping[str, Sequence[tuple[str | None, int, int]]]
"""What is counted -> names with their samples and how many are kept, the most frequent first."""

_CAPTION, _NAME = 300, 80  # characters
_STYLE = """
body { max-width: 1320px; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; overflow-wrap: anywhere; }
nav { margin-top: 1rem; } nav a { color: #2a6f97; display: inline-block; margin-right: 1rem; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
.figures b { display: block; font-size: 1.5rem; line-height: 1.2; }
.wide { overflow-x: auto; }
.wide td:first-child { max-width: 24rem; overflow-wrap: break-word; white-space: normal; }
.bar { width: 40%; min-width: 8rem; }
.bar div { background: #f1f1f1; display: flex; height: .9rem; }
.bar i { background: #2a6f97; } .bar i + i { background: #e07a5f; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.plots img { width: 100%; }
.sheet { display: grid; gap: 1rem .9rem; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
figure { margin: 0; min-width: 0; }
figure img, .blank { background: #f4f4f4; display: block; height: 150px; object-fit: contain; width: 100%; }
.blank { color: #777; display: grid; place-items: center; }
.original img { box-shadow: 0 0 0 3px #2a6f97; }
figcaption { font-size: .8rem; line-height: 1.35; margin-top: .4rem; overflow-wrap: anywhere; }
figcaption b { color: #b3492e; display: block; } .kept b { color: #2a6f97; }
figcaption bdi { -webkit-box-orient: vertical; -webkit-line-clamp: 4; display: -webkit-box; overflow: hidden; }
figcaption code { color: #555; display: block; font-size: .72rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
@media (max-width: 500px) {
  .sheet { grid-template-columns: repeat(2, 1fr); } th, td { padding: .3rem .4rem; } .bar { min-width: 4rem; }
}
"""


def write(
    file: Path,
    summary: Mapping[str, Any],
    plots: Mapping[str, bytes],
    frequent: Frequent,
    kept: Sequence[Shown],
    passed: Sheets,
    dropped: Sheets,
    groups: Sheets,
    pictures: Pictures,
) -> None:
    """Write the report.

    Args:
        file: Where it goes.
        summary: What report.json holds.
        plots: Measured value -> its histogram as PNG.
        frequent: Names that are counted, such as hosts.
        kept: Kept samples at random.
        passed: Bound -> the kept samples nearest to it.
        dropped: Rule -> samples that it dropped.
        groups: Duplicate group -> its samples, the kept one first.
        pictures: The images of all these samples.
    """
    of_rule = {f"{rule}: {summary['dropped'][rule]:,}": sheet for rule, sheet in dropped.items()}
    histograms = "".join(embedded(plot, harmless(name)) for name, plot in plots.items())
    sections = (
        ("Funnel", "A sample is counted under the first rule that it breaks.", _funnel(summary)),
        (
            "Measured values",
            "Dashed: the rules' bounds. The outermost bars also count what lies beyond them.",
            histograms and f'<div class="plots">{histograms}</div>',
        ),
        *((title, "The most frequent.", _shares(found)) for title, found in frequent.items() if found),
        ("Just passed", "Kept samples, those nearest to each bound.", _sheets(passed, pictures)),
        ("Dropped", "Samples of each rule at random.", _sheets(of_rule, pictures)),
        (
            "Duplicates",
            f"{summary['duplicate_groups']:,} groups: the largest, then others at random. The kept sample is framed.",
            _sheets(groups, pictures),
        ),
        ("Kept", "Samples at random.", _sheets({"": kept}, pictures) if kept else ""),
    )
    shown = [section for section in sections if section[-1]]
    file.write_text(page("Filter", _body(summary, shown), _STYLE), encoding="utf-8")


def _body(summary: Mapping[str, Any], sections: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    yield "<h1>What the filter kept, and why it dropped the others</h1>"
    share = f"{summary['kept_share']:.1%}"
    figures = {"samples": f"{summary['samples']:,}", "kept": f"{summary['kept']:,}", "of all samples": share}
    yield f'<div class="figures">{"".join(f"<span><b>{figure}</b>{name}</span>" for name, figure in figures.items())}</div>'
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title, *_ in sections)
    yield f"<nav>{links}</nav>"
    for title, note, content in sections:
        yield f'<h2 id="{_anchor(title)}">{title}</h2><p class="note">{note}</p>{content}'


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _funnel(summary: Mapping[str, Any]) -> str:
    """Return a table: what each rule drops, and what is left after it."""
    samples = left = summary["samples"]
    rows = [("downloaded", ("", "", f"{samples:,}"), _bar(samples, samples))]
    for rule, count in summary["dropped"].items():
        left -= count
        rows.append((rule, (f"{count:,}", f"{count / samples:.2%}", f"{left:,}"), _bar(samples, left, count)))
    rows.append(("kept", ("", "", f"{left:,}"), _bar(samples, left)))
    return _table(("", "dropped", "of all", "left", ""), rows)


def _shares(found: Sequence[tuple[str | None, int, int]]) -> str:
    """Return a table of names with their samples, and how many of them are kept."""
    most = found[0][1]
    rows = [
        (
            "not known" if name is None else harmless(name)[:_NAME],
            (f"{samples:,}", f"{kept:,}", f"{kept / samples:.1%}"),
            _bar(most, kept, samples - kept),
        )
        for name, samples, kept in found
    ]
    return _table(("", "samples", "kept", "", ""), rows)


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str], str]]) -> str:
    """Return a table whose rows are a name, figures and a bar."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(
        f"<tr><td><bdi>{escape(name)}</bdi></td>{''.join(f'<td>{figure}</td>' for figure in figures)}"
        f'<td class="bar">{bar}</td></tr>'
        for name, figures, bar in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _bar(whole: int, *parts: int) -> str:
    """Return a bar of two colours: what is kept, and what is dropped."""
    shares = (100 * part / max(whole, 1) for part in parts)
    return "<div>" + "".join(f'<i style="width:{share:.2f}%"></i>' for share in shares) + "</div>"


def _sheets(sheets: Sheets, pictures: Pictures) -> str:
    return "".join(
        (f"<h3>{escape(harmless(title))}</h3>" if title else "") + '<div class="sheet">'
        f"{''.join(_figure(verdict, said, pictures) for verdict, said in sheet)}</div>"
        for title, sheet in sheets.items()
    )


def _figure(verdict: Verdict, said: str, pictures: Pictures) -> str:
    """Return one sample: its image, what is said of it, its caption, key and URL (as text, no link)."""
    picture = pictures.get((verdict.shard, verdict.key))
    image = thumbnail(picture, "", "JPEG") if picture else '<span class="blank">cannot be decoded</span>'
    note = f"<b>{escape(harmless(said))}</b>" if said else ""
    caption, url = (harmless(text)[:_CAPTION] for text in (verdict.caption, verdict.url))
    return (
        f'<figure class="{_classes(verdict, said)}">{image}<figcaption>{note}<bdi dir="auto">{escape(caption)}</bdi>'
        f"<code>{escape(harmless(verdict.key))}</code><code>{escape(url)}</code></figcaption></figure>"
    )


def _classes(verdict: Verdict, said: str) -> str:
    if verdict.rule is not None:
        return "dropped"
    return "kept original" if said == "kept" else "kept"
