"""HPACK's Huffman code (RFC 7541 section 5.2 and appendix B). Pure."""

import functools

# How many bits the code of each byte has, and at the end that of EOS. The codes themselves follow: they are handed out
# in order, the short ones first, and among equals by the byte.
_BITS = [
    *(13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28),
    *(28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15),
    *(6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6),
    *(15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20),
    *(20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23),
    *(24, 22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22),
    *(22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27),
    *(24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26),
    *(26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30),
]
EOS = 256
MAX_PADDING = 7  # bits


def _codes() -> list[tuple[int, int]]:
    """The code of each symbol, and its number of bits."""
    codes = [(0, 0)] * len(_BITS)
    code = length = 0
    for bits, symbol in sorted((bits, symbol) for symbol, bits in enumerate(_BITS)):
        code <<= bits - length
        codes[symbol] = code, length = code, bits
        code += 1
    return codes


_CODES = _codes()
_Step = tuple[int, int]  # the next state, and the byte that is complete with it; -1: none is
_BROKEN = -1  # no state: EOS has been read


def _machine() -> tuple[list[list[_Step]], frozenset[int]]:
    """For each state and half a byte the step; and in which states an input may end. State 0 is between two codes. No
    code is shorter than five bits, so half a byte completes one at most.
    """
    tree: list[list[int]] = [[0, 0]]  # of each inner node where 0 and 1 lead: to another, or to ~symbol
    for symbol, (code, bits) in enumerate(_CODES):
        node = 0
        for place in range(bits - 1, 0, -1):
            bit = code >> place & 1
            if not tree[node][bit]:
                tree.append([0, 0])
                tree[node][bit] = len(tree) - 1
            node = tree[node][bit]
        tree[node][code & 1] = ~symbol
    ends, node = [0], 0
    for _ in range(MAX_PADDING):
        node = tree[node][1]
        ends.append(node)
    return [[_walk(tree, state, half) for half in range(16)] for state in range(len(tree))], frozenset(ends)


def _walk(tree: list[list[int]], node: int, half: int) -> _Step:
    found = -1
    for place in (3, 2, 1, 0):
        node = tree[node][half >> place & 1]
        if node < 0:
            if node == ~EOS:
                return _BROKEN, -1
            found, node = ~node, 0
    return node, found


_STEPS, _ENDS = _machine()


@functools.lru_cache(maxsize=4096)  # what a peer says of itself is mostly what it said the last time
def decode(data: bytes) -> bytes | None:
    """The text behind these bytes; None when they are no Huffman code."""
    state, text = 0, bytearray()
    for byte in data:
        for half in (byte >> 4, byte & 15):
            state, found = _STEPS[state][half]
            if found >= 0:
                text.append(found)
            elif state == _BROKEN:
                return None
    return bytes(text) if state in _ENDS else None


def encode(text: bytes) -> bytes:
    """The shortest form of a text. (Not always shorter than the text.)"""
    value = bits = 0
    for byte in text:
        code, more = _CODES[byte]
        value, bits = value << more | code, bits + more
    padding = -bits % 8
    return (value << padding | (1 << padding) - 1).to_bytes((bits + padding) // 8)
