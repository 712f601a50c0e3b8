"""A topic as a page for a browser. It loads nothing and runs nothing; links within the server are relative."""

import base64
import hashlib
import html
from collections.abc import Mapping

from gocm_lib.help.markdown import Block, Code, Heading, Items, Paragraph, Span, Table, parse, plain, spans

STYLE = """
:root { color-scheme: light dark; --text: #1c2330; --back: #f6f7f9; --card: #fff; --line: #dde1e8; --link: #2457c5; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8ebf1; --back: #14171d; --card: #1d222b; --line: #333b48; --link: #8fb2ff; }
}
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main, nav { max-width: 50rem; margin: 0 auto; padding: .5rem 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .9375rem; }
a { color: var(--link); } a[aria-current] { color: inherit; font-weight: 600; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; }
code { font: .875em ui-monospace, monospace; overflow-wrap: break-word; } td:first-child code { white-space: nowrap; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem;
  overflow-x: auto; } pre code { overflow-wrap: normal; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .9375rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-top: 1px solid var(--line); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
"""
# The page's only style is this one, by its hash.
POLICY = (
    "default-src 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    + "'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TAGS = {"code": "code", "strong": "strong", "em": "em"}


def render(topics: Mapping[str, str], topic: str, source: str) -> str:
    """The page of a topic. `topics` are all there are, with their meanings. A `topic` of "" is the page that lists
    them: `source` is not looked at.
    """
    up = "help/" if topic == "" else ""
    names = [(name, f"{up}{name}") for name in topics]
    links = "".join(
        f'<a href="{url}"{" aria-current=page" if name == topic else ""}>{name}</a>\n' for name, url in names
    )
    home = f'<a href="{"" if up else "../"}status">status</a>\n<a href="{"help" if up else "../help"}">help</a>\n'
    if topic:
        body, title = article(source), plain(source.splitlines()[0].lstrip("# "))
    else:
        rows = "".join(f'<li><a href="{url}">{name}</a>: {_line(topics[name])}</li>\n' for name, url in names)
        body, title = f"<h1>Help</h1>\n<ul>\n{rows}</ul>\n", "Help"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{html.escape(title)} - GoCM</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n'
        f'</head>\n<body>\n<nav aria-label="Topics">\n{home}{links if topic else ""}</nav>\n'
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def article(source: str) -> str:
    """The HTML of a text in Markdown."""
    return "".join(map(_block, parse(source)))


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} id="{anchor(text)}">{_line(text)}</h{level}>\n'
        case Paragraph(text):
            return f"<p>{_line(text)}</p>\n"
        case Code(_, lines):
            code = "".join(html.escape(line, quote=False) + "\n" for line in lines)
            return f'<pre tabindex="0"><code>{code}</code></pre>\n'
        case Items(ordered, tight, items):
            rows = "".join(f"<li>{_item(item, tight)}</li>\n" for item in items)
            return f"<ol>\n{rows}</ol>\n" if ordered else f"<ul>\n{rows}</ul>\n"
        case Table(head, rows_of):
            heads = "".join(f'<th scope="col">{_line(cell)}</th>\n' for cell in head)
            body = "".join(
                "<tr>\n" + "".join(f"<td>{_line(cell)}</td>\n" for cell in row) + "</tr>\n" for row in rows_of
            )
            return (
                f'<div class="table" tabindex="0"><table>\n<thead>\n<tr>\n{heads}</tr>\n</thead>\n'
                f"<tbody>\n{body}</tbody>\n</table></div>\n"
            )


def _item(item: tuple[Block, ...], tight: bool) -> str:
    return "".join(_line(block.text) if tight and isinstance(block, Paragraph) else _block(block) for block in item)


def _line(text: str) -> str:
    return "".join(map(_span, spans(text)))


def _span(span: Span) -> str:
    if span.kind == "link":
        return f'<a href="{html.escape(span.url)}">{_line(span.text)}</a>'
    text = html.escape(span.text, quote=False)
    return f"<{TAGS[span.kind]}>{text}</{TAGS[span.kind]}>" if span.kind in TAGS else text


def anchor(heading: str) -> str:
    """The id of a heading, for links to it."""
    words = "".join(c if c.isalnum() else " " for c in plain(heading).lower()).split()
    return "-".join(words)
