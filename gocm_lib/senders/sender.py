"""One sender process: takes slices from its generation's queue, sends them, settles what became of them.

        queue -> taker thread -> [ loop: one thread, hundreds of requests in flight ] -> settler thread -> State
                                       ^ connected channels
                                  dialling threads

The loop (module loop) owns every connection and every request; the other threads only pass things to it and from it.
Promises that each token taken is settled once, unless this process dies or finishes first: then the token is still
claimed by this generation, and the supervisor has it released.
"""

import threading
import time
from collections.abc import MutableSequence, Sequence
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from queue import Empty, SimpleQueue

from gocm_lib.config.settings import Exit, Fatal, Settings
from gocm_lib.message.dialects import DIALECTS
from gocm_lib.message.job import Slice
from gocm_lib.message.outcome import Result, join
from gocm_lib.monitoring.counters import Counters
from gocm_lib.process import child, log
from gocm_lib.senders import upstream as upstreams
from gocm_lib.senders.crash_log import CrashLog
from gocm_lib.senders.loop import Loop
from gocm_lib.state.client import Client, StateUnavailable

SETTLE_EVERY = 0.02  # seconds: outcomes that end within it share a transaction and its fsync


def _take(queue: "Queue[list[Slice]]", loop: Loop) -> None:
    while True:
        # What we cannot send yet stays in the queue for a sender that can.
        loop.wants.wait()
        slices = queue.get()
        loop.wants.clear()
        loop.push(slices)


class _Settler:
    """Has outcomes settled, in batches, until None arrives; a state process that is away is waited for."""

    def __init__(self, outcomes: SimpleQueue[list[Result] | None], client: Client, generation: int) -> None:
        self._outcomes = outcomes
        self._client = client
        self._generation = generation
        self._since: float | None = None

    def settled_at(self) -> float:
        """When all had been settled that there was (monotonic): now, unless something has been waiting since then."""
        since = self._since
        return time.monotonic() if since is None else since

    def run(self) -> None:
        last = False
        while not last:
            batch = [self._outcomes.get()]
            if batch[0] is not None:
                time.sleep(SETTLE_EVERY)
            try:
                while batch[-1] is not None:
                    batch.append(self._outcomes.get_nowait())
            except Empty:
                pass
            last = batch[-1] is None
            if results := join(result for results in batch if results for result in results):
                self._settle(results)

    def _settle(self, results: Sequence[Result]) -> None:
        self._since = time.monotonic()
        troubled = False
        while True:
            try:
                self._client.settle(self._generation, results, time.time())
                break
            except StateUnavailable as error:
                if not troubled:
                    log.logger.warning("outcomes wait to be settled: %s", error)
                troubled = True
                time.sleep(0.1)
        self._since = None


def main(
    settings: Settings,
    name: str,
    generation: int,
    queue: "Queue[list[Slice]]",
    crash_log: MutableSequence[int],
    cells: MutableSequence[float],
    address: str,
    authkey: bytes,
    control: Connection,
) -> None:
    """The sender process `name` of a generation. Tells `control` that it is ready, or why it cannot start; finishes
    what is in flight when told to there.
    """
    child.enter(name, settings)
    try:
        found = upstreams.from_settings(settings)
    except Fatal as error:
        child.refuse(control, Exit.SENDER, str(error))
    settled: SimpleQueue[list[Result] | None] = SimpleQueue()
    counting = Counters(cells, list(DIALECTS))
    loop = Loop(found, settings.connections, settings.upstream_timeout, settled, CrashLog(crash_log), counting)
    settler = _Settler(settled, Client(address, authkey), generation)
    settling = threading.Thread(target=settler.run, name="settler")
    settling.start()
    running = threading.Thread(target=loop.run, name="loop")
    running.start()
    threading.Thread(target=_take, args=(queue, loop), name="taker", daemon=True).start()
    control.send(("ready", None))
    child.wait_for_word(control, loop.progress, settler.settled_at)
    loop.finish()
    running.join()
    settled.put(None)
    settling.join()
    child.leave(Exit.OK)
