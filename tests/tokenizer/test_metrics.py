import math

import pytest
import torch

from beit_fast.tokenizer.metrics import (
    code_entropy,
    codebook_use,
    count_codes,
    describe_codebook,
    reconstruction_error,
)


def test_counts_are_a_histogram_and_add_up_over_batches():
    ids = torch.randint(0, 7, (4, 5, 6))
    counts = count_codes(ids, 10)
    assert counts.tolist() == torch.bincount(ids.flatten(), minlength=10).tolist()
    assert torch.equal(count_codes(ids[:1], 10) + count_codes(ids[1:], 10), counts)


@pytest.mark.parametrize(
    ("counts", "used", "perplexity"),
    [([5] * 8, 1.0, 8.0), ([0, 9, 0, 0], 0.25, 1.0), ([3, 3, 0, 0], 0.5, 2.0), ([0, 0], 0.0, 1.0)],
    ids=["all", "one", "two", "none"],
)
def test_perplexity_is_the_number_of_equally_frequent_codes(counts, used, perplexity):
    use = codebook_use(torch.tensor(counts))
    assert use.used.item() == used
    assert use.perplexity.item() == pytest.approx(perplexity)


def test_entropy_is_the_loss_of_a_model_that_knows_only_the_marginals():
    ids = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 5000, replacement=True)
    counts = count_codes(ids, 4)
    share = counts[:3].double() / 5000
    loss = torch.nn.functional.nll_loss(share.log()[None].expand(5000, 3), ids)
    assert code_entropy(counts).item() == pytest.approx(loss.item())


def test_errors_are_those_of_the_pixels():
    images = torch.tensor([0.0, 0.5, 1.0])
    error = reconstruction_error(images, torch.tensor([0.5, 0.5, 0.0]))
    assert error.mae.item() == pytest.approx(0.5)
    assert error.mse.item() == pytest.approx(1.25 / 3)


def test_metrics_never_wait_for_the_device():
    ids = torch.zeros(2, 3, 4, dtype=torch.int64, device="meta")  # reading a value would raise
    use = codebook_use(count_codes(ids, 16))
    error = reconstruction_error(torch.empty(2, device="meta"), torch.empty(2, device="meta"))
    assert {t.device.type for t in (*use, *error)} == {"meta"}


def test_a_collapsed_codebook_is_called_so():
    counts = torch.zeros(512, dtype=torch.int64)
    counts[:5] = torch.tensor([960, 10, 10, 10, 10])
    line = describe_codebook(counts)
    assert line.startswith("COLLAPSED")
    assert "5 of 512 codes" in line
    assert "96%" in line


def test_a_codebook_in_use_is_not_called_collapsed():
    line = describe_codebook(torch.full((512,), 3))
    assert line == f"512 of 512 codes used in 1536 positions, perplexity {512:.1f}"
    assert math.isclose(codebook_use(torch.full((512,), 3)).perplexity.item(), 512)
