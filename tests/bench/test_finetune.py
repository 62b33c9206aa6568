"""The bench of fine-tuning steps: everyone trains the same net, in the same way."""

import functools

import pytest
import torch

from beit_fast.model.config import BeitConfig

TINY = BeitConfig(
    img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=4,
    use_rel_pos_bias=True, use_shared_rel_pos_bias=False,
)  # fmt: skip
LIBRARIES = ["timm", "transformers"]


def step_of(bench, name, **options):
    model = bench("model")
    settings = {"batch": 4, "device": "cpu", "precision": "fp32", "compiled": False, **options}
    return bench("finetune").make_step(TINY, model.build_peer(name, TINY), **settings)


@pytest.mark.parametrize("name", [*LIBRARIES, *(f"accelerated {name}" for name in LIBRARIES)])
def test_a_librarys_loss_and_gradients_are_ours(bench, name):
    bench("finetune").check(functools.partial(bench("model").build_peer, name), name, "cpu")


def test_another_net_is_not_timed(bench, monkeypatch):
    finetune = bench("finetune")
    build = functools.partial(bench("model").build_peer, "timm")
    monkeypatch.setattr(finetune._Logits, "forward", lambda self, x, **_: 1.01 * self.model(x))
    with pytest.raises(SystemExit, match="nothing is timed"):
        finetune.check(build, "timm", "cpu")


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_librarys_layers_learn_at_the_rates_of_ours(bench, name):
    def rates(task):
        return {
            (group["lr_scale"], group["weight_decay"]): sum(p.numel() for p in group["params"])
            for group in task.param_groups(0.05)
        }

    ours, theirs = (rates(step_of(bench, who).task) for who in ("ours", name))
    assert theirs == ours


@pytest.mark.parametrize("name", ["ours", *LIBRARIES])
def test_a_step_trains_every_weight(bench, name):
    step = step_of(bench, name)
    for group in step._take._optimizer.param_groups:
        group["lr"].fill_(0.1)
    parameters = dict(step.task.model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    step()
    assert [n for n, p in parameters.items() if torch.equal(p, before[n])] == []
