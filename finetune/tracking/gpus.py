"""One W&B agent on each visible GPU.

Turns a sweep's id into agents of W&B's own, each with its device, their lines told apart. Knows
nothing about runs: the agents start those.

    python -m finetune gpus ENTITY/PROJECT/SWEEP_ID
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from finetune.system.devices import visible_devices
from finetune.system.errors import ConfigError, Stopped
from finetune.system.shutdown import PREEMPTION_SIGNAL, defer_stop


def gpus(sweep_id: str, count: int | None = None) -> int:
    """Run an agent on each visible GPU, or one where there is none, until all have ended.

    `count` runs for each agent at most. Returns the exit code: 1 when an agent ended badly, which
    is reported at once while the others go on. On `Stopped` every agent passes the signal on to its
    run, which writes and sends everything, and ends. Raises `ConfigError` without a sweep's id.
    """
    if not sweep_id.strip("/"):
        raise ConfigError("SWEEP_ID: got none; pass what `wandb sweep` has printed")
    devices: list[str | None] = [*visible_devices()] or [None]
    agents: dict[str, subprocess.Popen[str]] = {}
    try:
        with defer_stop():
            for device in devices:
                agents[f"gpu {device}" if device else "cpu"] = _start(sweep_id, count, device)
        readers = [
            threading.Thread(target=_pass_on, args=(name, agent), daemon=True)
            for name, agent in agents.items()
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    except Stopped as stop:
        if stop.signum == PREEMPTION_SIGNAL:
            # Of what a run gets the first counts: W&B queues it again. SIGTERM then ends the agent.
            for agent in agents.values():
                agent.send_signal(PREEMPTION_SIGNAL)
        raise
    finally:
        for agent in agents.values():
            if agent.poll() is None:
                agent.terminate()
        for agent in agents.values():
            agent.wait()
    return int(any(agent.returncode for agent in agents.values()))


def _start(sweep_id: str, count: int | None, device: str | None) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    # An agent's runs are started by `/usr/bin/env python`: let that be this interpreter.
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
    )
    environment["PYTHONUNBUFFERED"] = "1"
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals"]
    if count is not None:
        command += ["--count", str(count)]
    return subprocess.Popen(
        [*command, sweep_id],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is ours to pass on
    )


def _pass_on(name: str, agent: subprocess.Popen[str]) -> None:
    """Print an agent's lines under its name, and how it ended."""
    assert agent.stdout is not None
    for line in agent.stdout:
        print(f"[{name}] {line.rstrip()}", flush=True)
    code = agent.wait()
    if code == 0:
        how = "ended"
    else:
        how = f"died: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
    print(f"[{name}] the agent has {how}", flush=True)
