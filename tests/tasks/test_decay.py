"""What AdamW decays, by name and for every recipe; whole trajectories against AdamW written out.

The rule is the original's (spec 6 and 7.2): not decayed are vectors, biases, positions and [CLS].
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from beit_fast.data.views.config import AugmentConfig
from beit_fast.model.heads import BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.recipes import FINETUNE, PRETRAIN, TOKENIZER
from beit_fast.tasks.finetune.task import FinetuneTask
from beit_fast.tasks.pretrain.dvae import DvaeTask
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tokenizer.checkpoint import load_tokenizer
from beit_fast.tokenizer.dvae import Dvae
from beit_fast.train.config import OptimConfig
from beit_fast.train.loop import train
from beit_fast.train.seeds import step_seed
from task_runs import ALONE

STEPS = 12

# Written out, not computed: the weights of a block and of the heads.
MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
VECTORS = (
    *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias"),
    *("attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias", "gamma_1", "gamma_2"),
)
DECAYED = {"patch_embed.proj.weight", "mask_token", "lm_head.weight", "head.weight"}
DECAYED |= {"pixel_head.weight", "rel_pos_bias.relative_position_bias_table"}
SPARED = {"patch_embed.proj.bias", "cls_token", "pos_embed", "lm_head.bias", "head.bias"}
SPARED |= {"pixel_head.bias", "norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias"}


def is_decayed(name):
    """By the lists above; KeyError for a parameter that they do not know."""
    if name.startswith("blocks."):
        part = name.split(".", 2)[2]
        if part == "attn.relative_position_bias_table":
            return True
        return {**dict.fromkeys(MATRICES, True), **dict.fromkeys(VECTORS, False)}[part]
    return {**dict.fromkeys(DECAYED, True), **dict.fromkeys(SPARED, False)}[name]


def decay_by_name(task, weight_decay):
    """Each parameter's decay; it is in one group and no other."""
    names = {id(p): n for n, p in task.model.named_parameters()}
    pairs = [
        (names[id(parameter)], group["weight_decay"])
        for group in task.param_groups(weight_decay)
        for parameter in group["params"]
    ]
    assert len(pairs) == len(names)
    assert {name for name, _ in pairs} == set(names.values())
    return dict(pairs)


def task_on_meta(task_class, config, model):
    """A task as far as `param_groups` needs it: no data, no memory."""
    task = object.__new__(task_class)
    task.config, task.model = config, model
    return task


@pytest.mark.parametrize("name", PRETRAIN)
@pytest.mark.parametrize("with_tables", [True, False])
def test_pretraining_decays_what_the_original_does(name, with_tables):
    config = replace(PRETRAIN[name](), weight_decay_on_rel_pos_bias=with_tables)
    with torch.device("meta"):
        task = task_on_meta(PretrainTask, config, BeitForMaskedImageModeling(config.model))
    found = decay_by_name(task, config.optim.weight_decay)
    tables = {n for n in found if n.endswith("relative_position_bias_table")}
    assert bool(tables) == config.model.use_shared_rel_pos_bias
    for parameter, decay in found.items():
        decays = is_decayed(parameter) and (with_tables or parameter not in tables)
        assert decay == (0.05 if decays else 0), parameter
    assert found["mask_token"] == 0.05
    assert found["cls_token"] == 0
    assert found.get("pos_embed", 0) == 0


@pytest.mark.parametrize("name", FINETUNE)
@pytest.mark.parametrize("with_tables", [True, False])
def test_finetuning_decays_what_the_original_does(name, with_tables):
    config = replace(FINETUNE[name](), weight_decay_on_rel_pos_bias=with_tables)
    weight_decay = config.optim.weight_decay
    with torch.device("meta"):
        model = BeitForImageClassification(replace(config.model, num_classes=10))
    found = decay_by_name(task_on_meta(FinetuneTask, config, model), weight_decay)
    for parameter, decay in found.items():
        decays = is_decayed(parameter)
        if parameter.endswith("relative_position_bias_table"):
            decays = with_tables
        assert decay == (weight_decay if decays else 0), parameter


@pytest.mark.parametrize("name", TOKENIZER)
def test_a_tokenizer_decays_everything_and_its_encoder_may_learn_slower(name):
    config = TOKENIZER[name]()
    with torch.device("meta"):
        task = task_on_meta(DvaeTask, config, Dvae(config.dvae))
    found = decay_by_name(task, 1e-4)
    assert set(found.values()) == {1e-4}
    encoder, decoder = task.param_groups(1e-4)
    assert encoder["lr_scale"] == config.encoder_lr_scale
    assert decoder.get("lr_scale", 1.0) == 1.0


def official_schedule(peak, last, steps, warmup):
    """unilm's `cosine_scheduler`, as its arrays."""
    count = np.arange(steps - warmup)
    cosine = last + 0.5 * (peak - last) * (1 + np.cos(math.pi * count / len(count)))
    return np.concatenate((np.linspace(0, peak, warmup), cosine))


def independent_weights(task, config, rule, *, decay_end=None):
    """The task's weights after STEPS steps by AdamW's formulas in fp64; gradients are fp32's.

    `rule(name)` is (scale of the learning rate, whether decayed).
    """
    optim, run = config.optim, config.run
    task.to(torch.device("cpu"))
    task.model.train()
    parameters = dict(task.model.named_parameters())
    weights = {n: p.detach().double() for n, p in parameters.items()}
    first = {n: torch.zeros_like(w) for n, w in weights.items()}
    second = {n: torch.zeros_like(w) for n, w in weights.items()}
    rates = official_schedule(optim.lr, optim.min_lr, STEPS, optim.warmup_steps)
    decays = np.full(STEPS, optim.weight_decay)
    if decay_end is not None:
        decays = official_schedule(optim.weight_decay, decay_end, STEPS, 0)
    beta1, beta2 = optim.betas
    batches = task.batches(0)
    for step in range(STEPS):
        task.begin_step(step)
        torch.manual_seed(step_seed(run.seed, step, 0))
        loss, _ = task.loss(task.prepare(next(batches)))
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        gradients = {n: g.double() for n, g in zip(parameters, gradients, strict=True)}
        norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        clip = 1.0
        if optim.clip_grad is not None:
            clip = min(1.0, optim.clip_grad / (norm + 1e-6))
        for name, gradient in gradients.items():
            scale, is_decayed_ = rule(name)
            rate = rates[step] * scale
            gradient = gradient * clip
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            mean = first[name] / (1 - beta1 ** (step + 1))
            root = (second[name] / (1 - beta2 ** (step + 1))).sqrt() + optim.eps
            weights[name] = weights[name] * (1 - rate * decays[step] * is_decayed_)
            weights[name] = weights[name] - rate * mean / root
            parameters[name].data = weights[name].to(parameters[name].dtype)
    batches.close()
    return weights


def trained(task, config):
    train(task, config.optim, config.run, settings={}, world=ALONE)
    return dict(task.model.named_parameters())


def assert_close(found, expected):
    for name, weight in expected.items():
        far = float((found[name].detach().double() - weight).abs().max())
        assert far < 2e-5, (name, far)  # rounding; a wrong decay is 100 times as much


@pytest.mark.parametrize("vanilla", [True, False])
@pytest.mark.parametrize("decay_end", [None, 0.3])
def test_twelve_steps_of_pretraining_are_the_formulas(pretrain_config, vanilla, decay_end):
    config = pretrain_config(
        model={
            "use_abs_pos_emb": vanilla,
            "use_shared_rel_pos_bias": not vanilla,
            "init_values": None if vanilla else 0.1,
        },
        # So much decay that what is decayed wrongly is far off.
        optim={
            "lr": 5e-3,
            "min_lr": 1e-4,
            "warmup_steps": 3,
            "weight_decay": 0.9,
            "weight_decay_end": decay_end,
            "clip_grad": 1.0,
        },
        run={"steps": STEPS},
    )

    def rule(name):
        return 1.0, is_decayed(name)

    def task():
        return PretrainTask(config, load_tokenizer(config.tokenizer), ALONE)

    expected = independent_weights(task(), config, rule, decay_end=decay_end)
    found = trained(task(), config)
    assert_close(found, expected)
    # The test sees what it is for: a [CLS] that was decayed would be far from this one.
    cls_token = found["cls_token"].detach()
    rates = official_schedule(5e-3, 1e-4, STEPS, 3)
    assert float((cls_token * (1 - np.prod(1 - 0.9 * rates))).abs().max()) > 1e-4


def test_twelve_steps_of_finetuning_are_the_formulas(image_folder, tmp_path):
    config = FINETUNE["small_data"]()
    config = replace(
        config,
        init=None,
        model=replace(
            config.model, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2,
            drop_path_rate=0.2,
        ),
        data=replace(
            config.data, path=str(image_folder), batch_size=4, num_threads=1, held_out=None
        ),
        optim=OptimConfig(lr=5e-3, min_lr=1e-4, warmup_steps=3, weight_decay=0.9, clip_grad=None),
        augment=AugmentConfig(mixup=0.0, cutmix=0.0),
        run=replace(
            config.run, output=str(tmp_path / "run"), steps=STEPS, epochs=None, precision="fp32",
            device="cpu", evaluate_every=None,
        ),
        layer_decay=0.5,
    )  # fmt: skip

    def rule(name):
        layer = 3
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        return 0.5 ** (3 - layer), is_decayed(name)

    expected = independent_weights(FinetuneTask(config, ALONE), config, rule)
    assert_close(trained(FinetuneTask(config, ALONE), config), expected)


def test_twelve_steps_of_a_tokenizer_are_the_formulas(image_folder, tmp_path):
    config = TOKENIZER["demo"]()
    config = replace(
        config,
        dvae=replace(
            config.dvae, vocab_size=32, encoder_width=8, decoder_width=8, decoder_input_width=8
        ),
        data=replace(config.data, path=str(image_folder), batch_size=4, num_threads=1),
        view=replace(config.view, size=32),
        optim=OptimConfig(lr=5e-3, min_lr=1e-4, warmup_steps=3, weight_decay=0.9, clip_grad=1.0),
        run=replace(config.run, output=str(tmp_path / "run"), steps=STEPS),
        encoder_lr_scale=0.3,
    )

    def rule(name):
        return (0.3 if name.startswith("encoder.") else 1.0), True

    expected = independent_weights(DvaeTask(config, ALONE), config, rule)
    assert_close(trained(DvaeTask(config, ALONE), config), expected)
