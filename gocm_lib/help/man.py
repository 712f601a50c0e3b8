"""All topics as one manual page, in the language of man(7)."""

import re
from collections.abc import Iterator, Mapping

from gocm_lib.help.markdown import Block, Code, Heading, Items, Paragraph, Span, Table, parse, plain, spans

FONTS = {"code": "B", "strong": "B", "em": "I"}


def render(topics: Mapping[str, str], version: str, purpose: str, commands: Mapping[str, str]) -> str:
    """A page for `man -l`, from the sources of the topics and what each command does."""
    lines = [f'.TH GOCM 1 "" "gocm {version}"', ".SH NAME", f"gocm \\- {_line(purpose)}", ".SH SYNOPSIS"]
    lines += [r"\fBgocm\fR [\fICOMMAND\fR] [\fIOPTIONS\fR]", ".SH COMMANDS"]
    for name, meaning in commands.items():
        lines += [".TP", f".B {_line(name)}", _line(meaning)]
    for source in topics.values():
        lines += _blocks(parse(source))
    return "\n".join(lines) + "\n"


def _blocks(blocks: tuple[Block, ...]) -> Iterator[str]:
    for block in blocks:
        match block:
            case Heading(1, text):
                yield f".SH {_line(plain(text).upper())}"
            case Heading(_, text):
                yield f".SS {_line(plain(text))}"
            case Paragraph(text):
                yield from (".PP", _line(text))
            case Code(_, lines):
                yield from (".PP", ".RS 4", ".nf")
                yield from (_escape(line) for line in lines)
                yield from (".fi", ".RE")
            case Items(ordered, _, items):
                for number, (first, *rest) in enumerate(items, 1):
                    yield f".IP {number}. 4" if ordered else r".IP \(bu 2"
                    yield _line(first.text) if isinstance(first, Paragraph) else ""
                    yield from (".RS", *_blocks(tuple(rest)), ".RE") if rest else ()
            case Table():
                yield from _entries(block)


def _entries(table: Table) -> Iterator[str]:
    for first, *middle, last in table.rows:
        said = [f"{name}: {cell}." for name, cell in zip(table.head[1:-1], middle) if cell]
        yield from (".TP", _line(first) or r"\&", _line(" ".join([*said, last])) or r"\&")


def _line(text: str) -> str:
    return "".join(_span(span) for span in spans(text)) if text else ""


def _span(span: Span) -> str:
    text = _escape(span.text.replace("`", "") if span.kind == "link" else span.text)
    if span.kind == "link" and "://" in span.url:
        return f"{text} ({_escape(span.url)})"
    return rf"\f{FONTS[span.kind]}{text}\fR" if span.kind in FONTS else text


def _escape(text: str) -> str:
    """A text that roff takes for nothing else."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"^([.'])", r"\\&\1", text)
