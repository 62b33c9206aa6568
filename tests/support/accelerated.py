"""Models of other libraries, their accelerated copies, and how two are compared."""

import copy

import pytest
import torch

from beit_fast import accelerate
from beit_fast.kernels import _triton
from tiny_models import PER_BLOCK, VANILLA, build_timm

FAMILIES = {
    "shared": {},
    "per-block": PER_BLOCK,
    "shared-and-per-block": {"use_rel_pos_bias": True},
    "vanilla": VANILLA,
    "token-pooling": {"use_rel_pos_bias": True, "global_pool": "token"},
    "no-bias": {"use_shared_rel_pos_bias": False},
}


def _of_transformers(name):
    """A class of transformers, imported here, for conftest.py imports this file."""
    import transformers

    return getattr(transformers, name)


MODELS = {
    "timm": lambda config, c: build_timm(config),
    "transformers": lambda config, c: _of_transformers("BeitForImageClassification")(c),
    "transformers-mim": lambda config, c: _of_transformers("BeitForMaskedImageModeling")(c),
}
TABLE = "relative_position_bias_table"
every_model = pytest.mark.parametrize("kind", MODELS)
either = pytest.mark.parametrize("kind", ["timm", "transformers"])


@pytest.fixture
def pair(tiny, randomize, transformers_config):
    """A model and its accelerated copy, random weights, in eval."""

    def make(kind, attention="sdpa", hidden_dropout=0.0, **fields):
        config = tiny(**(PER_BLOCK | fields))
        theirs = transformers_config(config)
        theirs._attn_implementation = attention
        theirs.drop_path_rate = config.drop_path_rate
        theirs.hidden_dropout_prob = hidden_dropout
        model = randomize(MODELS[kind](config, theirs)).eval()
        accelerated = copy.deepcopy(model)
        accelerate(accelerated)
        return model, accelerated

    return make


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


@pytest.fixture
def forget_warnings(monkeypatch):
    monkeypatch.setattr(_triton, "_warned", set())
