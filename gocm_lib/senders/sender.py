"""One sender process: takes slices from its generation's queue, sends them, settles what became of them.

        queue -> [ loop: one thread, up to thousands of requests in flight ] -> State
                     ^ connected channels
                dialling threads

Module loop does the work; this is the process around it. Promises that each token taken is settled once, unless this
process dies or finishes first: then the token is still claimed by this generation, and the supervisor has it released.
"""

import threading
from collections.abc import MutableSequence, Sequence
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue

from gocm_lib.config.settings import Exit, Fatal, Settings
from gocm_lib.message.job import Slice
from gocm_lib.monitoring.counters import Counters
from gocm_lib.process import child
from gocm_lib.process.bell import Bell
from gocm_lib.senders import upstream as upstreams
from gocm_lib.senders.crash_log import CrashLog
from gocm_lib.senders.loop import Loop
from gocm_lib.senders.pipe import Inlet
from gocm_lib.senders.settler import Settler
from gocm_lib.state.client import LoopClient


def main(
    settings: Settings,
    name: str,
    generation: int,
    queue: "Queue[list[Slice]]",
    crash_log: MutableSequence[int],
    cells: MutableSequence[float],
    lease: Sequence[float],
    address: str,
    authkey: bytes,
    control: Connection,
) -> None:
    """The sender process `name` of a generation. Tells `control` that it is ready, or why it cannot start; finishes
    what is in flight when told to there. Nothing is sent after the time that `lease` has.
    """
    child.enter(name, settings)
    try:
        found = upstreams.from_settings(settings)
    except Fatal as error:
        child.refuse(control, Exit.SENDER, str(error))
    bell = Bell()
    settler = Settler(LoopClient(address, authkey, bell.ring), generation)
    counting = Counters(cells, list(found))
    loop = Loop(
        found,
        settings.connections,
        settings.upstream_timeout,
        bell,
        Inlet(queue),
        settler,
        CrashLog(crash_log),
        counting,
        lease,
    )
    running = threading.Thread(target=loop.run, name="loop")
    running.start()
    control.send(("ready", None))
    child.wait_for_word(control, loop.progress, settler.settled_at)
    loop.finish()
    running.join()
    child.leave(Exit.OK)
