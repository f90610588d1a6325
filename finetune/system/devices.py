"""The cores and GPUs that this process may use, found without importing torch."""

import os
import re
import shutil
import subprocess

from finetune.system.errors import ConfigError

_LARGE_MEBIBYTES = 38_000
"""Two runs share a GPU with more memory: those sold as 40 GB report 39,000 to 41,000."""


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
    """The GPUs that CUDA would use, by UUID or as CUDA_VISIBLE_DEVICES names them.

    Of a GPU that is divided by MIG, its instances: they are devices of their own.
    """
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        return [device.strip() for device in asked.split(",") if device.strip()]
    return list_devices(_nvidia_smi("--list-gpus"))


def _nvidia_smi(*options: str) -> str:
    """What it prints; nothing if it is missing or fails."""
    command = ["nvidia-smi", *options]
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def worker_devices() -> list[str]:
    """The device of each of the runs that should run at once: all GPUs, then the large ones again.

    An instance of MIG has one run.
    """
    devices = visible_devices()
    if not devices:
        return []
    table = _nvidia_smi("--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")
    large = [
        (index, uuid)
        for index, uuid, size in re.findall(r"^(\d+), (GPU-\S+), (\d+)$", table, re.M)
        if int(size) >= _LARGE_MEBIBYTES
    ]
    again = [d for d in devices if any(d == index or uuid.startswith(d) for index, uuid in large)]
    return devices + again


def assigned_device(devices: list[str], num_workers: int, worker: int) -> tuple[str, int]:
    """The device of a worker, and how many of the workers share it.

    >>> [assigned_device(["a", "b"], 3, worker) for worker in range(3)]
    [('a', 2), ('b', 1), ('a', 2)]
    """
    used = [devices[i % len(devices)] for i in range(num_workers)]
    return used[worker], used.count(used[worker])


def list_devices(listed: str) -> list[str]:
    """The UUIDs in the output of `nvidia-smi --list-gpus`.

    >>> list_devices("GPU 0: NVIDIA A100 (UUID: GPU-a)\\n  MIG 1g.5gb Device 0: (UUID: MIG-b)")
    ['MIG-b']
    """
    devices: list[str] = []
    for kind, uuid in re.findall(r"^\s*(GPU|MIG) .*\(UUID: ([^)]+)\)", listed, re.M):
        if kind == "MIG" and devices and devices[-1].startswith("GPU-"):
            devices.pop()  # the GPU that it is a part of
        devices.append(uuid)
    return devices
