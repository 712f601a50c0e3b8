"""JSON, read strictly and written as it was read. Pure.

Promises that a text that is taken means one thing: no name twice, no NaN, bounded depth and number of values. A number
keeps its digits: 1.10 stays 1.10, and a coordinate of 20 digits is not rounded.
"""

import json
import re
from typing import Any

from gocm_lib.message.bad_request import BadRequest

MAX_DEPTH = 32  # of nested arrays and objects: the parser recurses, and a thread's stack is finite
MAX_VALUES = 20_000  # in a JSON text, beside its tokens: each becomes an object of 50 bytes and more

# A string to its end, or to the text's end, or what begins, parts or ends values. The possessive *+ and an alternative
# for every way the text may end mean that a match once begun never fails: else an unclosed string would be scanned
# again from each quote.
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[,\[{]|[\]}]', re.DOTALL)


def check_structure(source: str, field: str, most: int, deepest: float = MAX_DEPTH) -> None:
    """Raise BadRequest for a JSON text that nests too deep or has more than `most` values, before any is built."""
    openings = source.count("[") + source.count("{")
    if openings <= deepest and openings + source.count(",") <= most:
        return
    depth = values = 0
    for match in _STRUCTURE.finditer(source):
        first = match[0][0]
        if first == '"':
            continue
        if first in "]}":
            depth -= 1
            continue
        values += 1
        depth += first != ","
        if depth > deepest:
            raise BadRequest(f"{field or 'the body'} nests deeper than {MAX_DEPTH} levels", field)
        if values > most:
            raise BadRequest(f"{field or 'the body'} has more than {most} values", field, 413)


class Number:
    """A number with a point or an exponent, as it was written."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Number) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return self.text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is given twice in one object")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Made once: json.loads and json.dumps make one for each call that is given options.
_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant, parse_float=Number)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def read_json(source: str, field: str, most: int = MAX_VALUES) -> Any:
    """The value of a JSON text, in which Numbers stand for floats. Raises BadRequest when it is not JSON, nests too
    deep, has too many values, repeats a name, or is not Unicode.
    """
    check_structure(source, field, most)
    try:
        return _DECODER.decode(source)
    except ValueError as error:  # JSONDecodeError is one; a number of 5,000 digits is another
        raise BadRequest(f"{field or 'the body'} is not valid JSON: {error}", field) from None


def compact(value: Any, field: str) -> str:
    """A JSON value as compact text. Raises BadRequest for what JSON cannot hold: half a surrogate."""
    try:
        result = _write(value)
        result.encode()
    except ValueError:  # UnicodeEncodeError is one
        raise BadRequest(f"{field} holds a character that JSON cannot carry", field) from None
    return result


def _write(value: Any) -> str:
    try:
        return _ENCODER.encode(value)
    except TypeError:  # there is a Number in it, which only we can write
        pass
    if isinstance(value, dict):
        return "{" + ",".join(f"{_ENCODER.encode(name)}:{_write(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_write, value)) + "]"
    return str(value)
