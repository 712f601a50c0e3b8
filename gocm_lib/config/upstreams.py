"""Upstreams by name: those that the server's own options describe, and those of the configuration file.

The options make `fcm` and `gcm`, as they did when there were no others. A table `[upstream.NAME]` makes one more, and
what it leaves out is as the options say. Everybody who asks what upstreams there are asks here. Pure.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gocm_lib.config.settings import Fatal, Settings, UpstreamSettings, as_flag

FCM, GCM = "fcm", "gcm"  # the dialects, and the upstreams of the options
_TOKENS_FROM = ("credentials", "token_command", "metadata")  # options that say where access tokens come from


def _shared(settings: Settings, dialect: str) -> dict[str, Any]:
    """What the options say of every upstream of a dialect."""
    return {
        "dialect": dialect,
        "url": settings.fcm_url if dialect == FCM else settings.gcm_url,
        "rate": settings.fcm_rate if dialect == FCM else 0,
        "ca": settings.upstream_ca,
        "proxy": settings.proxy,
        "proxy_auth_file": settings.proxy_auth_file,
    }


def named(settings: Settings, name: str, given: Mapping[str, Any]) -> UpstreamSettings:
    """The upstream that a table of this name describes by the options `given` in it. Raises Fatal."""
    where = f"[upstream.{name}] in {settings.config}"
    found = UpstreamSettings(**{**_shared(settings, given.get("dialect", FCM)), **given})
    if name in (FCM, GCM) and found.dialect != name:
        raise Fatal(f"{where} must speak {name}: messages of that name do", topic="upstreams")
    sources = [option for option in _TOKENS_FROM if getattr(found, option)]
    keys = [option for option in ("apikey", "apikey_file") if getattr(found, option)]
    wrong, right = (sources, keys) if found.dialect == GCM else (keys, sources)
    if wrong:
        raise Fatal(f"{where}: {_spelt(wrong[0])} is not for dialect {found.dialect}", topic="upstreams")
    if found.project and found.dialect == GCM:
        raise Fatal(f"{where}: project is not for dialect {GCM}", topic="upstreams")
    if len(right) > 1:
        raise Fatal(f"{where}: {_spelt(right[0])} and {_spelt(right[1])} exclude each other", topic="upstreams")
    if found.token_command and not found.project:
        raise Fatal(f"{where}: project is missing, and the token-command does not name it", topic="upstreams")
    return found


def _spelt(option: str) -> str:
    return as_flag(option).removeprefix("--")


def is_complete(found: UpstreamSettings) -> bool:
    """Whether an upstream has something to be known by."""
    return bool(found.apikey or found.apikey_file or any(getattr(found, option) for option in _TOKENS_FROM))


def of_options(settings: Settings) -> dict[str, UpstreamSettings]:
    """The upstreams that the options describe. Both are there: fcm before gcm, for v1 is the default."""
    found = {}
    if settings.credentials or settings.token_command or settings.fcm_metadata:
        found[FCM] = UpstreamSettings(
            **_shared(settings, FCM),
            credentials=settings.credentials,
            token_command=settings.token_command,
            metadata=settings.fcm_metadata,
            project=settings.fcm_project,
        )
    if settings.apikey:
        found[GCM] = UpstreamSettings(
            **_shared(settings, GCM), apikey=settings.apikey, apikey_file=settings.apikey_file
        )
    return found


def described(settings: Settings) -> dict[str, UpstreamSettings]:
    """Every upstream that can be sent to, by name, the default first. Empty, where there is none."""
    found = {**of_options(settings), **settings.upstream}
    first = settings.default_upstream or next(iter(found), "")
    return {name: found[name] for name in dict.fromkeys((first, *found)) if name in found}


def with_projects(settings: Settings, projects: Mapping[str, str]) -> Settings:
    """The settings with the projects that credentials have told, by upstream."""
    tables = {
        name: replace(each, project=projects[name]) if name in projects else each
        for name, each in settings.upstream.items()
    }
    return replace(settings, fcm_project=projects.get(FCM, settings.fcm_project), upstream=tables)


_OF_SENDERS = ("dialect", "url", "project", "ca", "proxy", "proxy_auth_file")  # what senders are made with


def differ(before: Settings, after: Settings) -> bool:
    """Whether senders with these settings send to other upstreams than those with the settings before."""

    def made(settings: Settings) -> dict[str, list[object]]:
        return {name: [getattr(each, option) for option in _OF_SENDERS] for name, each in described(settings).items()}

    return made(before) != made(after)


def meanings(settings: Settings) -> dict[str, tuple[str, str]]:
    """What each upstream's name means, for what its messages are made: its dialect, and its project (of GCM none)."""
    return {name: (each.dialect, each.project) for name, each in described(settings).items()}
