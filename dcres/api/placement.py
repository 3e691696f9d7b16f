"""A VM's placement as a picture: which host holds which part of memory, and how hot it is.

In a notebook a `Placement` shows itself; `Placement.figure` is a matplotlib figure that belongs
to no global state, and `Placement.save` writes it. Only these need matplotlib (``dcres[plot]``).
"""

from __future__ import annotations

import html
import io
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dcres.config import format_size
from dcres.errors import ConfigError, UnsupportedHost
from dcres.model.pages import PAGE_SIZE
from dcres.model.picture import Ages, Picture

# Okabe and Ito's colours, which colour-blind people can tell apart, the main host's first.
HOST_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800")
NOT_BROUGHT = "not yet brought"
NOT_BROUGHT_COLOR = "#7F7F7F"
HOT_S, COLD_S = 1.0, 1000.0  # ages between which heat falls from 1 to 0
_SUFFIXES = (".png", ".svg")

_WIDTH_IN = 10.0
_LANE_IN = 0.62
_MOST_LANES_IN = 60.0
_SCALE_IN = 0.12
_REST_IN = 1.7  # title, address axis, scale of heat
_MOST_STEPS = 9
_LANE_ROWS = 64  # of pixels in a lane's image
_DPI = 150
_PALEST = 0.3
_GROUND = "#FFFFFF"  # not transparent: pale colours mean cold, on dark pages too
_LANE_GROUND = "#F1F3F5"
_TEXT = "#24292F"
_FAINT = "#57606A"


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where the pages of VM `vm` were at the time `at` (UTC)."""

    vm: str
    at: datetime
    picture: Picture

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``dcres status --json`` prints them.

        Lists have one number per bucket of `bucket_pages` pages; an age is null where the host
        holds no page of the bucket.
        """
        picture = self.picture
        return {
            "at": self.at.isoformat(timespec="milliseconds"),
            "page_count": picture.page_count,
            "bucket_pages": picture.bucket_pages,
            "hosts": [
                {"host": host, "pages": picture.pages[:, at].tolist(), "age_s": self._ages(at)}
                for at, host in enumerate(picture.hosts)
            ],
            "not_yet_brought": picture.pages[:, -2].tolist(),
            "nowhere": picture.pages[:, -1].tolist(),
        }

    def _ages(self, column: int) -> list[float | None]:
        ages = self.picture.age_s[:, column].tolist()
        return [None if math.isnan(age) else round(age, 2) for age in ages]

    def __repr__(self) -> str:
        parts = [f"{host} {_size(pages)}" for host, pages in self.picture.totals.items()]
        if self.picture.not_yet_brought:
            parts.append(f"{NOT_BROUGHT} {_size(self.picture.not_yet_brought)}")
        return f"<Placement of {self.vm}: {', '.join(parts)}>"

    def figure(self) -> Any:
        """A new `matplotlib.figure.Figure`. Raises UnsupportedHost without matplotlib."""
        return _draw(self)

    def save(self, path: str | Path) -> None:
        """Write the figure as PNG or SVG, as the name ends.

        Raises ConfigError for another ending or a file that cannot be written, UnsupportedHost
        without matplotlib.
        """
        path = Path(path)
        require_drawable(path)
        try:
            self.figure().savefig(path, dpi=_DPI)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}; name a file in a folder of yours"
            ) from None

    def _repr_svg_(self) -> str | None:
        """For notebooks; None without matplotlib."""
        buffer = io.StringIO()
        try:
            self.figure().savefig(buffer, format="svg")
        except UnsupportedHost:
            return None
        return buffer.getvalue()

    def _repr_html_(self) -> str:
        svg = self._repr_svg_()
        if svg is None:
            return f"<code>{html.escape(repr(self))}</code>"
        return svg[svg.index("<svg") :]  # what stands before belongs into files only


def require_drawable(path: Path) -> None:
    """What can be known before there is anything to draw: see `Placement.save`."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(
            f"a picture is written as PNG or SVG, and {path} ends in neither; "
            "name a file that ends in .png or .svg"
        )
    _matplotlib()


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError:
        raise UnsupportedHost(
            "drawing needs matplotlib, which is not installed; pip install matplotlib"
        ) from None
    return matplotlib


def heat(age_s: Ages) -> Ages:
    """1 for pages touched within `HOT_S`, 0 for `COLD_S` and more, logarithmic between."""
    scale = math.log(COLD_S / HOT_S)
    ages = np.nan_to_num(age_s, nan=COLD_S)
    cold: Ages = np.log(np.clip(ages, HOT_S, COLD_S) / HOT_S) / scale
    return 1.0 - cold


def host_color(index: int) -> str:
    """The colour of a host, 0 being the main host; sub hosts take turns when there are many."""
    return HOST_COLORS[0 if index == 0 else 1 + (index - 1) % (len(HOST_COLORS) - 1)]


def _size(pages: int) -> str:
    return format_size(pages * PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class _Lane:
    """What is drawn in one row: the pages in one column of a picture."""

    name: str
    role: str
    color: str
    column: int


def _lanes(picture: Picture) -> list[_Lane]:
    lanes = [
        _Lane(host, "main host" if at == 0 else "sub host", host_color(at), at)
        for at, host in enumerate(picture.hosts)
    ]
    if picture.not_yet_brought:
        lanes.append(_Lane(NOT_BROUGHT, "", NOT_BROUGHT_COLOR, len(picture.hosts)))
    return lanes


def _draw(placement: Placement) -> Any:
    matplotlib = _matplotlib()
    lanes = _lanes(placement.picture)
    lanes_in = min(_LANE_IN * len(lanes), _MOST_LANES_IN)
    canvas = matplotlib.figure.Figure(figsize=(_WIDTH_IN, lanes_in + _REST_IN), facecolor=_GROUND)
    canvas.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12)
    axes = canvas.subplot_mosaic(
        [["lanes", "lanes"], ["words", "heat"]],
        width_ratios=[2, 1],
        height_ratios=[lanes_in, _SCALE_IN],
    )
    _draw_title(axes["lanes"], placement)
    for row, lane in enumerate(lanes):
        _draw_lane(axes["lanes"], row, lane, placement.picture)
    _draw_addresses(axes["lanes"], placement.picture, len(lanes))
    _draw_words(axes["words"])
    _draw_heat_scale(axes["heat"])
    return canvas


def _draw_title(axes: Any, placement: Placement) -> None:
    picture = placement.picture
    used = picture.page_count - picture.nowhere
    words = f"{_size(used)} of {_size(picture.page_count)} in use"
    when = f"{placement.at:%Y-%m-%d %H:%M:%S} UTC"
    axes.set_title(f"Memory of VM {placement.vm}", loc="left", color=_TEXT, weight="bold", pad=10)
    axes.set_title(f"{words}  ·  {when}", loc="right", color=_FAINT, size=9, pad=10)


def _draw_lane(axes: Any, row: int, lane: _Lane, picture: Picture) -> None:
    """The lane between its host's name and how much memory is there; `row` counts from above."""
    whole = len(picture.pages) * picture.bucket_pages
    place = (0, whole, row + 0.42, row - 0.42)  # left, right, bottom, top
    axes.imshow(_lane_image(picture, lane), extent=place, aspect="auto", interpolation="none")
    beside = axes.get_yaxis_transform()  # 0 to 1 is the width of the lanes, below 0 is left of it
    axes.plot(
        [-0.008] * 2,
        place[2:],
        transform=beside,
        color=lane.color,
        linewidth=4,
        solid_capstyle="butt",
        clip_on=False,
    )
    name = {"x": -0.02, "ha": "right", "transform": beside}
    if lane.role:
        axes.text(y=row, s=lane.name, va="bottom", color=_TEXT, size=10, weight="bold", **name)
        axes.text(y=row + 0.05, s=lane.role, va="top", color=_FAINT, size=8, **name)
    else:
        axes.text(y=row, s=lane.name, va="center", color=_FAINT, size=8, **name)
    total = int(picture.pages[:, lane.column].sum())
    axes.text(1.01, row, _size(total), transform=beside, color=_TEXT, va="center", size=9)


def _draw_addresses(axes: Any, picture: Picture, lanes: int) -> None:
    axes.set(xlim=(0, picture.page_count), ylim=(lanes - 0.45, -0.55))
    step = 1 << max(math.ceil(math.log2(picture.page_count / _MOST_STEPS)), 0)
    addresses = range(0, picture.page_count + 1, step)
    axes.set_xticks(addresses, [_size(address) if address else "0" for address in addresses])
    axes.set_yticks([])
    axes.tick_params(axis="x", colors=_FAINT, labelsize=8)
    axes.set_xlabel("address in the VM's memory", color=_FAINT, size=8)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)


def _lane_image(picture: Picture, lane: _Lane) -> npt.NDArray[np.float64]:
    """A column of pixels per bucket: filled as high as the lane's part of it, pale if cold."""
    pages = picture.pages[:, lane.column]
    part = pages / picture.pages.sum(axis=1)
    rows = np.where(pages > 0, np.maximum(np.rint(part * _LANE_ROWS), 1), 0)
    filled = np.arange(_LANE_ROWS)[::-1, None] < rows
    colors = _tinted(lane.color, heat(picture.age_s[:, lane.column]))
    image: npt.NDArray[np.float64] = np.where(filled[:, :, None], colors, _rgb(_LANE_GROUND))
    return image


def _rgb(color: str) -> npt.NDArray[np.float64]:
    return np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255


def _tinted(color: str, strength: Ages) -> npt.NDArray[np.float64]:
    """The colour where `strength` is 1, and a pale one where it is 0; shape ``(n, 3)``."""
    full = (_PALEST + (1 - _PALEST) * strength)[:, None]
    return full * _rgb(color) + (1 - full) * _rgb(_GROUND)


def _draw_words(axes: Any) -> None:
    axes.axis("off")
    axes.text(
        0,
        0.5,
        "Each row: how much of a stretch of memory that host holds (height), and how\n"
        "recently it was touched (strength). Empty in all rows: never touched.",
        color=_FAINT,
        size=8,
        va="center",
    )


def _draw_heat_scale(axes: Any) -> None:
    ages = np.geomspace(HOT_S, COLD_S, 256)
    axes.imshow(_tinted("#24292F", heat(ages))[None], aspect="auto", extent=(0, 3, 0, 1))
    axes.set_xticks(range(4), ["1 s ago", "10 s", "100 s", "1000 s"], size=8, color=_FAINT)
    axes.set_yticks([])
    axes.tick_params(axis="x", length=2, colors=_FAINT)
    axes.set_title("last touched, as far as is known", size=8, color=_FAINT, pad=3)
    for spine in axes.spines.values():
        spine.set_visible(False)
