"""What people write to name a cluster, and what is meant by it."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from ray._common.network_utils import parse_address
from ray._private import services

from dcres.errors import ClusterError, ConfigError

ADDRESS_VARIABLE = "RAY_ADDRESS"
RAY_PORT = 6379  # of `ray start --head`, unless it is told another
_GIVEN = "the address"


def resolve(address: str, named_by: str = _GIVEN) -> str:
    """The ``host:port`` that is meant, where `named_by` says who wrote `address`.

    ``auto`` is what Ray means by it: the cluster that RAY_ADDRESS names, the one that ``ray
    start`` began last on this machine, or any that has a node here. Raises ConfigError for what
    is no address of a cluster to join, and ClusterError when ``auto`` finds none.
    """
    if address != "auto":
        split(address, named_by)
        return address
    named = os.environ.get(ADDRESS_VARIABLE)
    if named and named != "auto":
        return resolve(named, ADDRESS_VARIABLE)
    try:
        found = as_ray_writes(address)
    except ConnectionError:
        found = None
    if found is None:
        raise ClusterError(
            f"{named_by} is `auto`, and no Ray cluster has a node on this machine; start one "
            "with `dcres up`, or write host:port of another in --address or RAY_ADDRESS"
        )
    return found


def split(address: str, named_by: str = _GIVEN) -> tuple[str, int]:
    """The host and the port in ``host:port``; an IPv6 host without its brackets.

    Raises ConfigError, which tells what else it is, and what to write.
    """
    host, port = parse_address(address) or ("", "")
    if "://" in address or not host or not _is_port(port):
        raise ConfigError(f"{named_by} is {address or 'empty'}{_what_it_is(address)}")
    return str(host), int(port)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16


def _what_it_is(address: str) -> str:
    """The end of the sentence about what cannot be joined."""
    scheme = address.partition("://")[0] if "://" in address else ""
    there = f"{_host_of_url(address)}:{RAY_PORT}"
    match scheme.lower():
        case "http" | "https":
            return (
                f", where Ray jobs are submitted; on a node of the cluster write host:port of its "
                f"head, like {there}, or run dcres as a Ray job: "
                f"`ray job submit --address {address} -- dcres …`"
            )
        case "ray":
            return (
                ", an address of Ray Client, which dcres does not support; on a node of the "
                f"cluster give host:port of its head, like {there}"
            )
    if address == "local":
        return (
            ", by which Ray means a new cluster for one process; start one with `dcres up`, "
            "or write host:port of one that runs"
        )
    if not address:
        return "; write host:port, or leave it out for the cluster that `dcres up` started"
    return (
        f", which is not the address of a Ray cluster; write host:port, like head:{RAY_PORT} "
        f"or [fd00::1]:{RAY_PORT}"
    )


def _host_of_url(address: str) -> str:
    try:
        host = urlsplit(address).hostname or "HEAD"
    except ValueError:
        return "HEAD"
    return f"[{host}]" if ":" in host else host


def as_ray_writes(address: str) -> str | None:
    """With this machine's own address for ``localhost``; None if it is not an address."""
    try:
        found: str | None = services.canonicalize_bootstrap_address(address)
    except ValueError:
        return None
    return found
