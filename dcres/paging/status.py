"""What paging processes tell of themselves when asked for their status (docs/protocol.md)."""

from __future__ import annotations

from typing import TypedDict


class LinkStatus(TypedDict):
    """One connection of a pager."""

    state: str
    trouble: str
    express: bool


class Counts(TypedDict):
    """What a pager did so far, from 0 with its process."""

    pages_in: int
    pages_out: int
    zero_pages: int
    taken_back: int
    faults: int


class PagerStatus(Counts):
    """A pager."""

    state: str
    lost_why: str
    pid: int
    adopted: bool
    tracking: bool
    native: bool
    limit_pages: int
    pages: list[int]  # by host, the main host first
    leaving: int
    moving: bool
    pages_to_move: int
    page_in_median_us: float
    page_in_p99_us: float
    links: dict[str, LinkStatus]


class ServerStatus(TypedDict):
    """A memory server's counters."""

    port: int
    pid: int
    tracking: bool
    held_pages: int
    capacity_pages: int
    pages_in: int
    pages_out: int
    pages_peeked: int
    pages_fetched: int
    refused: int
    connected: bool
    readers: int
    digest: str


class PartServerStatus(TypedDict):
    """A part server's counters, and what is wrong with its files."""

    port: int
    pid: int
    pages_served: int
    refused: int
    pagers: int
    readers: int
    trouble: str
