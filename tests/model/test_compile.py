"""The training loss is one graph to the compiler, and stays the one that was compiled."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.model.heads import BeitForMaskedImageModeling

B, L = 3, 16


def batch(number):
    """Another one for each number: images, masks of other sizes, tokens."""
    generator = torch.Generator().manual_seed(number)
    mask = torch.rand(B, L, generator=generator) < 0.2 + 0.05 * number
    index = torch.full((B * L,), -1, dtype=torch.int32)
    hidden = mask.flatten().nonzero().flatten().int()
    index[: len(hidden)] = hidden
    images = torch.randn(B, 3, 32, 32, generator=generator)
    return images, mask, index, torch.randint(24, (B, L), generator=generator)


@pytest.mark.parametrize("skips", [False, True], ids=["all-rows", "listed-rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_epoch_is_compiled_once(tiny, randomize, dtype, skips):
    fields = {"depth": 3, "drop_path_rate": 0.4, "skip_unread_rows": skips}
    model = randomize(BeitForMaskedImageModeling(tiny(**fields))).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch._dynamo.reset()  # what other tests compiled of the same code makes sizes dynamic
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.loss, fullgraph=True, backend=counter)
    for number in range(6):
        images, mask, index, tokens = batch(number)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            torch.manual_seed(number)
            loss, _ = compiled(images, mask, index[: B * 12], tokens)
            with torch.no_grad():
                torch.manual_seed(number)
                expected, _ = model.loss(images, mask, index[: B * 12], tokens)
        bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(loss, expected, rtol=bound, atol=0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1


class Copies(TorchDispatchMode):
    """Elements copied, by operator, in tensors of at least `size`."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copies = (
            torch.ops.aten.clone.default,
            torch.ops.aten.copy_.default,
            torch.ops.aten.cat.default,
        )
        if func in copies and out.numel() >= self.size:
            self.found.append((func, tuple(out.shape)))
        return out


def test_queries_keys_and_values_enter_and_leave_attention_without_a_copy(tiny, randomize):
    model = randomize(BeitForMaskedImageModeling(tiny(depth=2)))
    attention = model.blocks[0].attn
    D = attention.qkv.in_features
    x = torch.randn(B, L + 1, D, requires_grad=True)
    bias = model.rel_pos_bias()
    with Copies(B * (L + 1) * D) as copies:
        out = attention(x, bias)
        out.backward(torch.ones_like(out))
    assert copies.found == []
