#!/usr/bin/env python3
"""GoCM takes push notifications over plain HTTP, answers at once, and delivers them to Google in the background.

    curl, applications
          | HTTP
    server --> intake ==accept==> +-------+  spool + report: one SQLite file, one process that owns it;
    (front process)               | state |  or a PostgreSQL that the state processes of several nodes share
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

gocm_lib/
    cli.py and supervisor.py: the commands; who starts, watches, replaces and stops the processes
    front/       from a client to the spool: listens, reads strictly, commits, then answers. webhook tells the
                 application what became of its tokens
        front listener server loop deadlines connection wire gate workers request chunked auth routes handlers posts
        lists query response render answered intake endings door openapi pages webhook jobs holds rates v1
        google google_files google_variables google_door accounts led exchange served streamed
    senders/     from the spool to Google: claims, sends, settles. feeder runs in the front process, but never speaks
                 with front/: both meet in state/
        feeder generation pipe in_hand sender loop settler pool pools places width dialler connection streams upstream
        credentials access_token quarantine crash_log appetite trust changes
    state/       what is shared: one process. Other rooms know its contract, client and packs alone
        contract client server loop state backlog store history transfer packs admission pacing pace blame turns waves
        sqlite/    database spool notes history report keys upgrade transfer
        postgres/  opening schema database node store spool notes history report keys transfer administration
    message/     what a push is, how each upstream wants it, what its answer means; pure
        bad_request strict_json forms condition job legacy idempotency outcome retry suspect dialects
        v1_schema platforms fcm gcm fcm_door assertion
    monitoring/  what happens in all processes: counted, judged, shown, exported. What must survive is counted in state/
        counters collector health metrics dashboard trend export
    process/     what every process of ours has: its start, its log, its place, its time limits
        early log logwriter framing bell child forkserver restarts resources cpu systemd init run_directory deadline
    config/      every option once, where its value comes from, and what must not be seen of it
        settings upstreams usage values proxy hide_key spool_address
    http2/       HTTP/2 without a socket, for the senders and the sandbox; pure
        huffman hpack frames budget peer client server
    help/        what a user reads, a file a topic, and how a terminal, man and a browser are shown it
        topics markdown terminal man page
    tools/       the commands beside the server. sandbox plays Google, bench measures the server against it
        sandbox lines pretend pretend_answers pretend_schema pretend_tokens pretend_topics pretend_groups received
        tunnel record sandbox_exec strain bench bundle api_client send watch failed feedback cancel
        hold token account manual completion

Imports go down only: cli > supervisor > tools > front | senders > monitoring > state > process, and then
config | message | help | http2.

The promise: what was answered with 200 is on disk and is offered to the upstream until a final answer, through any
crash; at worst a token is sent twice, where a process died between the upstream's taking it and our recording that.
`gocm help promise` words it for users. Exit codes are listed in settings.Exit: 0 clean stop, 2 usage, 78 configuration,
69 address in use, 75 spool in use, 65 spool damaged, 73 spool not writable, 74 disk failed, 3 sender cannot start,
70 crash loop.
"""

from gocm_lib.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
