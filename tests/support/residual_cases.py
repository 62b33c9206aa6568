"""What several test files of residual and norm share."""

import torch

BACKENDS = ("triton", "torch")
SEED_AND_OFFSET = (2**61 + 977, 2**33 + 5)
VECTORS = ("norm_weight", "norm_bias", "gamma", "bias")


def inputs(with_gamma: bool, with_keep: bool, num_tokens: int = 197):
    x, branch = torch.randn(2, 3, num_tokens, 64)
    gamma = torch.randn(64) if with_gamma else None
    keep = torch.tensor([0.0, 1.25, 1.25]) if with_keep else None
    return x, branch, gamma, keep


def rng_on(device):
    return torch.tensor(SEED_AND_OFFSET, device=device)


def run(function, tensors, douts, device, **options):
    """Outputs and the gradients of all tensors but keep, given the outputs' gradients."""
    leaves = {
        name: t.to(device).requires_grad_() if name != "keep" else t.to(device)
        for name, t in tensors.items()
    }
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [d.to(out.device, out.dtype) for d, out in zip(douts, outputs, strict=False)]
    trained = [t for name, t in leaves.items() if name != "keep"]
    return [*outputs, *torch.autograd.grad(outputs, trained, douts)]


def assert_same_to_rounding(ours, theirs, roundings=8):
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our.shape == their.shape
        assert our.dtype == their.dtype
        if their.numel():
            allowed = roundings * torch.finfo(torch.float32).eps * their.abs().max().clamp(min=1)
            error = (our - their).abs().max()
            assert error <= allowed, f"result {number}: error {error:.1e}, allowed {allowed:.1e}"
