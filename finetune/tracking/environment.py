"""What W&B's environment variables and agents set for a run before it starts."""

import netrc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from finetune.config.fields import RunConfig, differences
from finetune.system.errors import ConfigError

MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # of W&B's client
NAME_TIMEOUT_SECONDS = 5  # of one request for a sweep's name; W&B's client makes two


def mode(environ: Mapping[str, str] = os.environ) -> str:
    """`WANDB_MODE` if it is set; else online if a key is configured, and offline if not.

    Raises `ConfigError` for an unknown mode.
    """
    if (given := environ.get("WANDB_MODE")) is not None:
        if given not in MODES:
            raise ConfigError(f"WANDB_MODE: got {given!r}; must be one of {', '.join(MODES)}")
        return given
    return "online" if environ.get("WANDB_SWEEP_ID") or _has_key(environ) else "offline"


def _has_key(environ: Mapping[str, str]) -> bool:
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    path = Path(environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return path.exists() and netrc.netrc(str(path)).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def active_run() -> Any | None:
    """W&B's run that `wandb.init` has opened in this process, if it has not ended."""
    wandb = sys.modules.get("wandb")
    return None if wandb is None else wandb.run


def run_id() -> str | None:
    """W&B's id of this run if it has one already: the active run's, or what an agent has set."""
    run = active_run()
    if run is not None and not run.disabled:
        return str(run.id)
    return os.environ.get("WANDB_RUN_ID") or None


def sweep_name(config: RunConfig, wandb_mode: str) -> str | None:
    """The name of the W&B sweep that this run belongs to, or its id if it has no name.

    None without a W&B sweep. The id, too, if W&B doesn't answer: a run doesn't fail for a name.
    """
    sweep_id = os.environ.get("WANDB_SWEEP_ID")
    if sweep_id is None or wandb_mode != "online":
        return sweep_id
    import wandb

    path = "/".join(filter(None, (config.entity, config.project, sweep_id)))
    try:
        api = wandb.Api(timeout=NAME_TIMEOUT_SECONDS)
        return api.sweep(path).config.get("name") or sweep_id  # type: ignore[no-untyped-call]
    except Exception:
        return sweep_id


def fields_of_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """A run's fields: those given, and the parameters of its W&B sweep, if an agent started it.

    Raises `ConfigError` if they contradict each other: W&B would show the sweep's value.
    """
    parameters = sweep_parameters()
    if shared := {name: given[name] for name in given.keys() & parameters.keys()}:
        of_sweep = {k: v for k, v in parameters.items() if k in RunConfig.model_fields}
        differing = differences(RunConfig.from_fields(of_sweep), shared)
        for name, (in_sweep, asked) in differing.items():
            raise ConfigError(
                f"{name}: got {asked}, but the W&B sweep sets {in_sweep}; set it in one of them "
                "only: in the sweep, or on the command line or in the call"
            )
    return dict(given) | parameters


def sweep_parameters() -> dict[str, Any]:
    """The parameters that a W&B agent has set for this run; empty without an agent."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path or not Path(path).exists():
        return {}
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    return {
        name: given["value"]
        for name, given in (content.items() if isinstance(content, dict) else ())
        if isinstance(given, dict) and "value" in given and name != "_wandb"
    }
