"""The most memory that training took."""

from __future__ import annotations

import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def forget_peak(device: torch.device) -> None:
    """Measure a GPU's peak from here on; a process's own cannot be taken back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """The most memory in use at once, in bytes.

    On a GPU that of torch's tensors since `forget_peak`; elsewhere the resident set of the whole process
    since it started, libraries and images included. None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size
