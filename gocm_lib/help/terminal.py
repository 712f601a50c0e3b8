"""A topic as plain text, for a terminal of a given width."""

import textwrap
from collections.abc import Iterator

from gocm_lib.help.markdown import Block, Code, Heading, Items, Paragraph, Table, parse, plain

NARROW = 22  # columns of a table's cell that is not worth wrapping
WIDE = 22  # columns that a wrapped cell needs to be readable


def render(source: str, width: int = 80) -> str:
    """The text of a topic. No line is longer than `width`, but those of code."""
    return "\n".join(_blocks(parse(source), width)).rstrip() + "\n"


def _blocks(blocks: tuple[Block, ...], width: int) -> Iterator[str]:
    for block in blocks:
        match block:
            case Heading(1, text):
                yield from (plain(text), "=" * len(plain(text)))
            case Heading(_, text):
                yield from (plain(text), "-" * len(plain(text)))
            case Paragraph(text):
                yield from textwrap.wrap(plain(text), width, break_long_words=False, break_on_hyphens=False)
            case Code(_, lines):
                yield from (f"    {line}".rstrip() for line in lines)
            case Items():
                yield from _items(block, width)
            case Table():
                yield from _table(block, width)
        yield ""


def _items(found: Items, width: int) -> Iterator[str]:
    for number, item in enumerate(found.items, 1):
        mark = f"{number}. " if found.ordered else "* "
        lines = list(_blocks(item, width - len(mark)))[:-1]
        yield mark + lines[0]
        yield from (f"{' ' * len(mark)}{line}".rstrip() for line in lines[1:])
        if not found.tight and number < len(found.items):
            yield ""


def _table(table: Table, width: int) -> Iterator[str]:
    """In columns where there is room for them, else an entry for each row."""
    rows = [[plain(cell) for cell in row] for row in (table.head, *table.rows)]
    natural = [max(map(len, column)) for column in zip(*rows)]
    room = width - 2 * (len(natural) - 1)
    flexible = [at for at, size in enumerate(natural) if size > NARROW]
    left = room - sum(size for size in natural if size <= NARROW)
    if sum(natural) > room:
        for at in sorted(flexible, key=lambda at: natural[at]):
            natural[at] = min(natural[at], left // len(flexible))
            left -= natural[at]
            flexible = flexible[1:]
    longest = [max(len(word) for cell in column for word in cell.split() or [""]) for column in zip(*rows)]
    wrapped = [at for at, size in enumerate(natural) if size < max(len(row[at]) for row in rows)]
    if any(natural[at] < max(WIDE, longest[at]) for at in wrapped):
        yield from _entries(rows[0], rows[1:], width)
        return
    for row in [rows[0], ["-" * size for size in natural], *rows[1:]]:
        cells = [textwrap.wrap(cell, size, break_on_hyphens=False) or [""] for cell, size in zip(row, natural)]
        for line in range(max(map(len, cells))):
            parts = [cell[line] if line < len(cell) else "" for cell in cells]
            yield "  ".join(f"{part:{size}}" for part, size in zip(parts, natural)).rstrip()


def _entries(head: list[str], rows: list[list[str]], width: int) -> Iterator[str]:
    for first, *middle, last in rows:
        yield first
        said = [f"{name}: {cell}" for name, cell in zip(head[1:-1], middle) if cell]
        for text in [*said, last]:
            yield from textwrap.wrap(
                text, width, initial_indent="    ", subsequent_indent="    ", break_long_words=False
            )
