"""What identifies a repeated request: its Idempotency-Key and its body. Pure.

Only hashes of both are kept.
"""

import hashlib
import re

from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.job import IdempotencyKey

LONGEST = 128  # characters of a key
HASH = 16  # bytes of a SHA-256: two of a million million keys are alike once in 10**14 times

# A string of RFC 9651, as draft-ietf-httpapi-idempotency-key-header has it, or bare, as most clients send it.
_QUOTED = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
_BARE = re.compile(r"[\x21\x23-\x7e][\x21-\x7e]*")


def read(header: str | None, body: bytes, name: str = "") -> IdempotencyKey | None:
    """The IdempotencyKey of a request, from its header and body; None when it has no such header. A key belongs to the
    name of the token that came with it: others have their own. Raises BadRequest for a malformed key.
    """
    if header is None:
        return None
    quoted = _QUOTED.fullmatch(header)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else header
    if not key or not (quoted or _BARE.fullmatch(key)):
        raise BadRequest("give a key of printable ASCII without spaces, quoted or bare", "idempotency-key")
    if len(key) > LONGEST:
        raise BadRequest(f"the key is longer than {LONGEST} characters", "idempotency-key")
    key = f"{name}\0{key}" if name else key
    return IdempotencyKey(hashlib.sha256(key.encode()).digest()[:HASH], hashlib.sha256(body).digest()[:HASH])
