"""All figures by name, in three forms: Prometheus's text, Graphite's lines, StatsD's datagrams. Pure.

Each metric is one row of METRICS with its meaning; the help's table is made from it. Promises that every series
exists from the start, so that the first failure of a kind shows as a step from 0, and that no token and no id of an
application is ever a label.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from gocm_lib import __version__
from gocm_lib.message.outcome import FAILURES, RETRIES
from gocm_lib.monitoring.collector import Figures
from gocm_lib.monitoring.counters import Answers, Histogram
from gocm_lib.state.contract import LISTS, Count, Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DATAGRAM = 1432  # bytes that fit into one packet of an Ethernet

Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float | Histogram]]


class Metric(NamedTuple):
    """A metric. Its kind is counter, gauge or histogram. `read` returns the value for each combination of labels."""

    name: str
    kind: str
    labels: Labels
    help: str
    read: Callable[[Figures], Samples]


def _counted(name: str, reasons: Iterable[str] = ("",)) -> Callable[[Figures], Samples]:
    """A counter from the spool, for each upstream (and reason)."""
    reasons = tuple(reasons)

    def read(figures: Figures) -> Samples:
        if figures.snapshot is None:
            return
        counts = figures.snapshot.own
        for upstream in figures.upstreams:
            for reason in reasons:
                labels = (upstream, reason) if reason else (upstream,)
                yield labels, counts.get(Count(name, upstream, reason), 0)

    return read


def _snapshot(read: Callable[[Snapshot, float], Mapping[str, float] | float]) -> Callable[[Figures], Samples]:
    """A figure of the state process: one value, or one for each value of a label."""

    def samples(figures: Figures) -> Samples:
        if figures.snapshot is None:
            return
        found = read(figures.snapshot, figures.now)
        if isinstance(found, Mapping):
            yield from (((label,), value) for label, value in found.items())
        else:
            yield (), found

    return samples


def _of_each(read: Callable[[Snapshot, str], float]) -> Callable[[Figures], Samples]:
    """A figure of the state process, of each upstream."""

    def samples(figures: Figures) -> Samples:
        if figures.snapshot is not None:
            yield from (((name,), read(figures.snapshot, name)) for name in figures.upstreams)

    return samples


def _by(read: Callable[[Figures], Mapping[str, float | Histogram]]) -> Callable[[Figures], Samples]:
    """A figure of the front, by one label."""
    return lambda figures: (((label,), value) for label, value in read(figures).items())


def _one(read: Callable[[Figures], float | Histogram]) -> Callable[[Figures], Samples]:
    return lambda figures: [((), read(figures))]


def _build(figures: Figures) -> Samples:
    import platform

    import urllib3

    yield (__version__, platform.python_version(), urllib3.__version__), 1  # type: ignore[attr-defined]


def _of_upstreams(read: Callable[[Answers], Mapping[str, float] | float]) -> Callable[[Figures], Samples]:
    """What senders have counted of each upstream: one value, or one for each value of a label."""

    def samples(figures: Figures) -> Samples:
        for upstream, answers in figures.upstreams.items():
            found = read(answers)
            if isinstance(found, Mapping):
                yield from (((upstream, label), value) for label, value in found.items())
            else:
                yield (upstream,), found

    return samples


METRICS = (
    Metric("gocm_build_info", "gauge", ("version", "python", "urllib3"), "1; what runs is in the labels", _build),
    Metric(
        "gocm_state_up", "gauge", (), "whether the state process answers; without it what is counted in the spool is "
        "missing here", _one(lambda f: f.snapshot is not None),
    ),
    Metric(
        "gocm_requests_total", "counter", ("route", "code"), "requests answered; route: a path of Routes, or other",
        lambda f: (((route, str(code)), count) for (route, code), count in f.requests.items()),
    ),
    Metric(
        "gocm_request_duration_seconds", "histogram", ("route",), "from the whole request to its answer",
        _by(lambda f: f.durations),
    ),
    Metric("gocm_rejected_total", "counter", ("cause",), "requests that were turned down", _by(lambda f: f.rejected)),
    Metric("gocm_messages_accepted_total", "counter", ("upstream",), "messages kept", _counted("accepted_messages")),
    Metric("gocm_tokens_accepted_total", "counter", ("upstream",), "their tokens", _counted("accepted_tokens")),
    Metric(
        "gocm_send_attempts_total", "counter", ("upstream",), "tokens tried, each once however often it was retried",
        _counted("attempts"),
    ),
    Metric(
        "gocm_tokens_delivered_total", "counter", ("upstream",), "tokens that the upstream took", _counted("delivered")
    ),
    Metric(
        "gocm_send_failures_total", "counter", ("upstream", "reason"), "tokens that ended without being delivered",
        _counted("failures", FAILURES),
    ),
    Metric(
        "gocm_tokens_cancelled_total", "counter", ("upstream",), "tokens that somebody stopped before they were sent",
        _counted("cancelled"),
    ),
    Metric(
        "gocm_tokens_replayed_total", "counter", ("upstream",), "failed tokens that were sent again as if new",
        _counted("replayed"),
    ),
    Metric(
        "gocm_retries_total", "counter", ("upstream", "cause"), "attempts after which a token is tried again",
        _counted("retries", RETRIES),
    ),
    Metric(
        "gocm_tokens_unregistered_total", "counter", ("upstream",), "times the upstream called a token unregistered",
        _counted("notregistered"),
    ),
    Metric(
        "gocm_canonical_ids_total", "counter", ("upstream",), "how often the upstream replaced a token",
        _counted("canonicals"),
    ),
    Metric(
        "gocm_report_entries", "gauge", ("list",), "entries that wait to be read",
        _snapshot(lambda s, now: {which: s.listed.get(which, 0) for which in LISTS}),
    ),
    Metric(
        "gocm_report_held", "gauge", (), "unregistered tokens that --hold-waves holds back: release or discard them",
        _snapshot(lambda s, now: s.held),
    ),
    Metric(
        "gocm_unregistered_wave", "gauge", ("upstream",),
        "1 while far more answers than usual call a token unregistered: look before you delete",
        _of_each(lambda s, name: int(name in s.waves)),
    ),
    Metric(
        "gocm_upstream_held", "gauge", ("upstream",), "1 while somebody holds the upstream: nothing is sent to it",
        _of_each(lambda s, name: int(name in s.held_upstreams)),
    ),
    Metric(
        "gocm_upstream_pending_tokens", "gauge", ("upstream",), "tokens that are to be sent to it still",
        _of_each(lambda s, name: s.waiting.get(name, 0)),
    ),
    Metric(
        "gocm_report_dropped_total", "counter", ("list",), "entries that a full list (--max-report) had no room for",
        _snapshot(lambda s, now: {which: s.own.get(Count("dropped", reason=which), 0) for which in LISTS}),
    ),
    Metric(
        "gocm_idempotency_keys", "gauge", (), "Idempotency-Keys that are remembered", _snapshot(lambda s, now: s.keys)
    ),
    Metric(
        "gocm_idempotency_forgotten_total", "counter", (), "keys that were forgotten before their day was over: "
        "--max-keys", _snapshot(lambda s, now: s.own.get(Count("keys_forgotten"), 0)),
    ),
    Metric(
        "gocm_upstream_responses_total", "counter", ("upstream", "code"), "answers of this run; none: no answer came",
        _of_upstreams(lambda a: a.codes),
    ),
    Metric(
        "gocm_upstream_connections", "gauge", ("upstream", "protocol"), "connections of all senders",
        _of_upstreams(lambda a: a.connections),
    ),
    Metric(
        "gocm_upstream_in_flight", "gauge", ("upstream",), "requests that wait for their answer",
        _of_upstreams(lambda a: a.in_flight),
    ),
    Metric(
        "gocm_upstream_goaways_total", "counter", ("upstream", "code"),
        "connections of HTTP/2 that the upstream has ended: NO_ERROR is its habit, anything else is not",
        _of_upstreams(lambda a: a.goaways),
    ),
    Metric(
        "gocm_upstream_refused_streams_total", "counter", ("upstream",),
        "requests that the upstream refused by HTTP/2 without looking at them; they are sent again",
        _of_upstreams(lambda a: a.refused),
    ),
    Metric(
        "gocm_upstream_repeats_total", "counter", ("upstream",),
        "requests that were sent again at once, because the upstream had not looked at them, or most likely not",
        _of_upstreams(lambda a: a.repeated),
    ),
    Metric(
        "gocm_upstream_request_duration_seconds", "histogram", ("upstream",), "how long they took",
        _by(lambda f: {name: answers.latency for name, answers in f.upstreams.items()}),
    ),
    Metric(
        "gocm_last_success_timestamp_seconds", "gauge", ("upstream",), "when it last answered 200; 0: not in this run",
        _by(lambda f: {name: answers.succeeded_at for name, answers in f.upstreams.items()}),
    ),
    Metric(
        "gocm_upstream_paused_until_timestamp_seconds", "gauge", ("upstream",), "when it is tried again; 0: not paused",
        _of_each(lambda s, name: s.paused_until.get(name, 0.0)),
    ),
    Metric(
        "gocm_credential_expiry_timestamp_seconds", "gauge", ("upstream",),
        "when its access token ends; +Inf: a key, which does not; 0: there is none",
        _by(lambda f: {name: f.token_expiry.get(name) or 0.0 for name in f.upstreams}),
    ),
    Metric(
        "gocm_tls_certificate_expiry_timestamp_seconds", "gauge", (), "when that of --tls-cert ends; 0: there is none",
        _one(lambda f: f.certificate_end or 0.0),
    ),
    Metric(
        "gocm_queue_wait_seconds", "histogram", (), "from being accepted to the first attempt",
        _one(lambda f: f.queue_wait),
    ),
    Metric("gocm_pending", "gauge", (), "messages that are not finished", _snapshot(lambda s, now: s.pending)),
    Metric(
        "gocm_spool_tokens", "gauge", ("state",),
        "ready: to be sent (again); claimed: being sent; failed: kept for replay; over: ended, can be looked up",
        _snapshot(
            lambda s, now: {"ready": s.tokens - s.claimed, "claimed": s.claimed, "failed": s.failed, "over": s.over}
        ),
    ),
    Metric(
        "gocm_spool_oldest_seconds", "gauge", (), "age of the oldest message that is not finished: alert on this",
        _snapshot(lambda s, now: max(0.0, now - s.oldest) if s.oldest is not None else 0.0),
    ),
    Metric("gocm_spool_bytes", "gauge", (), "what the spool holds", _snapshot(lambda s, now: s.bytes)),
    Metric(
        "gocm_nodes", "gauge", ("state",), "nodes that share a spool in PostgreSQL: alive, or not heard of",
        _snapshot(lambda s, now: {
            state: sum(node.alive == (state == "alive") for node in s.nodes) for state in ("alive", "gone")
        }),
    ),
    Metric("gocm_senders", "gauge", (), "senders that are ready", _one(lambda f: f.senders)),
    Metric(
        "gocm_restarts_total", "counter", ("kind",), "children that died and were replaced", _by(lambda f: f.restarts)
    ),
    Metric(
        "gocm_process_cpu_seconds_total", "counter", ("process",), "CPU time of our processes, those that are gone too",
        _by(lambda f: {name: figures.cpu for name, figures in f.processes.items()}),
    ),
    Metric(
        "gocm_process_resident_memory_bytes", "gauge", ("process",), "their memory",
        _by(lambda f: {name: figures.memory for name, figures in f.processes.items()}),
    ),
    Metric(
        "gocm_feedback_requests_total", "counter", ("result",), "requests to --feedback-url: taken, or failed",
        _by(lambda f: f.feedback),
    ),
    Metric(
        "gocm_log_dropped_total", "counter", (), "lines of the log that nobody took in time",
        _one(lambda f: f.lines_dropped),
    ),
    Metric(
        "gocm_export_failures_total", "counter", ("to",), "sendings to Graphite and StatsD that failed",
        _by(lambda f: f.export_failures),
    ),
    Metric(
        "process_cpu_seconds_total", "counter", (), "of the front process",
        _one(lambda f: f.processes["front"].cpu if "front" in f.processes else 0.0),
    ),
    Metric(
        "process_resident_memory_bytes", "gauge", (), "of the front process",
        _one(lambda f: f.processes["front"].memory if "front" in f.processes else 0.0),
    ),
    Metric("process_open_fds", "gauge", (), "of the front process", _one(lambda f: f.files)),
    Metric("process_max_fds", "gauge", (), "of the front process", _one(lambda f: f.max_files)),
    Metric("process_start_time_seconds", "gauge", (), "of the front process", _one(lambda f: f.started_at)),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- Prometheus's text


def prometheus(figures: Figures) -> bytes:
    """The text format 0.0.4 (prometheus.io/docs/instrumenting/exposition_formats)."""
    lines: list[str] = []
    for metric in METRICS:
        lines.append(f"# HELP {metric.name} {_escape(metric.help)}")
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        for labels, value in metric.read(figures):
            pairs = list(zip(metric.labels, labels))
            if isinstance(value, Histogram):
                lines += _histogram(metric.name, pairs, value)
            else:
                lines.append(f"{metric.name}{_braces(pairs)} {_number(value)}")
    return ("\n".join(lines) + "\n").encode()


def _histogram(name: str, pairs: list[tuple[str, str]], histogram: Histogram) -> Iterator[str]:
    so_far = 0.0
    for bound, count in zip((*histogram.bounds, math.inf), list(histogram.counts)):
        so_far += count
        yield f"{name}_bucket{_braces([*pairs, ('le', _number(bound))])} {_number(so_far)}"
    yield f"{name}_sum{_braces(pairs)} {_number(histogram.total)}"
    yield f"{name}_count{_braces(pairs)} {_number(so_far)}"


def _braces(pairs: list[tuple[str, str]]) -> str:
    shown = ",".join(f'{name}="{_escape(value, quote=True)}"' for name, value in pairs)
    return f"{{{shown}}}" if shown else ""


def _escape(text: str, quote: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quote else text


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(float(value))


# ---------------------------------------------------------------------------------------------- Graphite's and StatsD's

# The five counters of the report, by the names that they have had in Graphite since the first GoCM.
REPORT = ("attempts", "failures", "pending", "canonicals", "notregistered")


class Sample(NamedTuple):
    """A figure under its path: words separated by dots."""

    path: str
    kind: str
    value: float


def samples(figures: Figures, prefix: str) -> list[Sample]:
    """All figures. Of histograms only count and sum, without the buckets."""
    found: list[Sample] = []
    if figures.snapshot is not None:
        report = figures.snapshot.counters | {"pending": figures.snapshot.pending}
        found += [
            Sample(f"{prefix}.{name}", "gauge" if name == "pending" else "counter", report[name]) for name in REPORT
        ]
    for metric in METRICS:
        for labels, value in metric.read(figures):
            words = [metric.name.removeprefix("gocm_"), *labels]
            path = ".".join([prefix, *(re.sub("[^A-Za-z0-9_-]+", "_", word).strip("_") for word in words)])
            if isinstance(value, Histogram):
                found.append(Sample(path + ".count", "counter", sum(value.counts)))
                found.append(Sample(path + ".sum", "counter", value.total))
            elif math.isfinite(value) and path != f"{prefix}.pending":
                found.append(Sample(path, metric.kind, value))
    return found


def graphite(samples: Iterable[Sample], now: float) -> bytes:
    """Graphite's plaintext protocol: the present value of each figure; counters from the beginning on."""
    return "".join(f"{path} {_number(value)} {int(now)}\n" for path, _, value in samples).encode()


def _change(value: float, before: float) -> float:
    return value - before if value >= before else value


def statsd(samples: Iterable[Sample], before: Mapping[str, float]) -> list[bytes]:
    """StatsD's datagrams: gauges as they are; of counters what was added since `before`, by path. A counter below its
    old value has started afresh.
    """
    lines = []
    for path, kind, value in samples:
        if kind == "gauge":
            lines.append(f"{path}:{_number(value)}|g")
        elif change := _change(value, before.get(path, 0.0)):
            lines.append(f"{path}:{_number(change)}|c")
    datagrams: list[bytes] = []
    for line in (line.encode() for line in lines):
        if datagrams and len(datagrams[-1]) + 1 + len(line) <= DATAGRAM:
            datagrams[-1] += b"\n" + line
        else:
            datagrams.append(line)
    return datagrams
