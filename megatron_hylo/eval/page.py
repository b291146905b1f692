"""Building blocks of the self-contained HTML pages: everything is inside one file, and nothing is loaded from elsewhere."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from megatron_hylo.eval.theme import DARK, LIGHT, Theme

__all__ = ["code", "details", "escape", "paragraph", "section", "table", "write_page"]


def _variables(theme: Theme, soft: str) -> str:
    return " ".join(f"{name}: {colour};" for name, colour in (theme.variables() | {"--soft": soft}).items())


STYLE = (
    f""":root {{ color-scheme: light dark; {_variables(LIGHT, "#f6f8fa")} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK, "#161b22")} }} }}
"""
    + """
body { color: var(--ink); background: var(--background); font: 16px/1.5 system-ui, sans-serif; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } p { overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--grid); }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { text-align: right; white-space: nowrap; padding: .3rem .7rem; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { color: var(--muted); font-weight: 600; }
th { vertical-align: bottom; white-space: normal; } td { vertical-align: top; }
table.text th, table.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 5rem; }
pre { background: var(--soft); padding: .6rem .8rem; overflow-x: auto; border-radius: 6px; }
blockquote { margin: 0; padding: .6rem 1rem; border-left: 3px solid var(--grid); white-space: pre-wrap; }
.muted { color: var(--muted); } .chart svg { width: 100%; height: auto; } .narrow { display: none; }
@media (max-width: 600px) { .wide { display: none; } .narrow { display: block; } }
"""
)


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def code(text: str) -> str:
    """A block of commands."""
    return f"<pre><code>{escape(text)}</code></pre>"


def section(title: str, body: str) -> str:
    """A heading and HTML below it."""
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


def details(title: str, body: str) -> str:
    """HTML that opens when its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>\n{body}</details>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: bool = False) -> str:
    """A table of plain text.

    Args:
        head: column titles.
        rows: cells of each row.
        text: columns are words, at the left; otherwise numbers, at the right.
    """
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table{' class=text' if text else ''}><thead><tr>{titles}</tr></thead><tbody>\n{body}</tbody></table>"


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
