"""The memory of a VM as a map of characters: whose, by colour or letter, and how hot, by shade."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from dcres.api.placement import NOT_BROUGHT, NOT_BROUGHT_COLOR, Placement, host_color
from dcres.config import format_size
from dcres.model.pages import PAGE_SIZE
from dcres.model.picture import Picture

MOST_LINES = 12
_MOST_COLUMNS = 128
_LONGEST_ADDRESS = len("1.375 GiB")
_NOWHERE = "·"
# A cell's shade tells how long ago its pages were touched: the first whose bound it is below.
_SHADES = ((1.0, "█"), (10.0, "▓"), (100.0, "▒"), (float("inf"), "░"))
_HOT_S = 10.0  # without colours: capital letters
# The main host is m; sub hosts take the others in turn.
_LETTERS = string.ascii_lowercase.replace("m", "")
_NOT_BROUGHT_LETTER = "~"
_BETWEEN = "   "

_Cell = tuple[str, str]  # a character and its style


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """Prints a placement, as wide as the console allows and at most `MOST_LINES` lines high.

    A cell is a stretch of memory and shows the host that holds most of it; lines begin at
    round addresses. Where there are no colours, letters tell the hosts apart.
    """

    placement: Placement

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = _columns(options.max_width - _LONGEST_ADDRESS - 1)
        picture = _fitted(self.placement.picture, columns)
        plain = console.color_system is None or console.no_color
        style = _Letters() if plain else _Colors()
        cells = list(_cells(picture, style))
        firsts = range(0, len(cells), columns)
        addresses = [_size(first * picture.bucket_pages) if first else "0" for first in firsts]
        gutter = max(map(len, addresses))
        for first, address in zip(firsts, addresses, strict=True):
            line = _runs(cells[first : first + columns])
            yield Text.assemble(f"{address:>{gutter}} ", *line)
        yield from _wrapped(_hosts_legend(picture, style), options.max_width)
        yield Text(f"{style.heat_legend}; a cell is {_size(picture.bucket_pages)}", "dim")


class _Colors:
    """Hosts by colour, heat by shade."""

    heat_legend = "last touched within █ 1 s  ▓ 10 s  ▒ 100 s  ░ longer ago"

    def cell(self, picture: Picture, column: int, age_s: float) -> _Cell:
        shade = next(shade for bound_s, shade in _SHADES if age_s <= bound_s)
        return shade, _color(picture, column)

    def sample(self, picture: Picture, column: int) -> _Cell:
        return "█", _color(picture, column)


class _Letters:
    """Hosts by letter, a capital where it is hot."""

    heat_legend = f"a capital: last touched within {_HOT_S:.0f} s"

    def cell(self, picture: Picture, column: int, age_s: float) -> _Cell:
        letter = _letter(picture, column)
        return letter.upper() if age_s <= _HOT_S else letter, ""

    def sample(self, picture: Picture, column: int) -> _Cell:
        return _letter(picture, column), ""


def _color(picture: Picture, column: int) -> str:
    return host_color(column) if column < len(picture.hosts) else NOT_BROUGHT_COLOR


def _letter(picture: Picture, column: int) -> str:
    if column == len(picture.hosts):
        return _NOT_BROUGHT_LETTER
    return "m" if column == 0 else _LETTERS[(column - 1) % len(_LETTERS)]


def _columns(width: int) -> int:
    """The greatest power of two that fits, so that every line begins at a round address."""
    return min(1 << max(width, 8).bit_length() - 1, _MOST_COLUMNS)


def _fitted(picture: Picture, columns: int) -> Picture:
    factor = 1
    while len(picture.pages) > factor * columns * MOST_LINES:
        factor *= 2
    return picture if factor == 1 else picture.joined(factor)


def _cells(picture: Picture, style: _Colors | _Letters) -> Iterator[_Cell]:
    most = picture.existing.argmax(axis=1)
    ages = picture.age_s[np.arange(len(most)), most]
    counts = picture.existing.sum(axis=1)
    for column, age_s, count in zip(most.tolist(), ages.tolist(), counts.tolist(), strict=True):
        yield style.cell(picture, column, age_s) if count else (_NOWHERE, "dim")


def _runs(cells: list[_Cell]) -> Iterator[_Cell]:
    """Neighbours of the same style as one."""
    for style, run in itertools.groupby(cells, key=lambda cell: cell[1]):
        yield "".join(character for character, _ in run), style


def _hosts_legend(picture: Picture, style: _Colors | _Letters) -> list[Text]:
    entries = [
        (style.sample(picture, at), f"{host}{' (main)' if at == 0 else ''} {_size(pages)}")
        for at, (host, pages) in enumerate(picture.totals.items())
    ]
    if picture.not_yet_brought:
        sample = style.sample(picture, len(picture.hosts))
        entries.append((sample, f"{NOT_BROUGHT} {_size(picture.not_yet_brought)}"))
    entries.append(((_NOWHERE, "dim"), f"never touched {_size(picture.nowhere)}"))
    return [Text.assemble(sample, f" {words}") for sample, words in entries]


def _wrapped(entries: list[Text], width: int) -> Iterator[Text]:
    """As many entries in a line as fit, none of them cut in two."""
    line = Text()
    for entry in entries:
        if line and len(line) + len(_BETWEEN) + len(entry) > width:
            yield line
            line = Text()
        line = line + (_BETWEEN if line else "") + entry
    yield line


def _size(pages: int) -> str:
    return format_size(pages * PAGE_SIZE)
