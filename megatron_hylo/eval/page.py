"""Building blocks of the self-contained HTML pages: everything is inside one file, and nothing is loaded from elsewhere."""

import json
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from megatron_hylo.eval.theme import DARK, LIGHT, Theme

__all__ = ["blockquote", "cell", "code", "details", "escape", "paragraph", "section", "table", "write_page"]


def _variables(theme: Theme, soft: str) -> str:
    return " ".join(f"{name}: {colour};" for name, colour in (theme.variables() | {"--soft": soft}).items())


STYLE = Template("""
:root { color-scheme: light dark; $light }
@media (prefers-color-scheme: dark) { :root { $dark } }
body { color: var(--ink); background: var(--background); font: 16px/1.5 system-ui, sans-serif; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } p { overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--grid); }
table { border-collapse: collapse; display: block; overflow-x: auto;
        background: linear-gradient(to right, var(--background) 2rem, transparent) local,
                    linear-gradient(to left, var(--background) 2rem, transparent) right / 2rem local no-repeat,
                    linear-gradient(to left, var(--muted), transparent) right / .5rem no-repeat;
        font-variant-numeric: tabular-nums; }
th, td { text-align: right; white-space: nowrap; padding: .3rem .7rem; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child, .word { text-align: left; }
th:first-child, td:first-child { padding-left: 0; } th { color: var(--muted); font-weight: 600; }
th { vertical-align: bottom; white-space: normal; } td { vertical-align: top; }
td.word { white-space: normal; } td.word:last-child { min-width: 16rem; }
table.text th, table.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 5rem; }
pre { background: var(--soft); padding: .6rem .8rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
blockquote { margin: 0; padding: .6rem 1rem; border-left: 3px solid var(--grid); white-space: pre-wrap; }
.example { border-left: 3px solid var(--series-1); padding-left: .8rem; margin: 1rem 0; }
.example.right { border-color: var(--series-2); } .example p { margin: .3rem 0; }
summary { cursor: pointer; padding: .2rem 0; }
.muted { color: var(--muted); } .chart svg { width: 100%; height: auto; } .narrow { display: none; }
@media (max-width: 600px) {
  .wide { display: none; } .narrow { display: block; } body { margin: 1rem auto; }
  table { font-size: .8rem; } th, td { padding: .3rem .45rem; white-space: normal; } pre { font-size: .8rem; }
}
""").substitute(light=_variables(LIGHT, "#f6f8fa"), dark=_variables(DARK, "#161b22"))


def paragraph(text: str, muted: bool = False) -> str:
    """A paragraph of plain text; notes are muted."""
    return f"<p{' class=muted' if muted else ''}>{escape(text)}</p>"


def blockquote(text: str) -> str:
    """A quotation of plain text, whose line breaks are kept."""
    return f"<blockquote>{escape(text)}</blockquote>"


def code(text: str) -> str:
    """A block of commands."""
    return f"<pre><code>{escape(text)}</code></pre>"


def section(title: str, body: str) -> str:
    """A heading and HTML below it."""
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


def details(title: str, body: str) -> str:
    """HTML that opens when its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>\n{body}</details>"


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    text: bool = False,
    plain: bool = False,
    words: Collection[str] = (),
) -> str:
    """A table of plain text.

    Args:
        head: column titles.
        rows: cells of each row.
        text: columns are words, at the left; otherwise numbers, at the right.
        plain: show no column titles.
        words: titles of columns of words in a table of numbers; one of them without any word is left out.
    """
    cells = [list(row) for row in rows]
    shown = [i for i, title in enumerate(head) if title not in words or any(row[i] for row in cells)]
    kinds = [" class=word" if head[i] in words else "" for i in shown]
    titles = "".join(f"<th{kind}>{escape(head[i])}</th>" for i, kind in zip(shown, kinds))
    lines = ("".join(f"<td{kind}>{escape(row[i])}</td>" for i, kind in zip(shown, kinds)) for row in cells)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    top = "" if plain else f"<thead><tr>{titles}</tr></thead>"
    return f"<table{' class=text' if text else ''}>{top}<tbody>\n{body}</tbody></table>"


def cell(value: Any) -> str:
    """A setting or fact as plain text: strings as they are, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def write_page(file: Path, title: str, parts: Iterable[str]) -> Path:
    """Write one HTML file that needs no other.

    Args:
        file: to write.
        title: of the page.
        parts: HTML, one after the other.
    """
    head = f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
    view = '<meta name=viewport content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    page = f"{head}{view}<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    beside = file.with_name(f".{file.name}.partial")
    beside.write_text(page)
    beside.replace(file)
    return file
