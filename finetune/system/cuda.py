"""Whether CUDA can be used on this machine, and why not."""

import re
import warnings
from contextlib import suppress

import torch

from finetune.system.errors import DeviceError

_WHEELS = (118, 121, 124, 126, 128, 130)
"""The versions of CUDA, times 10, of which PyTorch's server has or had wheels."""


def device_name(accelerator: str) -> str:
    """The GPU's name; of other accelerators that of the accelerator."""
    return torch.cuda.get_device_name() if accelerator == "cuda" else accelerator


def cuda_fault() -> str:
    """Why torch can't use CUDA, in one line, and what helps."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install one with it"
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return explain_cuda_error(str(error))
    return "there is no such device"


def explain_cuda_error(text: str) -> str:
    """An error of CUDA's start as one line; of a driver that is too old with the pip line."""
    if found := re.search(r"driver .*too old \(found version (\d+)(\d\d)0\)", text):
        version = int(found[1]) * 10 + int(found[2])
        fitting = [wheel for wheel in _WHEELS if wheel <= version]
        help_line = "update the driver"
        if fitting:
            index = f"https://download.pytorch.org/whl/cu{fitting[-1]}"
            help_line += f", or pip install --force-reinstall torch torchvision --index-url {index}"
        return f"the driver is too old for torch {torch.__version__}: {help_line}"
    return " ".join(text.split())[:200]


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def use_share_of_memory(num_sharing: int) -> None:
    """Leave the others of so many processes their share of the GPU's memory."""
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # a GPU that can't be used is reported where it is needed
            torch.cuda.set_per_process_memory_fraction(1 / num_sharing)


def free_bytes() -> float:
    """The memory of the current GPU that this process may still fill."""
    free, total = torch.cuda.mem_get_info()
    kept = torch.cuda.memory_reserved()
    share = torch.cuda.get_per_process_memory_fraction()
    return min(free, share * total - kept) + kept - torch.cuda.memory_allocated()


def check_architecture() -> None:
    """Raises `DeviceError` if torch has no kernels for the current card."""
    major, minor = torch.cuda.get_device_capability()
    architectures = torch.cuda.get_arch_list()
    if architectures and not any(_runs_on(name, major, minor) for name in architectures):
        raise DeviceError(
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, but torch "
            f"{torch.__version__} has kernels for {', '.join(architectures)} only. Install a torch "
            "that supports it, or pass --accelerator cpu"
        )


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether a card of this compute capability runs code for `sm_86` or `compute_90`.

    Binary code runs on the same major version from its own minor version on, PTX on all later ones.
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
    if not found:
        return False
    kind, built = found[1], (int(found[2]), int(found[3]))
    is_same_major = built[0] == major
    return built <= (major, minor) and (is_same_major or kind == "compute")
