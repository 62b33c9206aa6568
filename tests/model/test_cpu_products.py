"""A training step under autocast on a CPU multiplies what timm's does, in the same types."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.model.config import BeitConfig
from beit_fast.model.heads import BeitForImageClassification

PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "mkldnn._linear_pointwise.")


class Products(TorchDispatchMode):
    """The products of linear layers, by type and sizes; what attention runs inside is its own."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if str(function).startswith(PRODUCTS):
            sizes = sorted(args[-2].shape[-2:] + args[-1].shape[-2:])
            self.counts[(out.dtype, out.ndim, tuple(sizes))] += 1
        return out


def products_of_a_step(model) -> Counter:
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    with Products() as products:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
    return products.counts


def test_linear_layers_under_autocast_multiply_in_bf16_as_often_as_timms():
    timm = pytest.importorskip("timm.models.beit")
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    with torch.device("cpu"):
        ours = BeitForImageClassification(
            BeitConfig(use_rel_pos_bias=True, init_values=0.1, **sizes)
        )
        theirs = timm.Beit(
            patch_size=16, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1, **sizes
        )
        our_products = products_of_a_step(ours)
        their_products = products_of_a_step(theirs)
    of_layers = Counter({k: n for k, n in their_products.items() if k[1] == 2})
    assert {dtype for dtype, _, _ in our_products} == {torch.bfloat16}
    # The patches are a product here and a convolution there: forward and weight gradient.
    assert sum(our_products.values()) == sum(of_layers.values()) + 2
    assert not of_layers - our_products
