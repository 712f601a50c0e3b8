"""The door under Google's own names: who has an SDK that cannot be told another address sends by us all the same.

A listener of its own, by TLS, with certificates of module google; who takes it for his proxy is led there (module led).
Nothing but push is served here. Messages go the way of the v1 door. What is about topics is passed on to Google with
our upstream's token, and answered as it comes. Who may: who has signed with the account of an upstream here (module
accounts), or has an account file of ours. Promises that Google's name never leads the messages that we send back to us.
"""

import functools
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from http.client import HTTPException
from urllib.parse import parse_qsl, urlsplit

from gocm_lib.config.proxy import ways
from gocm_lib.config.settings import Fatal, Settings, UpstreamSettings, is_loopback
from gocm_lib.config.upstreams import described
from gocm_lib.front import accounts, auth, google, v1
from gocm_lib.front.auth import EVERYBODY, Grant
from gocm_lib.front.exchange import exchange
from gocm_lib.front.handlers import Handlers
from gocm_lib.front.request import Head, Request
from gocm_lib.front.response import Response
from gocm_lib.front.routes import Route
from gocm_lib.message import assertion, fcm, fcm_door
from gocm_lib.message.bad_request import BadRequest
from gocm_lib.message.fcm_door import JSON

OURS = "GoCM"  # what we call ourselves when we send
LOOK = 5.0  # seconds for finding out where Google's names lead
PASSED_ON = ("content-type", "access_token_auth")  # headers of the client's that Google is to see
MOST = 64 * 1024  # bytes of a message: FCM takes 4,096 of payload
MOST_ABOUT_TOPICS = 1024 * 1024  # bytes: 1,000 tokens, and room
_TOKENS = {urlsplit(each).path for each in assertion.AUDIENCES}
_IID = re.compile("/iid/v1:batch(?:Add|Remove)")
# What is passed on must mean there what it means here: no dots, slashes or backslashes in disguise.
_PART = r"(?!\.)(?:[A-Za-z0-9_.~:-]|%(?!2[EFef]|5[Cc])[0-9A-Fa-f]{2})"
_SUBSCRIPTIONS = re.compile(
    rf"/v1/projects/([^/]{{1,64}})/registrations/{_PART}{{1,4096}}/topicSubscriptions(?:/{_PART}{{1,900}})?"
)
_PLAIN = re.compile(r"[\x20-\x7e]{1,256}")  # a header that is passed on
_QUERY = re.compile(r"[A-Za-z0-9_.~:%&=+-]*")


def _token(handlers: Handlers, request: Request) -> Response:
    """An access token, as Google's endpoint gives one."""
    try:
        form = dict(parse_qsl(request.body.decode("ascii"), max_num_fields=8))
    except ValueError:
        form = {}
    if handlers.policy.grants and _is_ours(handlers, form):
        return v1.token(handlers, request)
    if form.get("grant_type") != assertion.GRANT:
        return _refused("unsupported_grant_type", "Invalid grant_type: " + form.get("grant_type", "")[:64])
    try:
        given = accounts.give(handlers.senders, form.get("assertion", ""), time.time())
    except BadRequest as problem:
        return _refused("invalid_grant", problem.error)
    granted = {"access_token": given, "expires_in": accounts.LIFE - 1, "token_type": "Bearer"}
    return Response(200, json.dumps(granted).encode() + b"\n", JSON)


def _refused(word: str, description: str) -> Response:
    body = json.dumps({"error": word, "error_description": description}).encode() + b"\n"
    return Response(400, body, JSON, refuses_token=word == "invalid_grant")


def _is_ours(handlers: Handlers, form: dict[str, str]) -> bool:
    """Whether a request for a token has an account file that `gocm token new` made."""
    try:
        auth.check({"authorization": f"Bearer {fcm_door.secret(form)}"}, handlers.policy, local=True, public=False)
    except BadRequest:
        return False
    return True


def _topics(handlers: Handlers, request: Request) -> Response:
    """What is about topics, passed on to Google as it is."""
    found = _SUBSCRIPTIONS.fullmatch(request.path)
    if not _QUERY.fullmatch(request.query):
        raise BadRequest("malformed query")
    names = handlers.reach.projects.get(found[1], ()) if found else handlers.reach.dialects
    there = (name for name in names if handlers.reach.dialects[name] == fcm.NAME and request.grant.sees(name))
    name = next(there, "")
    if not name:
        raise BadRequest("no upstream here is for this account and project", status=403)
    authorization = handlers.authorization(name)
    if not authorization:
        raise BadRequest("there is no access token for this just now: come again in a moment", status=503)
    upstream = described(handlers.settings)[name]
    target = f"{_base(upstream, request.headers['host'])}{request.path}{request.query and f'?{request.query}'}"
    asks = {each: request.headers[each] for each in PASSED_ON if each in request.headers}
    asks |= {"Authorization": authorization, "User-Agent": OURS, "Accept-Encoding": "identity"}
    proxy = ways(upstream, os.environ).to(target)
    try:
        answer = exchange(request.method, target, request.body, asks, proxy, tls=_trust(upstream.ca), reads=True)
    except (OSError, HTTPException, ValueError) as error:
        raise BadRequest(f"Google cannot be reached: {type(error).__name__}", status=503) from None
    audit = f"{request.method} {'of a subscription' if found else request.path}, upstream {name}: {answer.status}"
    if not 200 <= answer.status <= 599:
        raise BadRequest("Google cannot be understood just now", status=503)
    kind, later = answer.headers.get("Content-Type", JSON), answer.headers.get("Retry-After", "")
    headers: dict[str, str | Sequence[str]] = {"Retry-After": later} if _PLAIN.fullmatch(later) else {}
    return Response(answer.status, answer.body, kind if _PLAIN.fullmatch(kind) else JSON, headers, audit=audit)


def _base(upstream: UpstreamSettings, host: str) -> str:
    """Where an upstream has what Google has under a host's name: at Google itself there, else where it has FCM."""
    return f"https://{host.partition(':')[0]}" if _host(upstream) in google.NAMES else upstream.url


@functools.lru_cache(maxsize=8)
def _trust(ca: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca or None)


SEND = Route("POST", "/v1/projects/{project}/messages:send", "", v1.send, "", most=MOST, waits=False, right="send")
TOKEN = Route("POST", v1.TOKEN, "", _token, "", public=True, most=v1.LARGEST_ASSERTION, waits=False)
TOPICS = Route("POST", "topics", "", _topics, "", most=MOST_ABOUT_TOPICS, right="topics", outward=True)


def find(method: str, path: str) -> Route:
    """What serves a request here. Raises BadRequest."""
    if _SUBSCRIPTIONS.fullmatch(path) and method in ("GET", "POST", "PATCH", "DELETE"):
        return TOPICS
    route = SEND if v1.PATH.fullmatch(path) else TOKEN if path in _TOKENS else TOPICS if _IID.fullmatch(path) else None
    if route is None:
        raise BadRequest("of Google's services only push is served here; see gocm help google", status=404)
    if method != "POST":
        raise BadRequest("use POST here", status=405, allow="POST")
    return route


def admit(handlers: Handlers, head: Head | Request, route: Route) -> Grant:
    """What the token of a request is good for. Raises BadRequest when it may not be made."""
    host = head.headers.get("host", "").lower()
    if host.removesuffix(":443") not in google.NAMES:
        raise BadRequest("only Google's names for push are served here", "host", 421)
    if head.headers.get("user-agent") == OURS:
        raise BadRequest("this is GoCM itself: Google's name leads back to it", status=508)
    auth.check(head.headers, auth.Policy(), local=False, public=True)  # whether another site's page asks
    if route.public:
        return EVERYBODY
    token = head.headers.get("authorization", "").partition(" ")[2].strip()
    grant = accounts.grant(handlers.senders, token, time.time())
    if grant is None and handlers.policy.grants:
        there = {"authorization": head.headers.get("authorization", "")}
        grant = auth.check(there, handlers.policy, local=True, public=False, right=route.right, now=time.time())
    if grant is None:
        raise BadRequest("Request had invalid authentication credentials.", "authorization", 401)
    return grant


# ------------------------------------------------------------------------------------------- where Google's names lead


def check_no_loop(settings: Settings, port: int) -> None:
    """Raise Fatal when what we send to Google would come to ourselves, who listen on this port."""
    asked = {name: each for name, each in described(settings).items() if _host(each) in google.NAMES}
    led: set[str] = set()
    for name, each in asked.items():
        proxy = ways(each, os.environ).to(each.url)
        if proxy is None:
            led |= {_host(each), *google.NAMES}
        elif proxy.port == port and any(map(_is_here, _addresses(proxy.host))):
            raise Fatal(f"upstream {name}: its proxy {proxy} is --door-google itself: messages would come back to us")
    threads = ThreadPoolExecutor(len(google.NAMES), "look")
    found = {threads.submit(_addresses, host): host for host in sorted(led)}
    for done in wait(found, LOOK).done:
        if here := next(filter(_is_here, done.result()), ""):
            raise Fatal(
                f"{found[done]} is this machine itself ({here}), where --door-google answers: messages would come back "
                "to us; let this name lead here for the applications alone",
                topic="google",
            )
    threads.shutdown(wait=False, cancel_futures=True)


def _host(upstream: UpstreamSettings) -> str:
    return urlsplit(upstream.url).hostname or ""


def _addresses(host: str) -> list[str]:
    """The addresses of a name; none: nobody knows it just now."""
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def _is_here(address: str) -> bool:
    """Whether an address is this machine's."""
    if is_loopback(address):
        return True
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
