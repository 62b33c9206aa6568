"""What convolutions and products of fp32 are allowed to be while they run."""

import pytest
import torch
import torch.nn.functional as F


def precisions() -> tuple[str, str]:
    """Of cuDNN's convolutions and of cuBLAS's products."""
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def note_precisions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The list to which every conv2d and linear from now on adds its `precisions`."""
    seen = []

    def watch(function):
        def run(*args, **kwargs):
            seen.append(precisions())
            return function(*args, **kwargs)

        return run

    for name in ("conv2d", "linear"):
        monkeypatch.setattr(F, name, watch(getattr(F, name)))
    return seen
