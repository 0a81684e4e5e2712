"""Recognise that memory has run out, on any device."""

import torch

MESSAGES = (
    "out of memory",  # CUDA, MPS, ROCm, XPU
    "can't allocate memory",  # PyTorch's CPU allocator
    "not enough memory",  # the same on Windows
    "unable to find an engine",  # cuDNN, where no way to convolve finds its workspace
    "cudnn_status_alloc_failed",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",  # its handles are made when a thread first multiplies
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory has run out.

    PyTorch raises `torch.cuda.OutOfMemoryError` there, but plain RuntimeErrors elsewhere.
    """
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(message in text for message in MESSAGES)
