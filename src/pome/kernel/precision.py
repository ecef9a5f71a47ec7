"""Arithmetic in full float32 or float64, whatever precision the caller has switched on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


def to_float64(A: Tensor) -> Tensor:
    """A in float64: where it is, or on the CPU where its device (mps) has no float64."""
    return A.cpu().double() if A.device.type == "mps" else A.double()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Context without autograd, autocast, TF32 and bfloat16 products; every setting is restored afterwards.

    With `torch.set_float32_matmul_precision("medium")` even a CPU multiplies float32 matrices in bfloat16 where it has
    the instructions, which is an error of 1e-3 where the certificate asks for 1e-5.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        _enter()
        try:
            yield
        finally:
            _leave()


# The switches of products are the process's, not the thread's: the first thread in saves them, the last out restores.
_lock = threading.Lock()
_inside = 0
_settings = ExitStack()


def _enter() -> None:
    global _inside
    with _lock:
        if _inside == 0:
            _switch(_settings)
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            _settings.close()


def _switch(stack: ExitStack) -> None:
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if all(hasattr(backend, "fp32_precision") for backend in backends):
        for backend in backends:
            stack.callback(restore_precision, backend, backend.fp32_precision)
            backend.fp32_precision = "ieee"
    else:  # torch before 2.9 has one switch for both
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")


def restore_precision(backend: Any, before: str) -> None:
    """Set a backend's precision back: to "none", which inherits the wider setting, where that reads the same."""
    backend.fp32_precision = "none"
    if backend.fp32_precision != before:
        backend.fp32_precision = before
