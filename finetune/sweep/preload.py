"""The imports of a run, made once in the fork server; nothing here may start a thread."""

import atexit
import gc
import signal

import PIL.PngImagePlugin  # noqa: F401

import finetune.sweep.worker
import finetune.training.train  # noqa: F401

# Slurm and systemd signal every process of a job. If the server ended, its children would be
# reported as dead while they still write.
for _signum in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(_signum, signal.SIG_IGN)

# Otherwise a child's first full garbage collection would copy every imported page, 0.2 s a trial.
gc.freeze()
atexit.register(gc.unfreeze)
