"""The cores and GPUs that this process may use, found without importing torch."""

import os
import shutil
import subprocess

from finetune.system.errors import ConfigError


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def refuse_torchrun() -> None:
    """Raise `ConfigError` if torchrun has started several processes of this run.

    Each would be a complete run of its own. Slurm's tasks, which are several runs, are allowed.
    """
    num_processes = os.environ.get("WORLD_SIZE") or "1"
    if "TORCHELASTIC_RUN_ID" in os.environ and num_processes != "1":
        raise ConfigError(
            f"torchrun: started {num_processes} processes, but a run uses one process and one "
            "device; start agent.py with python instead. Several devices run several runs: "
            "one `wandb agent` on each, or python -m finetune sweep or gpus"
        )


def visible_devices() -> list[str]:
    """The GPUs that CUDA would use, by index or as CUDA_VISIBLE_DEVICES names them."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        return [device.strip() for device in asked.split(",") if device.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]
