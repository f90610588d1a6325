"""Which GPUs a process may use, and why one can't be used."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from finetune.config.fields import RunConfig
from finetune.runs.resolve import resolve
from finetune.sweep import worker_pool
from finetune.system import cuda
from finetune.system.devices import list_devices, visible_devices, worker_devices
from finetune.system.errors import ConfigError, DeviceError
from finetune.system.resources import is_out_of_memory
from tests.conftest import ROOT

ONE = "GPU 0: Tesla T4 (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)\n"
MIXED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa)
  MIG 3g.20gb     Device  0: (UUID: MIG-bbbb)
  MIG 3g.20gb     Device  1: (UUID: MIG-cccc)
GPU 1: NVIDIA GeForce RTX 3090 (UUID: GPU-dddd)
"""


@pytest.mark.parametrize(
    ("listed", "devices"),
    [
        ("", []),
        ("No devices found.\n", []),
        (ONE, ["GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f"]),
        (MIXED, ["MIG-bbbb", "MIG-cccc", "GPU-dddd"]),
    ],
)
def test_devices_are_uuids_and_an_instance_of_mig_replaces_its_gpu(
    listed: str, devices: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list_devices(listed) == devices
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'EOT'\n{listed}EOT\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == devices


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, ["GPU-small", "GPU-large", "GPU-large"]),
        ("1", ["1", "1"]),
        ("GPU-lar,GPU-small", ["GPU-lar", "GPU-small", "GPU-lar"]),
        ("MIG-b", ["MIG-b"]),
        ("", []),
    ],
)
def test_a_large_gpu_has_two_workers(
    asked: str | None, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --list-gpus ]; then\n'
        'echo "GPU 0: T4 (UUID: GPU-small)"; echo "GPU 1: H100 (UUID: GPU-large)"\n'
        'else echo "0, GPU-small, 15360"; echo "1, GPU-large, 81559"; fi\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if asked is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    assert worker_devices() == expected


def test_a_broken_nvidia_smi_means_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == []


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@needs_no_gpu
def test_an_assigned_gpu_that_cannot_be_used_is_an_error_and_not_a_run_on_the_cpu(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-dddd")
    for accelerator in ("auto", "gpu", "cuda"):
        config = RunConfig.from_fields(fields | {"accelerator": accelerator})
        with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES is GPU-dddd, but CUDA can't"):
            resolve(config)
    config, _, _ = resolve(RunConfig.from_fields(fields | {"accelerator": "cpu"}))
    assert config.accelerator == "cpu"


@needs_no_gpu
@pytest.mark.parametrize("none", ["", "-1"])
def test_without_an_assigned_gpu_auto_is_the_cpu_and_gpu_an_error(
    none: str, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
    config, _, _ = resolve(RunConfig.from_fields(fields | {"accelerator": "auto"}))
    assert config.accelerator == "cpu"
    with pytest.raises(ConfigError, match=r"got 'gpu', but torch finds none here \(.+\); pass"):
        resolve(RunConfig.from_fields(fields | {"accelerator": "gpu"}))


def test_a_driver_that_is_too_old_is_named_with_the_pip_line_that_helps() -> None:
    text = "The NVIDIA driver on your system is too old (found version 12080). Please update"
    line = cuda.explain_cuda_error(text)
    assert "the driver is too old for torch" in line
    assert line.endswith("pip install --force-reinstall torch torchvision --index-url "
                         "https://download.pytorch.org/whl/cu128")  # fmt: skip
    old = cuda.explain_cuda_error(text.replace("12080", "10020"))
    assert old.endswith("update the driver")


@pytest.mark.parametrize(
    ("capability", "architectures", "is_supported"),
    [
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 6), ["sm_75", "sm_80"], True),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_a_card_without_kernels_is_refused_before_the_first_one(
    capability: tuple[int, int],
    architectures: list[str],
    is_supported: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    if is_supported:
        cuda.check_architecture()
    else:
        with pytest.raises(DeviceError, match=r"Tesla V100 has compute capability .*kernels for"):
            cuda.check_architecture()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_the_fork_server_s_imports_leave_cuda_untouched(tmp_path: Path) -> None:
    """A process that is forked after cuInit can't use CUDA."""
    library, log = tmp_path / "libcuda.so.1", tmp_path / "log"
    source = ROOT / "tests" / "support" / "fake_cuda.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    log.touch()
    program = (
        "import finetune.sweep.preload, pathlib, sys, torch\n"
        "log = pathlib.Path(sys.argv[1])\n"
        "print(repr(log.read_text()), torch.cuda.is_available(), repr(log.read_text()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, log],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "FAKE_CUDA_LOG": str(log)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["''", "False", r"'cuInit\n'"]


def ignore_everything(started: object) -> None:
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started.set()  # type: ignore[attr-defined]
    time.sleep(600)


def test_a_process_that_hangs_at_its_exit_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "EXIT_SECONDS", 0.5)
    context = multiprocessing.get_context("forkserver")
    started = context.Event()
    process = context.Process(target=ignore_everything, args=(started,))
    process.start()
    assert started.wait(30)
    worker_pool._join(process)
    assert process.exitcode is not None


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("[enforce fail] can't allocate memory: you tried"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_lack_of_memory_is_recognised_in_all_its_forms(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory
