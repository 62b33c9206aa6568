"""Models of timm and transformers beside their accelerated copies, and what both give."""

import pytest
import torch

from tiny_models import build_timm

TABLE = "relative_position_bias_table"
every_model = pytest.mark.parametrize("kind", ["timm", "transformers", "transformers-mim"])
either = pytest.mark.parametrize("kind", ["timm", "transformers"])


def build_model(kind, config, theirs):
    """By our configuration, or by `theirs` of transformers."""
    if kind == "timm":
        return build_timm(config)
    import transformers

    if kind == "transformers":
        return transformers.BeitForImageClassification(theirs)
    return transformers.BeitForMaskedImageModeling(theirs)


def run(model, images, **options):
    out = model(images, **options)
    return out if isinstance(out, torch.Tensor) else out.logits


def results(model, images, seed=3, **options):
    """The output and the gradient of everything that is trained, by name."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = run(model, images, **options)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    named = model.named_parameters()
    return {"out": out.detach(), **{n: p.grad for n, p in named if p.grad is not None}}


def assert_within(ours, theirs, exact):
    """Error against fp64 at most twice the library's own, plus one rounding, tensor by tensor."""
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, want in exact.items():
        allowed = 2 * (theirs[name].double() - want).norm()
        allowed = allowed + torch.finfo(theirs[name].dtype).eps * want.norm()
        error = (ours[name].double() - want).norm()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
