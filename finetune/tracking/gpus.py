"""One W&B agent on each visible GPU: `python -m finetune gpus ENTITY/PROJECT/SWEEP_ID`."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

from finetune.system.devices import visible_devices
from finetune.system.errors import ConfigError, Stopped
from finetune.system.shutdown import PREEMPTION_SIGNAL, defer_stop


def gpus(sweep_id: str, count: int | None = None) -> int:
    """Run one agent on each visible GPU, or a single one without a GPU, until all have ended.

    Each agent starts at most `count` runs. Returns the exit code: 1 if an agent failed. A failure
    is printed at once; the other agents continue. On `Stopped` every agent forwards the signal to
    its run, which saves and sends its state, and ends. Raises `ConfigError` without a sweep id.
    """
    if not sweep_id.strip("/"):
        raise ConfigError("SWEEP_ID: got none; pass the id that `wandb sweep` printed")
    devices: list[str | None] = [*visible_devices()] or [None]
    agents: dict[str, subprocess.Popen[str]] = {}
    try:
        with defer_stop():
            for device in devices:
                agents[f"gpu {device}" if device else "cpu"] = _start(sweep_id, count, device)
        readers = [Thread(target=_print_output, args=item, daemon=True) for item in agents.items()]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    except Stopped as stop:
        if stop.signum == PREEMPTION_SIGNAL:
            # A run obeys the first signal: W&B queues it again. SIGTERM then ends the agent.
            for agent in agents.values():
                agent.send_signal(PREEMPTION_SIGNAL)
        raise
    finally:
        for agent in agents.values():
            agent.terminate()  # without an effect if it has ended
        for agent in agents.values():
            agent.wait()
    return int(any(agent.returncode for agent in agents.values()))


def _start(sweep_id: str, count: int | None, device: str | None) -> subprocess.Popen[str]:
    # An agent starts its runs with `/usr/bin/env python`, which must find this interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PATH": path}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals"]
    command += [] if count is None else ["--count", str(count)]
    return subprocess.Popen(
        [*command, sweep_id],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches the agents through `gpus` alone
    )


def _print_output(name: str, agent: subprocess.Popen[str]) -> None:
    assert agent.stdout is not None
    for line in agent.stdout:
        print(f"[{name}] {line.rstrip()}", flush=True)
    code = agent.wait()
    failure = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    print(f"[{name}] the agent has {f'failed: {failure}' if code else 'ended'}", flush=True)
