import pytest
import torch

from beit_fast.kernels.scale_residual import scale_residual, scale_residual_reference


def inputs(with_gamma: bool, with_keep: bool):
    x, branch = torch.randn(2, 3, 197, 64)
    gamma = torch.randn(64) if with_gamma else None
    keep = torch.tensor([0.0, 1.25, 1.25]) if with_keep else None
    return x, branch, gamma, keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_keep", [True, False], ids=["keep", "no-keep"])
@pytest.mark.parametrize("with_gamma", [True, False], ids=["gamma", "no-gamma"])
def test_as_exact_as_the_reference(assert_as_exact_as_reference, with_gamma, with_keep, dtype):
    x, branch, gamma, keep = inputs(with_gamma, with_keep)
    tensors = [t for t in (x, branch, gamma) if t is not None]

    def run(function):
        return lambda x, branch, gamma=None: function(x, branch, gamma, keep)

    assert_as_exact_as_reference(run(scale_residual), run(scale_residual_reference), tensors, dtype)


def test_reference_is_the_formula():
    x, branch, gamma, keep = inputs(True, True)
    out = scale_residual_reference(x, branch, gamma, keep)
    expected = x[1, 5, 7] + 1.25 * gamma[7] * branch[1, 5, 7]
    torch.testing.assert_close(out[1, 5, 7], expected)


def test_a_dropped_sample_passes_unchanged_and_its_branch_gets_no_gradient():
    x, branch, gamma, keep = inputs(True, True)
    branch.requires_grad_()
    out = scale_residual(x, branch, gamma, keep)
    out.sum().backward()
    assert torch.equal(out[0], x[0])
    assert not branch.grad[0].any()
    assert branch.grad[1].any()


def test_a_bf16_branch_joins_an_fp32_stream_in_fp32():
    x, branch, gamma, keep = inputs(True, True)
    branch = branch.bfloat16()
    for options in ((gamma, keep), (gamma, None), (None, keep), (None, None)):
        out = scale_residual(x, branch, *options)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, scale_residual_reference(x, branch, *options))


def test_shapes_that_do_not_fit_are_refused_by_name():
    x, branch, gamma, keep = inputs(True, True)
    with pytest.raises(ValueError, match="pass both as \\(B, N, D\\)"):
        scale_residual(x, branch[:, 1:])
    with pytest.raises(ValueError, match="gamma is \\(63,\\): pass \\(64,\\)"):
        scale_residual(x, branch, gamma[1:])
    with pytest.raises(ValueError, match="keep is \\(2,\\): pass \\(3,\\)"):
        scale_residual(x, branch, gamma, keep[1:])
