"""What every worker process of a cluster of dcres does first: it imports what actors need.

Ray calls `import_actors` by its name, which nodes have in their environment
(`dcres.actors.ray.local_node`, ``cluster.yaml``). It takes 0.3 s, and no restore waits for it then.
"""

from __future__ import annotations

from importlib import import_module

_ACTORS = ("ray.coordinator", "host.agent")


def import_actors() -> None:
    """Once it has returned, an actor of any class of ours starts without importing."""
    for name in _ACTORS:
        import_module(f"dcres.actors.{name}")
