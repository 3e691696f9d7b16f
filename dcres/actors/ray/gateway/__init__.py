"""The gateway to Ray: the one package that imports it.

The rest of dcres sees hosts, reservations and ports:

* a *reservation* is a placement group: memory set aside for a VM, one bundle per host;
* an `ActorPort` is the name of an actor and a way to call it. It is a plain value that can
  be sent to other actors. Errors of dcres come out of a call as themselves; an actor that
  cannot answer raises `ActorGone`.

Facts about Ray 2.60 that shaped this package:

* RAY_AUTH_MODE is read when ray is imported. `_set_environment` reads it again, so that the
  order of imports does not decide who can connect.
* Errors that a raylet reports are printed on *standard output*, with ``log_to_driver`` off
  too. Standard output belongs to the caller (JSON); they go to our log.
* A restartable actor whose placement group is removed is killed and then restarts for ever:
  it never runs and keeps its name. So actors are killed before their group is removed.
* A call to an actor that is restarting fails at once (``max_task_retries=0``) instead of
  waiting; nothing that an actor does to a VM may be repeated behind our back.
* What is wrong with a cluster that one wants to join, Ray's core tells with a C++ stack on
  standard error, or after a minute. So that is looked at before, in `looking`.
* When a worker dies, Ray kills its process group. Processes that have to outlive an actor
  need a session of their own (`dcres.linux.process.spawn_detached`).
"""

from dcres.actors.ray.gateway.actors import ActorPort, find, kill, list_actors
from dcres.actors.ray.gateway.addresses import ADDRESS_VARIABLE, resolve
from dcres.actors.ray.gateway.calls import Pending, gather
from dcres.actors.ray.gateway.connection import (
    cluster_id,
    connect,
    connected_address,
    current_actor_name,
    disconnect,
    driver_is_gone,
    own_driver,
    own_node_address,
)
from dcres.actors.ray.gateway.nodes import hosts
from dcres.actors.ray.gateway.placing import spawn
from dcres.actors.ray.gateway.reservations import (
    Reservation,
    list_reservations,
    release,
    reservation,
    reserve,
)
from dcres.actors.ray.gateway.running import Stream, run_apart, run_on, start_on, stream_apart

__all__ = [
    "ADDRESS_VARIABLE",
    "ActorPort",
    "Pending",
    "Reservation",
    "Stream",
    "cluster_id",
    "connect",
    "connected_address",
    "current_actor_name",
    "disconnect",
    "driver_is_gone",
    "find",
    "gather",
    "hosts",
    "kill",
    "list_actors",
    "list_reservations",
    "own_driver",
    "own_node_address",
    "release",
    "reservation",
    "reserve",
    "resolve",
    "run_apart",
    "run_on",
    "spawn",
    "start_on",
    "stream_apart",
]
