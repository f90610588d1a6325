"""What W&B's environment variables and agents set for a run before it starts."""

import netrc
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from finetune.config.fields import RunConfig
from finetune.config.given_values import differences
from finetune.system.errors import ConfigError

MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # of W&B's client
NAME_TIMEOUT_SECONDS = 5  # of one request for a sweep's name; W&B's client makes two


DISABLING = ("1", "on", "true", "yes")  # values of WANDB_DISABLED, in any case
CLIENT_FOLDER = ".wandb-client"  # in the folder of runs, if the home directory can't be used


def mode(environ: Mapping[str, str] = os.environ) -> str:
    """`WANDB_MODE` if it is set; else online if a key is configured, and offline if not.

    `WANDB_DISABLED=true`, which Hugging Face's trainer knows, means disabled. Raises
    `ConfigError` for an unknown mode.
    """
    if environ.get("WANDB_DISABLED", "").lower() in DISABLING:
        return "disabled"
    if (given := environ.get("WANDB_MODE")) is not None:
        if given not in MODES:
            raise ConfigError(f"WANDB_MODE: got {given!r}; must be one of {', '.join(MODES)}")
        return given
    return "online" if environ.get("WANDB_SWEEP_ID") or _has_key(environ) else "offline"


def _has_key(environ: Mapping[str, str]) -> bool:
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    path = Path(_expanded(environ.get("NETRC") or "~/.netrc"))
    try:
        return path.exists() and netrc.netrc(str(path)).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def _expanded(path: str) -> str:
    """The path with the home in place of ~; unchanged, not an error, if there is no home."""
    return os.path.expanduser(path)  # noqa: PTH111


def use_writable_folders(runs_dir: Path, log: Callable[[str], None]) -> None:
    """Make W&B's client use a folder among the runs for files that it can't keep in the home.

    Variables that are set already stay. The key and the settings in the home are still read.
    """
    from wandb import env

    fallback = runs_dir / CLIENT_FOLDER
    if not os.environ.get("HOME"):  # W&B's service asks for nothing else
        home = _expanded("~")
        os.environ["HOME"] = home if Path(home).is_absolute() else str(fallback)
    defaults = {env.DATA_DIR: Path(env.get_data_dir()), env.CACHE_DIR: env.get_cache_dir()}
    unusable = [
        name for name, folder in defaults.items()
        if name not in os.environ and not _is_writable(folder)
    ]  # fmt: skip
    if unusable:
        log(f"W&B: the home directory can't be written; {fallback} is used instead")
        os.environ.update(dict.fromkeys(unusable, str(fallback)))


def _is_writable(folder: Path) -> bool:
    """Whether a file can be made in the folder, which is made too if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
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
    of_sweep = {k: v for k, v in parameters.items() if k in RunConfig.model_fields}
    if shared := {name: value for name, value in given.items() if name in of_sweep}:
        differing = differences(RunConfig.from_fields(of_sweep), shared)
        listed = [
            f"{name}: got {asked}, but the W&B sweep sets {in_sweep}"
            for name, (in_sweep, asked) in differing.items()
        ]
        if listed:
            raise ConfigError(
                f"{'; '.join(listed)}; set each in one of them only: in the sweep, or on the "
                "command line or in the call"
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
