"""dcres: parallel checkpoint and restore for split-memory VMs on Ray.

::

    with dcres.local_cluster(hosts=3) as cluster:      # or dcres.connect(address)
        vm = cluster.start("vm.yaml")
        checkpoint = vm.checkpoint()
        vm.kill()
        vm = checkpoint.restore(layout=dcres.Layout(main="512MiB"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dcres.errors import DcresError

if TYPE_CHECKING:
    from dcres.api.cluster import Cluster, connect, local_cluster
    from dcres.api.operation import OperationProgress
    from dcres.api.placement import Placement
    from dcres.api.status import Host, HostStatus, VmStatus
    from dcres.api.vm import Checkpoint, Vm
    from dcres.config import Layout, VmSpec

__all__ = [  # noqa: RUF022 - most important first
    "local_cluster",
    "connect",
    "Cluster",
    "Vm",
    "Checkpoint",
    "Layout",
    "VmSpec",
    "VmStatus",
    "Placement",
    "HostStatus",
    "Host",
    "OperationProgress",
    "DcresError",
]

# Pagers and memory servers are ``python -m dcres.paging.…``: they must not load Ray with this.
_HOMES = {
    "local_cluster": "dcres.api.cluster",
    "connect": "dcres.api.cluster",
    "Cluster": "dcres.api.cluster",
    "Vm": "dcres.api.vm",
    "Checkpoint": "dcres.api.vm",
    "Layout": "dcres.config",
    "VmSpec": "dcres.config",
    "VmStatus": "dcres.api.status",
    "Placement": "dcres.api.placement",
    "HostStatus": "dcres.api.status",
    "Host": "dcres.api.status",
    "OperationProgress": "dcres.api.operation",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # 30 ms of every process, if it stood above

        return version("dcres")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dcres' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
