"""Which module a value that is not finite is found in, forward and backward."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast import Beit
from beit_fast.model.config import BeitConfig
from beit_fast.train.first_bad import Finding, FirstBad


class Overflows(nn.Module):
    """x -> x, exp(200) times as large in bf16, forward; or in the gradient alone."""

    def __init__(self, *, backward: bool) -> None:
        super().__init__()
        self._backward = backward

    def forward(self, x: Tensor) -> Tensor:
        if not self._backward:
            return (x.bfloat16() * 1e20 * 1e20).float()
        return Enlarged.apply(x)


class Enlarged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient.bfloat16() * 1e20 * 1e20).float()


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(8), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


def chain(*, planted: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), planted or nn.GELU(), nn.Linear(8, 8))
    return nn.Sequential(Residual(nn.Linear(8, 8)), Residual(inner), nn.Linear(8, 4))


def found_in(model: nn.Module, x: Tensor, loss=lambda out: out.square().mean()) -> Finding | None:
    with FirstBad(model) as watch:
        value = loss(model(x))
        watch.look_at_loss(value)
        if watch.found is None:
            value.backward()
        if watch.found is None:
            watch.look_at_gradients()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return watch.found


def batch() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def test_what_is_finite_has_no_place():
    assert found_in(chain(), batch()) is None


def test_a_weight_that_is_not_finite_is_named():
    model = chain()
    with torch.no_grad():
        model[1].inner[2].weight[3, 1] = torch.nan
        model[1].inner[2].weight[4, 2] = torch.inf
    found = found_in(model, batch())
    assert (found.module, found.kind) == ("1.inner.2", "Linear")
    assert (found.what, found.shape) == ("parameter weight", (8, 8))
    assert (found.num_nan, found.num_inf, found.backward) == (1, 1, False)
    assert str(found) == (
        "first in the forward pass: the parameter weight of 1.inner.2 (Linear), 8x8, has 1 NaN and "
        "1 infinite values"
    )


def test_an_input_that_is_not_finite_is_the_models():
    x = batch()
    x[0, 0] = torch.inf
    found = found_in(chain(), x)
    assert (found.module, found.what) == ("", "input 0 0")
    assert "of the model (Sequential), 3x8, has 0 NaN and 1 infinite" in str(found)


def test_an_input_that_explodes_is_found_where_it_does():
    found = found_in(chain(), batch() * 1e30)
    assert (found.module, found.kind, found.what) == ("0.norm", "LayerNorm", "output")


def test_what_overflows_forward_is_found_innermost():
    found = found_in(chain(planted=Overflows(backward=False)), batch())
    assert (found.module, found.kind, found.what) == ("1.inner.1", "Overflows", "output")
    assert found.num_inf == 24


def test_what_overflows_backward_is_found_where_the_gradient_is_made():
    found = found_in(chain(planted=Overflows(backward=True)), batch())
    assert (found.module, found.what) == ("1.inner.1", "gradient of its input")
    assert found.backward
    assert "first in the backward pass: the gradient of its input of 1.inner.1" in str(found)


def test_what_goes_bad_between_modules_is_found_at_the_next():
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second((self.first(x) * 1e30) ** 2)

    found = found_in(Between(), batch())
    assert (found.module, found.what) == ("second", "input 0 0")


def test_a_loss_of_finite_outputs_is_told_as_itself():
    found = found_in(chain(), batch(), lambda out: (out * 1e30).square().mean())
    assert (found.module, found.what) == ("loss", "loss, of finite outputs,")
    assert "the loss, of finite outputs," in str(found)


def test_a_gradient_that_the_loss_spoils_is_the_last_outputs():
    found = found_in(chain(), batch(), lambda out: (out - out.detach()).abs().sum().sqrt())
    assert (found.module, found.what) == ("", "gradient of its output")


def test_gradients_that_are_too_large_together_are_found_after_all():
    model = nn.Linear(2, 1, bias=False)
    with FirstBad(model) as watch:
        for _ in range(2):
            (model(torch.full((1, 2), 3e38)).sum() * 1).backward()
            watch.next_batch()
        assert watch.found is None
        watch.look_at_gradients()
    assert watch.found.what == "gradient of its parameter weight, summed"


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_every_module_of_a_beit_is_watched(checkpointing):
    """Its blocks call their modules in fewer passes where nobody looks."""
    torch.manual_seed(0)
    config = BeitConfig(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    for name in ("blocks.1.mlp.fc1", "blocks.0.mlp.fc1", "blocks.1.norm2", "patch_embed.proj"):
        model = Beit(config).train()
        model.set_grad_checkpointing(checkpointing)
        nn.init.constant_(model.get_submodule(name).weight, 3e38)  # finite
        with warnings.catch_warnings(), FirstBad(model) as watch:
            warnings.simplefilter("ignore", UserWarning)
            F.mse_loss(model(torch.randn(2, 3, 16, 16)), torch.zeros(()))
        assert watch.found is not None
        # The projection of patches is a product of the module around it.
        assert watch.found.module == name.replace("patch_embed.proj", "patch_embed")
        assert watch.found.what == "output"
