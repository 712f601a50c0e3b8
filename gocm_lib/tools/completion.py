"""`gocm completion SHELL`: what a shell needs to complete our commands, options, topics and files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from typing import Any, NamedTuple

from gocm_lib.config import values
from gocm_lib.config.settings import CompletionSettings, Exit, Fatal, flag, option_flag, rows
from gocm_lib.config.usage import brief
from gocm_lib.help.topics import TOPICS
from gocm_lib.tools import failed, feedback

FILES = ("FILE", "PATH", "DIR")  # metavars of options that name one


class Completed(NamedTuple):
    """A command: its options, and the words that may follow it."""

    options: tuple[Field[Any], ...]
    words: tuple[str, ...]


def command(words: Sequence[str], commands: Mapping[str, type]) -> int:
    """Print the completions for the shell that `words` names. `commands` are all of ours, and their kinds of options.
    Raises Fatal.
    """
    given = values.parse(CompletionSettings, words, {}, "gocm completion", words="SHELL").words
    if len(given) != 1 or given[0] not in SHELLS:
        raise Fatal("say for which shell: gocm completion bash, zsh or fish", Exit.USAGE)
    follow = {
        "failed": failed.ACTIONS,
        "feedback": feedback.ACTIONS,
        "help": tuple(TOPICS),
        "sandbox": ("exec",),
        "completion": tuple(SHELLS),
    }
    completed = {name: Completed(tuple(rows(kind)), follow.get(name, ())) for name, kind in commands.items()}
    print(SHELLS[given[0]](completed), end="")
    return Exit.OK


def _is_flag(row: Field[Any]) -> bool:
    return row.metadata["read"] is flag


def _names(commands: Mapping[str, Completed], wanted: Callable[[Field[Any]], bool]) -> list[str]:
    return sorted({option_flag(row) for each in commands.values() for row in each.options if wanted(row)})


def _bash(commands: Mapping[str, Completed]) -> str:
    files = _names(commands, lambda row: row.metadata["metavar"] in FILES)
    others = _names(commands, lambda row: not _is_flag(row) and row.metadata["metavar"] not in FILES)
    cases = [
        f"        {name}) words='{' '.join([*each.words, *map(option_flag, each.options), '--help'])}' ;;"
        for name, each in commands.items()
    ]
    return f"""\
# source <(gocm completion bash)
_gocm() {{
    local word words command=serve
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$word" in {"|".join(commands)}) command=$word; break ;; esac
    done
    COMPREPLY=()
    case "$3" in
        {"|".join(files)}) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$2"); return ;;
        {"|".join(others)}) return ;;
    esac
    case "$command" in
{chr(10).join(cases)}
    esac
    [ "$COMP_CWORD" = 1 ] && words="{" ".join(commands)} $words"
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$2")
}}
complete -F _gocm gocm gocm.pyz
"""


def _quoted(text: str) -> str:
    """A text within single quotes of a shell, where zsh gives brackets and colons a meaning."""
    return text.replace("'", "'\\''").replace("[", "(").replace("]", ")").replace(":", " -")


def _zsh(commands: Mapping[str, Completed]) -> str:
    cases = []
    for name, each in commands.items():
        rows = [f"'{option_flag(row)}[{_quoted(brief(row))}]{_zsh_value(row)}'" for row in each.options]
        rows += [f"'*:word:({' '.join(each.words)})'"] if each.words else []
        cases.append(f"        {name}) _arguments -s '--help[explain]' {' '.join(rows)} ;;")
    return f"""\
#compdef gocm gocm.pyz
# in a file _gocm of a folder in $fpath, or source <(gocm completion zsh)
_gocm() {{
    local command=serve
    case "${{words[2]}}" in {"|".join(commands)}) command=${{words[2]}} ;; esac
    if (( CURRENT == 2 )) && [[ "$PREFIX" != -* ]]; then
        compadd -- {" ".join(commands)}
        return
    fi
    if [[ "${{words[2]}}" == "$command" ]]; then
        shift words
        (( CURRENT-- ))
    fi
    case "$command" in
{chr(10).join(cases)}
    esac
}}
[[ -z "$functions[compdef]" ]] || compdef _gocm gocm gocm.pyz
"""


def _zsh_value(row: Field[Any]) -> str:
    metavar = row.metadata["metavar"]
    return "" if _is_flag(row) else f":{metavar.replace(':', ' ')}:{'_files' if metavar in FILES else ''}"


def _fish(commands: Mapping[str, Completed]) -> str:
    known = " ".join(name for name in commands if name != "serve")
    lines = ["# gocm completion fish > ~/.config/fish/completions/gocm.fish", "complete -c gocm -f"]
    lines += [f"complete -c gocm -n __fish_use_subcommand -a '{' '.join(commands)}'"]
    for name, each in commands.items():
        when = f"__fish_seen_subcommand_from {name}" if name != "serve" else f"not __fish_seen_subcommand_from {known}"
        if each.words:
            lines.append(f"complete -c gocm -n '{when}' -a '{' '.join(each.words)}'")
        for row in each.options:
            value = "" if _is_flag(row) else " -r -F" if row.metadata["metavar"] in FILES else " -x"
            about = brief(row).replace("'", "\\'")
            lines.append(f"complete -c gocm -n '{when}' -l {option_flag(row)[2:]}{value} -d '{about}'")
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[Mapping[str, Completed]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
