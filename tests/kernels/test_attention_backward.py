"""The general backward kernels, and the choice between them and the special ones."""

import math

import pytest
import torch

from beit_fast.kernels._triton import A100, B200, H100, pretend
from beit_fast.kernels.attention import attention_reference
from beit_fast.kernels.attention_backward import attention_backward, choose_kernels
from beit_fast.kernels.attention_bias import pad_bias
from beit_fast.kernels.attention_configs import general_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def inputs(B, N, M, H=2, K=64, G=1, dtype=torch.bfloat16, std=1.0, device="cpu"):
    """dout, q, k, v in the dtype, and an fp32 bias (G, H, N, M)."""
    shapes = ((B, N, H, K), (B, N, H, K), (B, M, H, K), (B, M, H, K))
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    return *tensors, std * torch.randn(G, H, N, M, device=device)


def autograd(dout, q, k, v, bias, dtype, **options):
    """dq, dk, dv, dbias of the reference in a dtype; matmul operands rounded to the input's."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v, bias)]
    attention_reference(*leaves, **options).backward(dout.to(dtype))
    return [leaf.grad for leaf in leaves]


def eager(dout, q, k, v, bias, scale):
    """What eager PyTorch does in q's dtype: products in it, softmax in fp32."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v, bias)]
    q_, k_, v_ = (t.transpose(1, 2) for t in leaves[:3])
    logits = (q_ * scale) @ k_.transpose(2, 3)
    logits = logits + leaves[3].to(q.dtype).repeat(len(q) // len(bias), 1, 1, 1)
    weights = logits.float().softmax(dim=-1).to(q.dtype)
    (weights @ v_).transpose(1, 2).backward(dout)
    return [leaf.grad for leaf in leaves]


def forward_results(q, k, v, bias, scale, **options):
    """out in q's dtype and the base-2 log-sum-exp, from fp64."""
    out = attention_reference(*(t.double() for t in (q, k, v, bias)), scale=scale, **options)
    logits = torch.einsum("bnhk,bmhk->bhnm", scale * q.double(), k.double())
    logits = logits + bias.double().repeat(len(q) // len(bias), 1, 1, 1)
    lse = logits.logsumexp(dim=-1) * math.log2(math.e)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a query that sees no key
    return out.to(q.dtype), lse.float().contiguous()


def run(dout, q, k, v, bias, *, scale=None, padded=None, wanted="qkvb", config=True, **options):
    """dq, dk, dv, dbias of the general kernels; outputs start as NaN."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dropout_p, rng = options.get("dropout_p", 0.0), options.get("rng")
    out, lse = forward_results(q, k, v, bias, scale, **options)
    padded = pad_bias(bias, [], q, k.shape[1], scale) if padded is None else padded
    gradients = {
        f"d{name}": torch.full_like(t, torch.nan) if name in wanted else None
        for name, t in zip("qkv", (q, k, v), strict=True)
    }
    if config is True:
        config = general_config(H100, q.dtype, q.shape[1], q.shape[3], dropout_p > 0)
    partials = attention_backward(
        dout, q, k, v, padded, out, lse,
        scale=scale, dropout_p=dropout_p, rng=rng, tf32=False,
        **gradients, trains_bias="b" in wanted, config=config,
    )  # fmt: skip
    dbias = None
    if partials is not None:
        dbias = partials[..., : q.shape[1], : k.shape[1]].sum(dim=0)
    return [*gradients.values(), dbias]


def assert_exact(tensors, results, scale=None, **options):
    """Errors against fp64 at most twice eager's in the same dtype, and one rounding."""
    dtype, scale = tensors[1].dtype, tensors[1].shape[3] ** -0.5 if scale is None else scale
    exact = autograd(*tensors, torch.float64, scale=scale, **options)
    if dtype == torch.float32 or options:
        theirs = autograd(*tensors, dtype, scale=scale, **options)
    else:
        theirs = eager(*tensors, scale)
    names = ("dq", "dk", "dv", "dbias")
    for name, want, their, our in zip(names, exact, theirs, results, strict=True):
        if our is None:
            continue
        allowed = 2 * (their - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        error = (our - want).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("N", "M"), [(5, 5), (49, 64), (65, 65), (128, 70), (70, 130), (197, 197)], ids=str
)
def test_gradients_are_as_exact_as_eager_ones(N, M, dtype):
    tensors = inputs(2 if N < 100 else 1, N, M, H=1, dtype=dtype)
    assert_exact(tensors, run(*tensors))


@pytest.mark.parametrize("K", [8, 32, 48, 80, 88, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_heads_of_any_width(K, dtype):
    tensors = inputs(1, 40, 40, K=K, dtype=dtype)
    assert_exact(tensors, run(*tensors))


@pytest.mark.parametrize("std", [0.02, 4.0])
def test_small_and_large_biases(std):
    tensors = inputs(2, 70, 70, H=1, std=std)
    assert_exact(tensors, run(*tensors))


def test_a_bias_too_large_for_fp16_at_a_tiny_scale():
    tensors = inputs(2, 20, 20, dtype=torch.bfloat16)
    for config in (True, None):  # the general kernels, and what is chosen without a wish
        assert_exact(tensors, run(*tensors, scale=1e-3, config=config), scale=1e-3)


def test_groups_take_and_give_their_own_bias():
    tensors = inputs(6, 40, 40, G=3, dtype=torch.float32)
    assert_exact(tensors, run(*tensors))


def test_masked_pairs_give_nothing():
    tensors = inputs(2, 70, 70, dtype=torch.float32)
    bias = tensors[4]
    bias[:, :, 3] = -torch.inf
    bias[:, 0, :, 7] = -torch.inf
    results = run(*tensors)
    assert (results[0][:, 3] == 0).all()
    assert (results[3][:, :, 3] == 0).all()
    assert (results[3][:, 0, :, 7] == 0).all()
    for ours, theirs in zip(results, autograd(*tensors, torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_no_bias_is_a_broadcast_row():
    dout, q, k, v, _ = inputs(2, 70, 40, dtype=torch.float32)
    zero = torch.zeros(1, 2, 70, 40)
    padded = pad_bias(None, [], q, 40, 0.125)
    results = run(dout, q, k, v, zero, padded=padded, wanted="qkv")
    assert_exact((dout, q, k, v, zero), results)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "b", "kv", "qb"])
def test_what_is_not_wanted_is_not_needed(wanted):
    tensors = inputs(2, 40, 40, dtype=torch.float32)
    everything = run(*tensors)
    for name, one, other in zip("qkvb", run(*tensors, wanted=wanted), everything, strict=True):
        assert (one is None) == (name not in wanted)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("odd", [1, 8], ids=["odd-rows", "aligned-rows"])
def test_strides_change_nothing(odd):
    tensors = inputs(2, 40, 40, dtype=torch.bfloat16)
    plain = run(*tensors)
    strided = [
        torch.nn.functional.pad(t.transpose(1, 2), (0, odd))[..., :64].transpose(1, 2)
        for t in tensors[:4]
    ]
    for one, other in zip(run(*strided, tensors[4]), plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("M", [40, 41], ids=["whole-quads", "cut-quad"])
def test_dropout_is_that_of_the_reference(M):
    tensors = inputs(2, 37, M, dtype=torch.float32)
    options = {"dropout_p": 0.25, "rng": torch.tensor([11, 12])}
    assert_exact(tensors, run(*tensors, **options), **options)


def test_the_gradient_of_the_bias_beats_that_of_peers_that_round_before_they_sum():
    tensors = inputs(64, 8, 8, H=1, K=32)
    exact = autograd(*tensors, torch.float64)[3]
    error = (run(*tensors)[3] - exact).norm()
    # SDPA, xformers and cuDNN write the gradient of the scores in 16 bits, then sum over images.
    their_error = (eager(*tensors, 32**-0.5)[3] - exact).norm()
    assert error < 0.75 * their_error


def test_two_runs_give_the_same_bits():
    tensors = inputs(5, 70, 70)
    for one, other in zip(run(*tensors), run(*tensors), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gpu", [A100, H100, B200], ids=["sm80", "sm90", "sm100"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids=["plain", "dropout"])
@pytest.mark.parametrize("K", [64, 96])
def test_every_tile_of_the_table_is_exact(gpu, dropout_p, K):
    tensors = inputs(1, 70, 70, H=1, K=K, dtype=torch.float16)
    options = {"dropout_p": dropout_p, "rng": torch.tensor([1, 2])} if dropout_p else {}
    config = general_config(gpu, torch.float16, 70, K, dropout_p > 0)
    results = run(*tensors, config=config, **options)
    exact = autograd(*tensors, torch.float64, **options)
    for ours, want in zip(results, exact, strict=True):
        assert (ours - want).norm() <= 2e-3 * want.norm()


@pytest.mark.parametrize(
    ("gpu", "N", "dtype", "dropout_p", "want"),
    [
        (H100, 49, torch.bfloat16, 0.0, "window"),
        (A100, 49, torch.bfloat16, 0.0, "window"),
        (H100, 197, torch.bfloat16, 0.0, "hopper"),
        (H100, 197, torch.float16, 0.0, "hopper"),
        (A100, 197, torch.bfloat16, 0.0, "general"),
        (B200, 197, torch.bfloat16, 0.0, "general"),
        (H100, 577, torch.bfloat16, 0.0, "general"),
        (H100, 197, torch.float32, 0.0, "general"),
        (H100, 49, torch.bfloat16, 0.1, "general"),
    ],
)
def test_each_shape_takes_the_kernels_made_for_it(gpu, N, dtype, dropout_p, want):
    q, k, v = torch.empty(4, N, 3, 2, 64, dtype=dtype).unbind(2)
    out, dout = (torch.empty(4, N, 2, 64, dtype=dtype) for _ in range(2))
    with pretend(gpu):
        assert choose_kernels(dout, q, k, v, out, dropout_p) == want


@pytest.mark.parametrize("N", [49, 70])
def test_whatever_runs_gives_the_same_within_rounding(N):
    tensors = inputs(3, N, N)
    special, general = run(*tensors, config=None), run(*tensors)
    for one, other in zip(special, general, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2)
