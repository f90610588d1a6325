"""What W&B's environment and its agents have decided for a run before it starts.

Turns environment variables and a sweep's parameters into a mode, a run's fields and a sweep's name.
Knows nothing about how a run is logged.

    >>> mode({"WANDB_MODE": "offline"})
    'offline'
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from finetune.config.fields import RunConfig, differences
from finetune.system.errors import ConfigError

MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
"""What W&B's client knows."""


NAME_SECONDS = 5
"""How long one question for a sweep's name may take; W&B's client asks in two ways."""


def mode(environ: dict[str, str] | None = None) -> str:
    """`WANDB_MODE` where it is set; else online with a key, offline without one.

    Raises `ConfigError` for a mode that W&B doesn't know.
    """
    variables = os.environ if environ is None else environ
    if (asked := variables.get("WANDB_MODE")) is not None:
        if asked not in MODES:
            raise ConfigError(f"WANDB_MODE: got {asked!r}; must be one of {', '.join(MODES)}")
        return asked
    if variables.get("WANDB_SWEEP_ID") or _has_key(dict(variables)):
        return "online"
    return "offline"


def _has_key(environ: dict[str, str]) -> bool:
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    path = Path(environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return path.exists() and netrc.netrc(str(path)).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def sweep_name(config: RunConfig, chosen: str) -> str | None:
    """The name of the sweep whose agent started this run, or its id where it has none."""
    sweep_id = os.environ.get("WANDB_SWEEP_ID")
    if sweep_id is None or chosen != "online":
        return sweep_id
    import wandb

    path = "/".join(filter(None, (config.entity, config.project, sweep_id)))
    try:
        sweep: Any = wandb.Api(timeout=NAME_SECONDS).sweep(path)  # type: ignore[no-untyped-call]
        return sweep.config.get("name") or sweep_id
    except Exception:  # whatever it is, a name isn't worth a run
        return sweep_id


def fields_of_run(flags: Mapping[str, Any]) -> dict[str, Any]:
    """A run's fields: what its command line says, and its W&B sweep where an agent started it.

    Raises `ConfigError` where the two contradict each other: W&B would show the sweep's value.
    """
    parameters = sweep_parameters()
    if shared := {name: flags[name] for name in flags.keys() & parameters.keys()}:
        of_sweep = {k: v for k, v in parameters.items() if k in RunConfig.model_fields}
        differing = differences(RunConfig.from_fields(of_sweep), shared)
        for name, (set_by_sweep, given) in differing.items():
            raise ConfigError(
                f"{name}: the sweep says {set_by_sweep} and the command line {given}; leave it "
                "out of one of them"
            )
    return parameters | dict(flags)


def sweep_parameters() -> dict[str, Any]:
    """What a W&B agent has set and locked for this run; nothing where no agent started it."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path or not Path(path).exists():
        return {}
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return {}
    return {
        name: given["value"]
        for name, given in content.items()
        if isinstance(given, dict) and "value" in given and name != "_wandb"
    }
