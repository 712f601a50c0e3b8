"""Packs: what one commit took for one upstream, jobs of about one size. The unit on disk. Pure.

A pack's body is text, and never changes but to forget: a line of JSON that says of each job what it is, then for each
job a line with its message and a line for each of its tokens. (Neither can hold a line break.) Tokens are known by
their positions in the pack, counted over all its jobs; which of them have left it is a bitmap, an int here, least bit
first. A job of many tokens is a pack of its own. Jobs are in the order of their ids, and no other pack has ids between
them, so a job's pack is the last one whose id is not above the job's.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from gocm_lib.message.job import Job, Run, Skip, Slice
from gocm_lib.state import turns

PACK_TOKENS = 1000  # that a pack of several jobs has at most: what is read and written together


class Key(NamedTuple):
    """An Idempotency-Key that a job came with: the hashes of key and body (module idempotency)."""

    job: int
    key: bytes
    body: bytes
    accepted_at: float


class Label(NamedTuple):
    """What a job is known by beside its id: the name of the token that sent it, and its tag ("": it has none); and its
    upstream.
    """

    job: int
    name: str
    tag: str
    upstream: str


class Pack(NamedTuple):
    """A pack as it comes: `jobs` are ids with their numbers of tokens, and the tokens' places where some were left out
    of the list; `last` is the highest id. `since` is when its first job was accepted, or is to be sent (`due`, 0: as
    soon as can be).
    """

    id: int
    last: int
    upstream: str
    lane: int
    since: float
    jobs: Sequence[tuple[int, int, Sequence[int]]]
    body: str
    keys: Sequence[Key] = ()
    labels: Sequence[Label] = ()
    due: float = 0.0

    @property
    def size(self) -> int:
        """How many tokens it has."""
        return sum([size for _, size, _ in self.jobs])


class Packed(NamedTuple):
    """A job as its pack has it. `places` are those of its tokens in the list that was given, where some were left out
    (`skipped`). Of one that is `forgotten` (when it had finished; 0: it is not) no token is left but those that may
    still be replayed; the others are empty.
    """

    job: int
    target: str
    accepted_at: float
    expires_at: float
    message: str
    tokens: Sequence[str]
    places: Sequence[int] = ()
    skipped: Sequence[Skip] = ()
    forgotten: float = 0.0

    def place(self, index: int) -> int:
        """The place in the given list of its token number `index`."""
        return self.places[index] if self.places else index

    def index_of(self, place: int) -> int:
        """The opposite of `place`."""
        return bisect_left(self.places, place) if self.places else place


def pack(jobs: Iterable[Job]) -> list[Pack]:
    """Jobs as packs, all in the order of their ids."""
    packs: list[Pack] = []
    together: list[Job] = []
    tokens, kind = 0, ("", 0, 0.0, False)
    for job in sorted(jobs, key=lambda job: job.id):
        own = job.upstream, turns.lane(len(job.tokens)), job.send_at, job.express
        if together and (own != kind or tokens + len(job.tokens) > PACK_TOKENS):
            packs.append(_pack(together, kind))
            together, tokens = [], 0
        together.append(job)
        tokens, kind = tokens + len(job.tokens), own
    if together:
        packs.append(_pack(together, kind))
    return packs


def _pack(jobs: Sequence[Job], kind: tuple[str, int, float, bool]) -> Pack:
    first, (_, which, send_at, express) = jobs[0], kind
    which = turns.EXPRESS if express else which
    return Pack(
        first.id,
        jobs[-1].id,
        first.upstream,
        turns.later(which) if send_at else which,
        first.accepted_at,
        [(job.id, len(job.tokens), tuple(job.places) if job.skipped else ()) for job in jobs],
        write([_packed(job) for job in jobs]),
        [Key(job.id, *job.key, job.accepted_at) for job in jobs if job.key],
        [Label(job.id, job.by, job.tag, job.upstream) for job in jobs if job.by or job.tag],
        send_at,
    )


def _packed(job: Job) -> Packed:
    places = tuple(job.places) if job.skipped else ()
    return Packed(job.id, job.target, job.accepted_at, job.expires_at, job.message, job.tokens, places, job.skipped)


_compact = json.JSONEncoder(separators=(",", ":")).encode


def write(jobs: Iterable[Packed]) -> str:
    """The body of a pack with these jobs."""
    heads, lines = [], [""]
    for job in jobs:
        head = [job.job, len(job.tokens), job.target, job.accepted_at, job.expires_at]
        if job.skipped or job.forgotten:
            head += [job.forgotten, list(job.places), job.skipped]
        heads.append(head)
        lines.append(job.message)
        lines += job.tokens
    lines[0] = _compact(heads)
    return "\n".join(lines)


def read(body: str) -> list[Packed]:
    """The jobs in a body."""
    lines = body.split("\n")
    jobs = []
    at = 1
    for job, size, target, accepted_at, expires_at, *more in json.loads(lines[0]):
        tokens = lines[at + 1 : at + 1 + size]
        if more:
            forgotten, places, skipped = more
            rest = places, [Skip(*each) for each in skipped], forgotten
            jobs.append(Packed(job, target, accepted_at, expires_at, lines[at], tokens, *rest))
        else:
            jobs.append(Packed(job, target, accepted_at, expires_at, lines[at], tokens))
        at += 1 + size
    return jobs


def heads(body: str) -> list[tuple[int, int, Sequence[int]]]:
    """The jobs in a body, as a Pack has them."""
    return [(head[0], head[1], head[6] if len(head) > 5 else ()) for head in json.loads(body[: body.index("\n")])]


def span_of(body: str, job: int) -> int:
    """The bitmap of a job's positions in a pack with this body."""
    at = 0
    for number, size, _ in heads(body):
        if number == job:
            return span(at, size)
        at += size
    return 0


def slices(jobs: Iterable[Job]) -> list[Slice]:
    """Whole jobs, as they go to senders at once."""
    return [
        Slice(
            job.upstream,
            job.target,
            job.message,
            list(placed_runs(_packed(job), 0, len(job.tokens))),
            awaited=job.awaited,
        )
        for job in jobs
    ]


def without(packs: Iterable[Pack], gone: Mapping[int, object]) -> list[Pack]:
    """The packs without these jobs."""
    left = []
    for each in packs:
        if not any(job in gone for job, _, _ in each.jobs):
            left.append(each)
            continue
        jobs = [job for job in read(each.body) if job.job not in gone]
        if jobs:
            sizes = [(job.job, len(job.tokens), job.places) for job in jobs]
            keys = [key for key in each.keys if key.job not in gone]
            labels = [label for label in each.labels if label.job not in gone]
            left.append(
                each._replace(
                    id=jobs[0].job,
                    last=jobs[-1].job,
                    since=jobs[0].accepted_at,
                    jobs=sizes,
                    body=write(jobs),
                    keys=keys,
                    labels=labels,
                )
            )
    return left


def disk_size(packs: Iterable[Pack]) -> int:
    """Roughly how many bytes packs take on disk: their bodies and rows, and for each token, once it is delivered, a
    part of a row with the upstream's id.
    """
    return sum([len(each.body) + 200 + 100 * each.size for each in packs])


# ------------------------------------------------------------------------------------------------------------- bitmaps


def span(low: int, size: int) -> int:
    """The bitmap of `size` positions from `low` on."""
    return ((1 << size) - 1) << low


def runs(bits: int) -> Iterator[tuple[int, int]]:
    """The runs of positions in a bitmap: the first of each, and the first after it."""
    low = 0
    while bits:
        skipped = (bits & -bits).bit_length() - 1
        bits >>= skipped
        size = (~bits & (bits + 1)).bit_length() - 1
        low += skipped
        yield low, low + size
        bits >>= size
        low += size


def lowest(bits: int, count: int) -> int:
    """The first `count` positions of a bitmap."""
    if bits.bit_count() <= count:
        return bits
    found = 0
    for low, high in runs(bits):
        if count <= 0:
            break
        found |= span(low, min(count, high - low))
        count -= high - low
    return found


def to_bytes(bits: int) -> bytes:
    """A bitmap as the disk has it."""
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def from_bytes(stored: bytes) -> int:
    """The opposite of `to_bytes`."""
    return int.from_bytes(stored, "little")


def job_at(starts: Sequence[int], position: int) -> int:
    """The index of the job that a position belongs to, where job number i begins at `starts[i]`."""
    return bisect_right(starts, position) - 1


def placed_runs(job: Packed, low: int, high: int) -> Sequence[Run]:
    """The tokens of a job from its index `low` on, before `high`, for the first attempt: runs of places in a row."""
    if not job.places:
        return (Run(job.job, low, 1, job.tokens[low:high]),)
    found = []
    while low < high:
        end = low + 1
        while end < high and job.places[end] == job.places[end - 1] + 1:
            end += 1
        found.append(Run(job.job, job.places[low], 1, job.tokens[low:end]))
        low = end
    return found
