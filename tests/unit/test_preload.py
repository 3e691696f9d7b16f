"""What workers import ahead is there: where it fails every actor waits for a process for ever."""

from __future__ import annotations

import sys
from importlib import import_module

from dcres.actors.ray.local_node import RAY_ENVIRON


def test_the_hook_that_nodes_name_imports_what_actors_need() -> None:
    """Its name is in files of users, too: ``cluster.yaml``."""
    hook = RAY_ENVIRON["__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"]
    assert hook == "dcres.actors.preload.import_actors"
    module, _, function = hook.rpartition(".")
    getattr(import_module(module), function)()
    assert {"dcres.actors.host.agent", "dcres.actors.ray.coordinator"} <= sys.modules.keys()
