"""What an issue says of the environment: versions, processor, devices."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("numpy", "accelerate", "lightning", "transformers", "matplotlib", "tqdm")


def show_versions() -> str:
    """Describe the environment for an issue: versions of Python, torch and frameworks, processor and devices.

    Returns:
        Lines of `name: value`.

    Example:
        >>> print(show_versions())
        balanceopt: ...
        Python: ...
        torch: ...
    """
    from balanceopt import __version__  # imported here, because the package imports this module

    threads = torch.get_num_threads()
    lines = {
        "balanceopt": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, built for CUDA {torch.version.cuda}",
        **{name: _version_of(name) for name in _PACKAGES},
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()} kernels, threads: {threads}",
        "devices": _devices(),
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    if not torch.accelerator.is_available():
        return "cpu"
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return f"{count} x {kind} {', '.join(sorted(names))}".rstrip()
