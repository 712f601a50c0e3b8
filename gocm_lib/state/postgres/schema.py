"""The tables of a spool in PostgreSQL: what each is for, how they are made, and whether a server keeps what it says.

All are in the schema `gocm`. Who makes them owns them (`gocm spool init`); the nodes' role may read and write rows, and
nothing else.

    meta       one row: the format, the oldest version of it that may still work here, which spool this is, and where it
               is moved from or to, if it is
    node       a gateway: until when it may work on its packs (its lease, by the server's clock), and its epoch, which
               says how often somebody else ended its lease, or it began anew. Others have `fenced` one whose lease is
               over; one that has `departed` did not die. `slowed` says to which rates it slowed down, and when
    body, pack, single, ended    as in SQLite (sqlite/spool), but that `node` says whose a pack is: 0, nobody's. `done`
               says that nothing of it is open, so that a change that does not end it changes no indexed column.
               `losses` is how often the node that had it died (module suspect)
    tally      what was counted: a row for each counter that a commit changed, appended. A row that each commit updates
               would walk over all its dead versions while anybody holds a snapshot
    counter    where those rows go in time; both together are the count
    answers    each minute's answers of an upstream (module waves), appended, too
    list       of each list of the report the highest number; who adds to one holds its row until the commit, so numbers
               come in the order of commits, and a reader's "up to N" never passes over what comes later. `reader` is
               the node that hands it out just now, 0: none
    canonical, notregistered, invalid, held    the lists. `key` is a hash: a token may be too long for an index
    idempotency    keys that requests came with
    forgotten  the highest job that is forgotten; who deals with what has ended holds its row until the commit
    cancelled  jobs that somebody wants to have cancelled, for the nodes that have them, until they have done so
    label, later, hold, meaning    as in SQLite (sqlite/notes)
    moved      files that were moved into this spool, and how far
"""

from collections.abc import Callable
from typing import Any

from gocm_lib.message.job import NODES
from gocm_lib.state.postgres import notes
from gocm_lib.state.store import FAILED, OPEN

FORMAT = 2  # that this version makes, and writes
READS_FROM = 2  # the oldest format that this version works on
_BY_UPSTREAM = "".join(
    f"ALTER TABLE {which} ADD COLUMN IF NOT EXISTS upstream text NOT NULL DEFAULT '';"
    f"CREATE INDEX {which}_upstream ON {which} (upstream, seq);"
    for which in ("canonical", "notregistered", "invalid")
)
# The statements that make the next format of one. They add, so that nodes of the format before go on beside new ones.
STEPS = {1: f"{notes.SCHEMA} {_BY_UPSTREAM}"}
OLDEST = 140000  # the oldest server that is taken, as its server_version_num

_FILL = "WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0)"
_BUSY = "WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0)"
SCHEMA = f"""
CREATE SCHEMA gocm;
SET LOCAL search_path = gocm;
CREATE TABLE meta (
    one bool PRIMARY KEY DEFAULT true CHECK (one),
    cluster uuid NOT NULL DEFAULT gen_random_uuid(),
    format int NOT NULL,
    works_with int NOT NULL,
    made timestamptz NOT NULL DEFAULT now(),
    moving text NOT NULL DEFAULT ''
);
INSERT INTO meta (format, works_with) VALUES ({FORMAT}, {FORMAT});
CREATE TABLE node (
    id smallint PRIMARY KEY CHECK (id BETWEEN 1 AND {NODES}),
    name text NOT NULL UNIQUE,
    epoch int NOT NULL,
    run text NOT NULL,
    machine text NOT NULL,
    version text NOT NULL,
    format int NOT NULL,
    lease timestamptz NOT NULL,
    joined timestamptz NOT NULL DEFAULT now(),
    fenced bool NOT NULL DEFAULT false,
    departed bool NOT NULL DEFAULT false,
    slowed jsonb NOT NULL DEFAULT '{{}}'
) WITH (fillfactor = 50);
CREATE TABLE body (id bigint PRIMARY KEY, text bytea NOT NULL) {_BUSY};
ALTER TABLE body ALTER text SET STORAGE EXTERNAL;
CREATE TABLE pack (
    id bigint PRIMARY KEY,
    last bigint NOT NULL,
    upstream text NOT NULL,
    lane smallint NOT NULL,
    since float8 NOT NULL,
    size int NOT NULL,
    fresh int NOT NULL,
    open int NOT NULL,
    jobs int NOT NULL,
    finished int NOT NULL DEFAULT 0,
    ended float8 NOT NULL DEFAULT 0,
    gone bytea NOT NULL DEFAULT '',
    node smallint NOT NULL,
    done bool NOT NULL DEFAULT false,
    losses int NOT NULL DEFAULT 0
) {_FILL};
CREATE INDEX pack_fresh ON pack (node, upstream, lane, id) WHERE NOT done;
CREATE INDEX pack_open ON pack (id) WHERE NOT done;
CREATE INDEX pack_ended ON pack (ended) WHERE ended > 0;
CREATE TABLE single (
    job bigint NOT NULL,
    n int NOT NULL,
    upstream text NOT NULL,
    rank bigint NOT NULL,
    due_at float8 NOT NULL,
    waits bool NOT NULL,
    attempts int NOT NULL,
    charged int NOT NULL,
    deaths int NOT NULL,
    since float8 NOT NULL,
    state smallint NOT NULL,
    failure text NOT NULL,
    reason text NOT NULL,
    canonical text NOT NULL,
    node smallint NOT NULL,
    PRIMARY KEY (job, n)
) {_BUSY};
CREATE INDEX single_open ON single (node, upstream, rank, job, n) WHERE state = {OPEN};
CREATE INDEX single_failed ON single (job, n) WHERE state = {FAILED};
CREATE INDEX single_failed_age ON single (due_at) WHERE state = {FAILED};
CREATE TABLE ended (
    pack bigint NOT NULL,
    first int NOT NULL,
    positions bytea NOT NULL,
    at float8 NOT NULL,
    ids text NOT NULL,
    PRIMARY KEY (pack, first)
) {_BUSY};
CREATE TABLE tally (
    node smallint NOT NULL, name text NOT NULL, upstream text NOT NULL, reason text NOT NULL, value bigint NOT NULL
) {_BUSY};
CREATE TABLE counter (
    node smallint, name text, upstream text, reason text, value bigint NOT NULL,
    PRIMARY KEY (node, name, upstream, reason)
) WITH (fillfactor = 50);
CREATE TABLE answers (
    upstream text NOT NULL, minute bigint NOT NULL, answers bigint NOT NULL, unregistered bigint NOT NULL,
    first bigint NOT NULL
) {_BUSY};
CREATE TABLE list (
    name text PRIMARY KEY, newest bigint NOT NULL, reader smallint NOT NULL DEFAULT 0,
    until timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
INSERT INTO list VALUES ('canonical', 0), ('notregistered', 0), ('invalid', 0), ('held', 0);
CREATE TABLE canonical (
    seq bigint PRIMARY KEY, key bytea NOT NULL UNIQUE, original text NOT NULL, canonical text NOT NULL
);
CREATE TABLE notregistered (
    seq bigint PRIMARY KEY, key bytea NOT NULL UNIQUE, token text NOT NULL, upstream text NOT NULL, wave bool NOT NULL
);
CREATE TABLE invalid (seq bigint PRIMARY KEY, key bytea NOT NULL UNIQUE, token text NOT NULL, reason text NOT NULL);
CREATE TABLE held (seq bigint PRIMARY KEY, key bytea NOT NULL UNIQUE, token text NOT NULL, upstream text NOT NULL);
CREATE TABLE idempotency (
    job bigint PRIMARY KEY, key bytea NOT NULL UNIQUE, body bytea NOT NULL, accepted_at float8 NOT NULL
);
CREATE TABLE cancelled (job bigint PRIMARY KEY);
CREATE TABLE moved (source text PRIMARY KEY, upto bigint NOT NULL DEFAULT 0, done bool NOT NULL DEFAULT false);
CREATE TABLE forgotten (job bigint NOT NULL);
INSERT INTO forgotten VALUES (0);
{STEPS[1]}
"""
GRANTS = """
GRANT USAGE ON SCHEMA gocm TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA gocm TO {role};
"""

Ask = Callable[[str], list[tuple[Any, ...]]]


def unfit(format_there: int, works_with: int) -> str:
    """Why this version cannot work on a spool of a format, on which those from `works_with` on may; "": it can."""
    if format_there < READS_FROM:
        return f"it has format {format_there}, this GoCM knows {READS_FROM} to {FORMAT}: gocm spool upgrade"
    if works_with > FORMAT:
        return f"it has format {format_there}, this GoCM knows {READS_FROM} to {FORMAT}: run a newer version"
    return ""


class Durability:
    """What an `ok` means on a server: what its settings say, and what is wrong with them."""

    def __init__(self, ask: Ask) -> None:
        """`ask` runs a query."""
        names = "server_version_num fsync full_page_writes synchronous_commit synchronous_standby_names server_encoding"
        [self._values] = ask("SELECT " + ", ".join(f"current_setting('{name}')" for name in names.split()))
        [[self.recovers]] = ask("SELECT pg_is_in_recovery()")

    @property
    def standby(self) -> bool:
        """Whether a commit waits for another machine."""
        return bool(self._values[4]) and self._values[3] in ("on", "remote_apply")

    def unfit(self) -> list[str]:
        """Why no spool can be here, whatever is set."""
        version, encoding = int(self._values[0]), self._values[5]
        found = [f"the server is older than PostgreSQL {OLDEST // 10000}"] if version < OLDEST else []
        return found + ([f"the database's encoding is {encoding}, not UTF8"] if encoding != "UTF8" else [])

    def problems(self, wanted: str) -> list[str]:
        """Why this server does not keep what is wanted: "disk", or "standby": a second machine has it, too."""
        _, fsync, pages, commit, standbys, _ = self._values
        found = self.unfit()
        if self.recovers:
            found.append(
                "the server is a standby: name the primary, or all of them and target_session_attrs=read-write"
            )
        if fsync != "on" or pages != "on":
            found.append("fsync or full_page_writes is off: an accepted message may be lost at a power cut")
        if commit not in ("on", "remote_apply"):
            found.append(f"synchronous_commit is {commit}: a commit is answered before it is kept")
        if wanted == "standby" and not standbys:
            found.append("synchronous_standby_names is empty: what is accepted is on one machine only")
        return found
