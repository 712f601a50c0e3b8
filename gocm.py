#!/usr/bin/env python3
"""GoCM takes push notifications over plain HTTP, answers at once, and delivers them to Google in the background.

    curl, applications
          | HTTP
    server --> intake ==accept==> +-------+
    (front process)               | state |  spool + report: one SQLite file, one process that owns it
          feeder <====claim====== +-------+
             |                        ^
             | a multiprocessing.Queue|  settle
             v                        |
        sender 1..N ------------------+
             | HTTPS, kept alive, hundreds of requests in flight each
        upstream: fcm (HTTP v1), gcm (legacy), or the sandbox

Try it, with no Google account (`gocm.py --sandbox` pretends one):

    curl -d tokens=phone-1 -d tokens=gone-phone-2 --data-urlencode 'payload={"title":"Hello"}' localhost:5601/gcm/send
    curl localhost:5601/gcm/report

To read the code, take gocm_lib in the order of its imports: early, deadline, settings, proxy, config, conceal,
logwriter, log, systemd, listener, cpu, child: how a process of ours comes to be; job, outcome: what a message is and
what becomes of it; pace, blame: how fast Google may be sent to, and whose trouble it is; gcm, fcm: how each wants it,
all pure; credentials, wire, width, upstream: how one reaches Google; limits, poison, turns, traffic: what is too much,
which message makes senders die, whose turn it is, who may be sent to now; spool, history, report, idempotency,
database, client, state: what is on disk and who may change it; meter, sender; vitals: what the front knows of the
whole; intake, feeder; request, access, gate, health, metrics, trend, dashboard, pages, openapi, service, server: the
HTTP front; feedback; exporter; strain, pretend, sandbox: Google played by ourselves; rundir: where our processes meet;
supervisor: who starts and watches whom; bench: what it costs; bundle: the single file; remote, campaign, watch, init,
cli, start: all commands.

The promise: what was answered with 200 is on disk and is offered to the upstream until a final answer, through any
crash; at worst a token is sent twice, where a process died between the upstream's taking it and our recording that.
README.md words it for users. Exit codes are listed there and in settings.Exit: 0 clean stop, 2 usage, 78 configuration,
69 address in use, 75 spool in use, 65 spool damaged, 73 spool not writable, 74 disk failed, 3 sender cannot start,
70 crash loop.
"""

from gocm_lib.start import main

if __name__ == "__main__":
    raise SystemExit(main())
