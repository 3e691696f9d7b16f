"""What all commands share: options, JSON or people's form, errors, exit status."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from dcres.errors import ConfigError, DcresError
from dcres.linux.interrupt import OperationInterrupted

JSON_FLAG = "--json"
DEBUG_FLAG = "--debug"

JsonOption = Annotated[
    bool, typer.Option(JSON_FLAG, help="Print one JSON object; everything else goes to stderr.")
]
DebugOption = Annotated[bool, typer.Option(DEBUG_FLAG, help="Log more, and show tracebacks.")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="The Ray cluster; default: RAY_ADDRESS, or the one that `dcres up` started.",
    ),
]


def folder(text: str) -> Path:
    """A store named on the command line; as ``"$UNSET"`` leaves it: none."""
    from dcres.config import named_folder

    return named_folder(text, "the store")


StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        parser=folder,
        help="Where this machine reads checkpoints (hosts write to their own DCRES_STORE); "
        "default: DCRES_STORE, the local cluster's, or the hosts are asked.",
    ),
]

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@dataclass(frozen=True, slots=True)
class Options:
    """The options that commands share; they may stand before the command, too."""

    json: bool = False
    debug: bool = False
    address: str | None = None
    store: Path | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A command's answer: as JSON values, and as people read it."""

    values: dict[str, Any]
    shown: RenderableType = ""
    status: int = 0


class Interrupted(Exception):
    """KeyboardInterrupt on its way out: typer would end the program by itself, without a word.

    Its text is that of an `OperationInterrupted`.
    """


_SHARED = {
    "json": (JsonOption, False),
    "debug": (DebugOption, False),
    "address": (AddressOption, None),
    "store": (StoreOption, None),
}
HERE = ("json", "debug")  # for commands that join no cluster
CLUSTER = (*HERE, "address")  # that ask the cluster alone
CHECKPOINTS = (*CLUSTER, "store")  # that read checkpoints, too


def add_command(
    app: typer.Typer, name: str, *, panel: str, shared: tuple[str, ...] = CLUSTER
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Make a command of a function that takes `Options` first and returns an `Answer`.

    The shared options are added to its own. One that stands before the command counts for the
    function's own parameter of that name as well.
    """

    def decorate(function: Callable[..., Answer]) -> Callable[..., Answer]:
        @functools.wraps(function)
        def run(ctx: typer.Context, **arguments: Any) -> None:
            given = {key: arguments.pop(key) for key in shared}
            before = ctx.obj or Options()
            _require_known(ctx, before, {*given, *arguments})
            for key in arguments.keys() & _SHARED.keys():
                arguments[key] = arguments[key] or getattr(before, key)
            options = _merge(before, given)
            try:
                answer = function(options, **arguments)
            except OperationInterrupted as error:
                raise Interrupted(str(error)) from None
            except KeyboardInterrupt:
                raise Interrupted from None
            write(answer, as_json=options.json)
            raise typer.Exit(answer.status)

        signature = inspect.signature(function, eval_str=True)
        own = list(signature.parameters.values())[1:]
        kind = inspect.Parameter.KEYWORD_ONLY
        context = inspect.Parameter("ctx", kind, annotation=typer.Context)
        added = [
            inspect.Parameter(key, kind, default=_SHARED[key][1], annotation=_SHARED[key][0])
            for key in shared
        ]
        parameters = [context, *(each.replace(kind=kind) for each in own), *added]
        run.__dict__["__signature__"] = signature.replace(
            parameters=parameters, return_annotation=None
        )
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        del run.__dict__["__wrapped__"]
        app.command(name, rich_help_panel=panel)(run)
        return function

    return decorate


def _require_known(ctx: typer.Context, before: Options, known: set[str]) -> None:
    """Refuse an option before a command that does not have it, as it is refused after it."""
    for key in _SHARED:
        if getattr(before, key) not in (None, False) and key not in known:
            command = ctx.command_path
            raise ConfigError(f"`{command}` has no option --{key}; see `{command} --help`")


def _merge(options: Options, given: dict[str, Any]) -> Options:
    # An empty --address is none that was left out: a variable of a script may have no value.
    given = {key: value for key, value in given.items() if value not in (None, False)}
    return replace(options, **given)


def confirm(options: Options, what: str, question: str, *, yes: bool) -> None:
    """Ask before something is gone for good, unless `yes`. Raises ConfigError, typer.Abort."""
    if yes:
        return
    if options.json or not sys.stdin.isatty():
        raise ConfigError(f"{what} needs confirmation; give --yes")
    typer.confirm(question, abort=True, err=True)


def write(answer: Answer, *, as_json: bool) -> None:
    """Print an answer on standard output."""
    if as_json:
        print(json.dumps(answer.values, default=str))
    elif answer.shown != "":
        stdout_console().print(answer.shown)
    sys.stdout.flush()


def write_error(error: BaseException, message: str, *, as_json: bool) -> None:
    """One sentence on standard error; with --json one object on standard output as well."""
    if as_json:
        facts = error.to_dict() if isinstance(error, DcresError) else {}
        said = {**facts, "error": type(error).__name__, "message": message}
        print(json.dumps(said, default=str), flush=True)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("error:", style="bold red", end=" ")
    console.print(message, markup=False)


def stdout_console() -> Console:
    """Where results go; as wide as it takes when it is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)
