"""The command line: parses, calls, prints. ``dcres --help`` shows the commands.

Exit status: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from dcres.cli import checkpoints, copies  # add their commands to the app
from dcres.cli.clusters import app
from dcres.cli.frame import (
    DEBUG_FLAG,
    JSON_FLAG,
    AddressOption,
    Answer,
    DebugOption,
    Interrupted,
    JsonOption,
    Options,
    StoreOption,
    write,
    write_error,
)
from dcres.errors import DcresError, InputError
from dcres.linux.interrupt import interrupt_on_signals

__all__ = ["app", "checkpoints", "copies", "judge", "main"]

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130


@app.callback(invoke_without_command=True)
def _shared(
    ctx: typer.Context,
    json: JsonOption = False,
    debug: DebugOption = False,
    address: AddressOption = None,
    store: StoreOption = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    ctx.obj = Options(json, debug, address, store)
    if version:
        found = importlib.metadata.version("dcres")
        write(Answer({"version": found}, f"dcres {found}"), as_json=json)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(WRONG_INPUT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json, debug = JSON_FLAG in given, DEBUG_FLAG in given
    interrupt_on_signals()
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
    )
    try:
        status = app(args=given, prog_name="dcres", standalone_mode=False)
    except BrokenPipeError:
        # The reader of our output has seen enough; nothing may be written to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        status, message = judge(error)
        write_error(error, message, as_json=as_json)
    return int(status or 0)


def judge(error: BaseException) -> tuple[int, str]:
    """Exit status and sentence for an error."""
    match error:
        case InputError():
            return WRONG_INPUT, str(error)
        case DcresError():
            return FAILED, str(error)
        case TyperException():
            context = getattr(error, "ctx", None)
            command = "dcres" if context is None else context.command_path
            return WRONG_INPUT, f"{error.format_message().rstrip('.')}; see `{command} --help`"
        case Interrupted() if str(error):
            return INTERRUPTED, f"interrupted; {error}"
        case KeyboardInterrupt() | Interrupted():
            return INTERRUPTED, "interrupted"
        case typer.Abort():
            return FAILED, "nothing was done"
        case _:
            name = type(error).__name__
            return FAILED, f"dcres failed unexpectedly ({name}: {error}); {DEBUG_FLAG} tells where"
