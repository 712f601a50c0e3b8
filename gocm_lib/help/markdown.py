"""Reads the part of Markdown that the help is written in, as CommonMark and GitHub's tables have it.

That part: headings, paragraphs, lists, code in fences, tables; code, links, strong and emphasised text in a line. Lines
that are a comment are skipped. A test holds it against a whole implementation, on every topic.
"""

import re
from typing import NamedTuple, TypeAlias


class Span(NamedTuple):
    """A piece of a line: `kind` is text, code, strong, em or link (to `url`)."""

    kind: str
    text: str
    url: str = ""


class Heading(NamedTuple):
    level: int
    text: str


class Paragraph(NamedTuple):
    text: str


class Code(NamedTuple):
    """`language` is the word after the fence."""

    language: str
    lines: tuple[str, ...]


class Items(NamedTuple):
    """A list. Each item is its blocks; `tight`: there are no blank lines in it."""

    ordered: bool
    tight: bool
    items: tuple[tuple["Block", ...], ...]


class Table(NamedTuple):
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Block: TypeAlias = Heading | Paragraph | Code | Items | Table
ITEM = re.compile(r"(\*|[0-9]+\.) +")
BLOCK = re.compile(r"(?:\*|[0-9]+\.) |#+ |```|<!--")  # begins one within a paragraph
SPAN = re.compile(r"`([^`]+)`|\[([^\]]+)\]\(([^)\s]+)\)|\*\*([^*]+)\*\*|\*([^*]+)\*")


def parse(source: str) -> tuple[Block, ...]:
    """The blocks of a text."""
    lines = [line.rstrip() for line in source.splitlines()]
    blocks: list[Block] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if not line or line.startswith("<!--"):
            at += 1
        elif line.startswith("```"):
            end = lines.index("```", at + 1)
            blocks.append(Code(line[3:], tuple(lines[at + 1 : end])))
            at = end + 1
        elif line.startswith("#"):
            marks, _, text = line.partition(" ")
            blocks.append(Heading(len(marks), text))
            at += 1
        elif line.startswith("|") and lines[at + 1 : at + 2] and lines[at + 1].startswith("|"):
            end = _end(lines, at, "|")
            head, _, *rows = [_cells(row) for row in lines[at:end]]
            blocks.append(Table(head, tuple(rows)))
            at = end
        elif ITEM.match(line):
            at, items = _items(lines, at)
            blocks.append(items)
        else:
            end = at + 1
            while end < len(lines) and lines[end] and not BLOCK.match(lines[end]):
                end += 1
            blocks.append(Paragraph(" ".join(each.strip() for each in lines[at:end])))
            at = end
    return tuple(blocks)


def _end(lines: list[str], at: int, mark: str) -> int:
    """Where the lines end that begin with `mark`."""
    while at < len(lines) and lines[at].startswith(mark):
        at += 1
    return at


def _cells(row: str) -> tuple[str, ...]:
    return tuple(cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row.strip().strip("|")))


def _items(lines: list[str], at: int) -> tuple[int, Items]:
    """The list that begins there, and where it ends. What belongs to an item is indented as its text is."""
    ordered = not lines[at].startswith("*")
    items: list[tuple[Block, ...]] = []
    tight = True
    while at < len(lines) and (mark := ITEM.match(lines[at])):
        inside = [lines[at][mark.end() :]]
        at += 1
        while at < len(lines) and (not lines[at] or lines[at].startswith(" " * mark.end())):
            inside.append(lines[at][mark.end() :])
            at += 1
        while not inside[-1]:  # a blank line after an item is within the list only if another item follows
            inside.pop()
            tight = tight and not (at < len(lines) and ITEM.match(lines[at]))
        tight = tight and "" not in inside
        items.append(parse("\n".join(inside)))
    return at, Items(ordered, tight, tuple(items))


def spans(text: str) -> tuple[Span, ...]:
    """The pieces of a paragraph's, heading's or cell's text."""
    found: list[Span] = []
    at = 0
    for match in SPAN.finditer(text):
        if match.start() > at:
            found.append(Span("text", text[at : match.start()]))
        code, label, url, strong, em = match.groups()
        kind = "code" if code else "link" if label else "strong" if strong else "em"
        found.append(Span(kind, code or label or strong or em, url or ""))
        at = match.end()
    return (*found, *([Span("text", text[at:])] if at < len(text) else []))


def plain(text: str) -> str:
    """The same text without marks."""
    return "".join(span.text.replace("`", "") if span.kind == "link" else span.text for span in spans(text))
