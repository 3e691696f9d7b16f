"""cluster.yaml is accepted by Ray's own launcher, and its commands mean what dcres reads."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._common.utils import load_class
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from dcres.actors.ray import local_node
from dcres.config import HostSettings

FILE = Path(__file__).parents[2] / "cluster.yaml"
RAY = "/opt/dcres-env/bin/ray"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded = yaml.safe_load(FILE.read_text())
    assert isinstance(loaded, dict)
    return loaded


def run_with_fake_ray(command: str) -> tuple[list[str], dict[str, str]]:
    """Run a start command where ``ray`` only tells its arguments and environment."""
    fake = "fake() { printf '%s\\0' \"$@\"; printf '\\0'; env -0; }; RAY_HEAD_IP=192.0.2.1; "
    output = subprocess.run(
        ["bash", "-euc", fake + command.replace(RAY, "fake")],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    arguments, environment = output.split("\0\0", 1)
    pairs = (line.partition("=")[::2] for line in environment.split("\0") if "=" in line)
    return arguments.split("\0"), dict(pairs)


def start_options(config: dict[str, Any], which: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The options of ``ray start`` as Ray parses them, and the environment it is given."""
    arguments, environment = run_with_fake_ray(config[which][-1])
    assert arguments[0] == "start"
    return ray_start.make_context("start", arguments[1:]).params, environment


def test_ray_accepts_the_file(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


@pytest.mark.parametrize("which", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_authenticates(config: dict[str, Any], which: str) -> None:
    _, environment = start_options(config, which)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] in config["file_mounts"]
    assert f"chmod 600 {environment['RAY_AUTH_TOKEN_PATH']}" in config["setup_commands"]


@pytest.mark.parametrize("which", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_a_worker_process_begins_as_in_a_local_cluster(config: dict[str, Any], which: str) -> None:
    _, environment = start_options(config, which)
    hook = WORKER_PROCESS_SETUP_HOOK_ENV_VAR
    assert environment[hook] == local_node.RAY_ENVIRON[hook]
    assert callable(load_class(environment[hook]))


def test_health_is_checked_as_in_a_local_cluster(config: dict[str, Any]) -> None:
    """Patiently enough for a host whose processors are busy."""
    _, environment = start_options(config, "head_start_ray_commands")
    checks = {key: text for key, text in environment.items() if "health_check" in key}
    assert len(checks) == 4
    assert checks.items() <= local_node.RAY_ENVIRON.items()
    period_s = int(checks["RAY_health_check_period_ms"]) / 1000
    assert period_s * int(checks["RAY_health_check_failure_threshold"]) >= 5


def test_a_worker_offers_its_memory_and_its_name(config: dict[str, Any]) -> None:
    options, environment = start_options(config, "worker_start_ray_commands")
    settings = HostSettings.from_environ(environment)
    resources = json.loads(options["resources"])
    assert resources["vm_memory"] > 0
    assert resources[f"host:{settings.name}"] == 1
    assert options["labels"] == f"dcres-host={settings.name}"
    assert options["address"] == "192.0.2.1:6379"


def test_the_head_offers_no_memory(config: dict[str, Any]) -> None:
    options, _ = start_options(config, "head_start_ray_commands")
    assert options["head"]
    assert "vm_memory" not in options["resources"]


def test_all_nodes_share_a_store(config: dict[str, Any]) -> None:
    stores = {
        HostSettings.from_environ(start_options(config, f"{node}_start_ray_commands")[1]).store
        for node in ("head", "worker")
    }
    assert len(stores) == 1


def test_every_command_is_shell(config: dict[str, Any]) -> None:
    for key, commands in config.items():
        if key.endswith("_commands"):
            for command in commands:
                assert shlex.split(command)
                subprocess.run(["bash", "-n", "-c", command], check=True)
