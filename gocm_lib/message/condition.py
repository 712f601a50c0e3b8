"""A condition on topics: `'a' in topics && ('b' in topics || !('c' in topics))`. Pure.

Obeys firebase.google.com, "Send messages to topics": names in single quotes, the operators && and ||, ! and
parentheses, at most five topics.
"""

import re

from gocm_lib.message.bad_request import BadRequest

MOST_TOPICS = 5
LONGEST = 4096  # bytes
DEEPEST = 16  # of ! and parentheses, one in the other: what reads a condition may recurse
_WORD = re.compile(r"\s*('[a-zA-Z0-9_.~%-]{1,900}'\s+in\s+topics\b|&&|\|\||[!()])")
HOW = "'a' in topics && ('b' in topics || 'c' in topics)"


def check(text: str) -> None:
    """Raise BadRequest unless the text is a condition."""
    words: list[str] = []
    at = 0
    while at < len(text.rstrip()):
        found = _WORD.match(text, at)
        if not found or len(text.encode()) > LONGEST:
            raise BadRequest(f"not understood from character {at + 1}: write it like {HOW}", "condition")
        words.append("topic" if found[1][0] == "'" else found[1])
        at = found.end()
    if words.count("topic") > MOST_TOPICS:
        raise BadRequest(f"more than {MOST_TOPICS} topics, which is Google's limit", "condition")
    # One way in which words may follow each other, and no parenthesis left over, is all there is to it.
    depth, wants_value, nots = 0, True, 0
    for word in words:
        if wants_value != (word in ("topic", "!", "(")):
            raise BadRequest(f"something is missing before {word}: write it like {HOW}", "condition")
        depth += (word == "(") - (word == ")")
        nots = nots + 1 if word == "!" else 0
        if max(depth, nots) > DEEPEST:
            raise BadRequest(f"it nests deeper than {DEEPEST}", "condition")
        if depth < 0:
            raise BadRequest("a parenthesis is closed that was not opened", "condition")
        wants_value = word not in ("topic", ")")
    if wants_value or depth:
        raise BadRequest(f"it is not whole: write it like {HOW}", "condition")
