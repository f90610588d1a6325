"""The imports of a run, made once in the fork server; nothing here may start a thread."""

import atexit
import gc
import importlib
import signal

from finetune.system.shutdown import STOP_SIGNALS

# Ctrl-C, Slurm and systemd signal every process. If the server ended, its children would be taken
# for dead while they still write.
for _signum in STOP_SIGNALS:
    signal.signal(_signum, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by the process that starts it

for _name in ("PIL.PngImagePlugin", "finetune.sweep.worker", "finetune.training.together"):
    importlib.import_module(_name)

# Otherwise a child's first full garbage collection would copy every imported page, 0.2 s a trial.
gc.freeze()
atexit.register(gc.unfreeze)
