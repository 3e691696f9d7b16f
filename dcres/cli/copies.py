"""The commands about copies of checkpoints at a URL."""

from __future__ import annotations

from typing import Annotated

import typer

from dcres.cli.checkpoints import CHECKPOINTS_PANEL, CheckpointArgument, FromOption
from dcres.cli.clusters import app
from dcres.cli.commands import open_catalogue
from dcres.cli.frame import CHECKPOINTS, Answer, Options, add_command


@add_command(app, "copy", panel=CHECKPOINTS_PANEL, shared=CHECKPOINTS)
def copy(
    options: Options,
    ckpt: CheckpointArgument,
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="URL", help="s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///FOLDER."
        ),
    ],
    rate: Annotated[
        str | None,
        typer.Option(metavar="100MB/s", help="The most that each host sends; default: no limit."),
    ] = None,
) -> Answer:
    """Copy a checkpoint to a URL, all hosts their own parts; repeated it goes on, or mends."""
    from dcres.api import copying
    from dcres.cli.copy_tables import copied_view

    with open_catalogue(options) as catalogue:
        done = copying.copy(catalogue, ckpt, to, rate)
    return Answer(done.to_dict(), copied_view(done))


@add_command(app, "copies", panel=CHECKPOINTS_PANEL, shared=CHECKPOINTS)
def copies(options: Options, ckpt: CheckpointArgument, source: FromOption = None) -> Answer:
    """Show which copies of a checkpoint there are, and whether they are whole."""
    from dcres.api import copying
    from dcres.cli.copy_tables import copies_view

    if source is not None:
        found = [copying.copy_at(ckpt, source)]
    else:
        with open_catalogue(options) as catalogue:
            found = copying.known_copies(catalogue, ckpt)
    values = {"checkpoint": ckpt, "copies": [each.to_dict() for each in found]}
    bad = any(each.state != "whole" for each in found)
    return Answer(values, copies_view(ckpt, found), 1 if bad else 0)
