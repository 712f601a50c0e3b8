"""A connection to the spool's server, and its transactions: all that is changed in one goes there together.

What becomes of errors decides what is promised:

    a statement that fails, and is rolled back     Full, or Passing: the caller may repeat it
    a pack that is not ours any more               Lost: somebody else has rescued it, and this process must end
    a connection that ends while something is written    Unsure: nobody here knows whether it is kept. The process must
                                                   end; the next one reads what there is
    a connection that ends otherwise               Passing, and the next call connects again

A commit is never cancelled, by a time limit or otherwise: where it waits for a standby, the server would answer that it
is done, although only one disk has it. It would say so by a warning, and that is Unsure, too.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg
from psycopg import errors

from gocm_lib.state.contract import Count, Full, Lost, Overtaken, Passing, Unsure

Row = tuple[Any, ...]
Values = Mapping[str, Any] | Sequence[Any]
# For each connection, whatever the role's or the server's defaults are. What waits for a lock waits for a pack that
# another node is about to commit; who is killed within a transaction holds its locks no longer than that.
SESSION = """
SELECT set_config('search_path', 'gocm', false), set_config('lock_timeout', '2s', false),
    set_config('idle_in_transaction_session_timeout', '10s', false), set_config('statement_timeout', '0', false),
    set_config('synchronous_commit', %s, false)
"""


def connect(address: str, commit: str = "on") -> psycopg.Connection[Row]:
    """A connection to the server at an address (config.spool_address.complete). Raises psycopg.Error."""
    connection = psycopg.connect(address, autocommit=True)
    connection.execute(SESSION, (commit,))
    return connection


def clean(text: str) -> str:
    """A text as the server takes it: without NUL, which upstreams' answers may have."""
    return text.replace("\0", "\ufffd")


def reason(error: Exception) -> str:
    """Why the server cannot be asked, in a line."""
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        return error.diag.message_primary
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Of several hosts the library tells each in a line of its own, after the first one's; else what follows are hints.
    return "; ".join([line.removeprefix("- ") for line in lines if line.startswith("- ")] or lines[:1])


_FULL = (errors.DiskFull,)
_PASSING = (
    *(errors.SerializationFailure, errors.DeadlockDetected, errors.LockNotAvailable),
    *(errors.InsufficientResources, errors.QueryCanceled),
)


class Database:
    """One connection, made anew when it has ended. `commit` has what is counted with a transaction."""

    def __init__(self, address: str, node: int, epoch: int) -> None:
        self.node, self.epoch = node, epoch
        self.counted: Counter[Count] = Counter()  # in this transaction
        self._address = address
        self._connection: psycopg.Connection[Row] | None = None
        self._pipeline: contextlib.ExitStack | None = None  # while a transaction is open
        self._turning = False
        self._warned = ""

    # ------------------------------------------------------------------------------------------------------- statements

    def ask(self, statement: str, values: Values = ()) -> list[Row]:
        """The rows of a query. Raises Passing; and in a transaction, what `transaction` does."""
        with self._told():
            return self._run(statement, values).fetchall()

    def tell(self, statement: str, values: Values = ()) -> psycopg.Cursor[Row]:
        """Make a change in the transaction. What has come of it is known at its end, or when it is asked for."""
        assert self._pipeline is not None
        return self._run(statement, values)

    def changed(self, statement: str, values: Values = ()) -> int:
        """Make a change in the transaction that ends with RETURNING. Returns of how many rows."""
        assert self._pipeline is not None
        return len(self.ask(statement, values))

    @property
    def is_open(self) -> bool:
        """Whether a transaction is being made."""
        return self._pipeline is not None

    def count(self, counts: Mapping[Count, int]) -> None:
        """Count with the transaction."""
        for count, value in counts.items():
            self.counted[count] += value

    def _run(self, statement: str, values: Values) -> psycopg.Cursor[Row]:
        return self._connected().cursor(binary=True).execute(statement, values)

    def _connected(self) -> psycopg.Connection[Row]:
        if self._connection is None or self._is_closed:
            self._connection = connect(self._address)
            self._connection.add_notice_handler(self._hear)
        return self._connection

    def _hear(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            self._warned = notice.message_primary or "a warning"

    # ----------------------------------------------------------------------------------------------------- transactions

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """All transactions within are one, which is kept when this block ends."""
        self._turning = True
        try:
            yield
            with self._told():
                self._commit()
        except BaseException:
            self._roll_back()
            raise
        finally:
            self._turning = False

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all the changes in this block, or none. Raises Full, Passing, Lost and Unsure."""
        try:
            with self._told():
                if self._pipeline is None:
                    self._begin()
                yield
                if not self._turning:
                    self._commit()
        except BaseException:
            if not self._turning:
                self._roll_back()
            raise

    def _begin(self) -> None:
        self._warned = ""
        stack = contextlib.ExitStack()
        stack.enter_context(self._connected().pipeline())
        self._pipeline = stack
        self._run("BEGIN", ())

    def _commit(self) -> None:
        if self._pipeline is None:
            return
        self._write_counts()
        self._run("COMMIT", ())
        self._pipeline.close()  # raises what any of the statements did
        self._pipeline = None
        if self._warned:
            raise Unsure(self._warned)

    def _write_counts(self) -> None:
        counts = [(count, value) for count, value in self.counted.items() if value]
        if counts:
            names, upstreams, reasons = zip(*(count for count, _ in counts))
            self._run(
                "INSERT INTO tally SELECT %(node)s, u.* FROM"
                " unnest(%(names)b::text[], %(upstreams)b::text[], %(reasons)b::text[], %(values)b::bigint[]) u",
                {
                    "node": self.node,
                    "names": list(names),
                    "upstreams": list(upstreams),
                    "reasons": list(reasons),
                    "values": [value for _, value in counts],
                },
            )

    def _roll_back(self) -> None:
        self.counted.clear()
        stack, self._pipeline = self._pipeline, None
        connection = self._connection
        if connection is None or (stack is None and connection.info.transaction_status == 0):
            return
        with contextlib.suppress(psycopg.Error):  # it has ended, and with it the transaction
            if stack:
                with contextlib.suppress(psycopg.Error):  # which is why we are here
                    stack.close()
            connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Raise the server's errors in this block as the contract's."""
        try:
            yield
        except psycopg.Error as error:
            kind = _kind(error)
            # Read-only: it is a standby now.
            if kind is None or self._is_closed or isinstance(error, errors.ReadOnlySqlTransaction):
                self.close()
                kind = Unsure if self._pipeline is not None else Passing
            raise kind(reason(error)) from error

    @property
    def _is_closed(self) -> bool:
        return self._connection is None or self._connection.closed

    def close(self) -> None:
        """Nothing can be called any more."""
        if self._connection is not None:
            self._connection.close()


def _kind(error: psycopg.Error) -> type[Exception] | None:
    """What the server's error is here; None: it is not the server's."""
    if isinstance(error, errors.DivisionByZero):  # how our statements say that a row was not ours
        return Lost
    if isinstance(error, errors.UniqueViolation):
        return Overtaken
    if isinstance(error, _FULL):
        return Full
    if isinstance(error, _PASSING):
        return Passing
    return Unsure if error.sqlstate else None
