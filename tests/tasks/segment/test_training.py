"""What a step of training a segmenter is made of: loss, parameter groups, a whole trajectory."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit_fast import BeitForSemanticSegmentation
from beit_fast.model.config import SegmenterConfig
from beit_fast.tasks.layer_decay import layer_decay_groups
from beit_fast.tasks.segment.training import SegmentTask, settings_of
from beit_fast.train.loop import train
from beit_fast.train.world import World
from task_runs import ALONE, RefuseSyncs, first_batch, records_of, take_batches

STEPS = 14

# Written out, not computed: which weights of a block, the pyramid and the heads have several axes.
MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
MATRICES += ("attn.relative_position_bias_table",)
VECTORS = (
    *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias"),
    *("attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias", "gamma_1", "gamma_2"),
)
CONV_MODULES = [
    *(f"decode_head.psp_modules.{k}.1" for k in range(4)),
    *(f"decode_head.{kind}_convs.{k}" for kind in ("lateral", "fpn") for k in range(3)),
    *("decode_head.bottleneck", "decode_head.fpn_bottleneck", "auxiliary_head.convs.0"),
]


def groups_by_hand(depth, rate):
    """{name: (share of the rate, whether it is decayed)} for patches of 16 pixels, a table for
    each block and positions: those of unilm's LayerDecayOptimizerConstructor."""
    first = rate ** (depth + 1)
    found = {
        "cls_token": (first, True),  # whose name there is backbone.cls_token
        "pos_embed": (first, True),
        "patch_embed.proj.weight": (first, True),
        "patch_embed.proj.bias": (first, False),
    }
    for block in range(depth):
        share = rate ** (depth - block)
        found |= {f"blocks.{block}.{name}": (share, True) for name in MATRICES}
        found |= {f"blocks.{block}.{name}": (share, False) for name in VECTORS}
    for name in CONV_MODULES:
        found |= {f"{name}.conv.weight": (1, True)}
        found |= {f"{name}.bn.{kind}": (1, False) for kind in ("weight", "bias")}
    for name in ("fpn1.0", "fpn1.3", "fpn2.0", "decode_head.conv_seg", "auxiliary_head.conv_seg"):
        found |= {f"{name}.weight": (1, True), f"{name}.bias": (1, False)}
    return found | {"fpn1.1.weight": (1, False), "fpn1.1.bias": (1, False)}


def test_the_groups_are_the_originals():
    config = SegmenterConfig(
        img_size=32, embed_dim=8, depth=3, num_heads=2, num_classes=4, use_abs_pos_emb=True
    )
    model = BeitForSemanticSegmentation(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layer_decay_groups(model, 0.05, 0.65)
    pairs = [
        (names[id(parameter)], (group["lr_scale"], group["weight_decay"]))
        for group in groups
        for parameter in group["params"]
    ]
    assert len(pairs) == len(names)
    wanted = groups_by_hand(3, 0.65)
    assert dict(pairs).keys() == wanted.keys() == set(names.values())
    for name, (scale, decay) in pairs:
        share, decayed = wanted[name]
        assert (scale, decay) == (pytest.approx(share), 0.05 if decayed else 0.0), name


def by_hand(config, task):
    """Losses and shares of right pixels of a loop without the package's: AdamW, rate, losses."""
    model = copy.deepcopy(task.model).train()
    mean, std = (np.array(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    of_group = groups_by_hand(2, config.layer_decay)
    base, warmup = config.optim.lr, config.optim.warmup_steps
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "share": of_group[n][0], "weight_decay": 0.05 * of_group[n][1]}
            for n, p in model.named_parameters()
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    told = []
    micro_batches = take_batches(task, STEPS * config.run.accumulate)
    for step in range(STEPS):
        rate = base * (1 - step / STEPS)
        if step < warmup:
            rate *= 1e-6 + (1 - 1e-6) * step / warmup
        total = right = 0.0
        for batch in micro_batches[step * config.run.accumulate :][: config.run.accumulate]:
            pixels = (batch["images"].numpy() / 255 - mean) / std
            for image, (height, width) in zip(pixels, batch["extent"], strict=True):
                image[height:], image[:, width:] = 0, 0
            pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            labels = batch["labels"].long()
            maps = model._maps(model.encode(pixels))
            loss = 0.0
            for head, weight, inputs in (
                (model.auxiliary_head, 0.4, maps[2]),
                (model.decode_head, 1.0, maps),
            ):
                scores = F.interpolate(head(inputs), labels.shape[1:], mode="bilinear")
                chance = scores.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
                loss = loss - weight * (chance * (labels >= 0)).sum() / labels.numel()
            right += ((scores.argmax(1) == labels).sum() / (labels >= 0).sum()).item()
            total += loss.item()
            (loss / config.run.accumulate).backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        optimizer.step()
        optimizer.zero_grad()
        told.append((total / config.run.accumulate, right / config.run.accumulate, rate))
    return told, model


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trajectory_is_that_of_a_loop_by_hand(segment_config, accumulate, monkeypatch):
    """In double precision and of five images: of two, the batch norm of what UPerNet pools to one
    value makes 1 and -1, whatever they are, and rounding grows tenfold in two steps."""
    run = {"steps": STEPS, "log_every": 1, "evaluate_every": None, "accumulate": accumulate}
    model = {"drop_path_rate": 0.0, "drop_rate": 0.0, "use_abs_pos_emb": True}
    config = segment_config(run=run, model=model, init=None, data={"batch_size": 5})
    config = replace(config, model=replace(config.model, embed_dim=32, depth=2, num_heads=2))
    task = SegmentTask(config, ALONE)
    prepare = task.prepare
    task.model.double()
    monkeypatch.setattr(
        task,
        "prepare",
        lambda batch: (made := prepare(batch)) | {"pixels": made["pixels"].double()},
    )
    told, wanted = by_hand(config, task)
    train(task, config.optim, config.run, settings=settings_of(task), world=ALONE)
    records = records_of(Path(config.run.output))
    assert len(records) == STEPS
    for record, (loss, accuracy, rate) in zip(records, told, strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-6)
        assert record["accuracy"] == pytest.approx(accuracy, abs=1e-6)
        assert record["lr"] == pytest.approx(rate, rel=1e-12)
    assert told[-1][0] < 0.9 * told[0][0]
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(task.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_a_frozen_encoder_is_in_eval_mode_and_stays_as_it_was(segment_config):
    run = {"steps": 3, "evaluate_every": 0.3}  # evaluation puts all of the model in training mode
    config = segment_config(freeze_encoder=True, run=run)
    task = SegmentTask(config, ALONE)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    groups = task.param_groups(0.05)
    assert {group["lr_scale"] for group in groups} == {1.0}
    train(task, config.optim, config.run, settings=settings_of(task), world=ALONE)
    heads = ("fpn", "decode_head", "auxiliary_head")
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(heads), name
    task.begin_step(3)
    assert not any(module.training for module in task.model.blocks.modules())
    assert task.model.decode_head.training
    batch = task.prepare(first_batch(task))
    task.loss(batch)[0].backward()
    assert all(p.grad is None for n, p in task.model.named_parameters() if not n.startswith(heads))


def test_blocks_that_no_head_reads_are_not_trained(segment_config):
    config = segment_config(model={"head": "linear", "head_channels": None, "taps": (0,)})
    task = SegmentTask(config, ALONE)
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    assert any(name.startswith("blocks.0.") for name in trained)
    assert not any(name.startswith("blocks.1.") for name in trained)
    task.model.train()
    task.loss(task.prepare(first_batch(task)))[0].backward()  # else ranks would wait for ever
    assert all(p.grad is not None for p in task.model.parameters() if p.requires_grad)


def test_a_batch_of_one_image_is_refused_for_upernet_in_one_process_alone(segment_config):
    config = segment_config(data={"batch_size": 1})
    with pytest.raises(ValueError, match=r"--data\.batch_size 2, more ranks, or --model\.head lin"):
        SegmentTask(config, ALONE)
    SegmentTask(config, World(0, 2, torch.device("cpu")))
    linear = SegmentTask(
        segment_config(data={"batch_size": 1}, model={"head": "linear", "head_channels": None}),
        ALONE,
    )
    linear.model.train()
    assert linear.loss(linear.prepare(first_batch(linear)))[0].isfinite()
    two = SegmentTask(segment_config(data={"batch_size": 2}), ALONE)
    two.model.train()
    assert two.loss(two.prepare(first_batch(two)))[0].isfinite()


def test_a_training_step_never_waits_for_the_device(segment_config):
    task = SegmentTask(segment_config(), ALONE)
    task.model.train()
    batch = first_batch(task)
    with RefuseSyncs():
        loss, _ = task.loss(task.prepare(batch))
        loss.backward()


def test_another_batch_size_is_compiled_for_itself(segment_config, compiled_sides):
    linear = {"head": "linear", "head_channels": None}
    task = SegmentTask(segment_config(data={"batch_size": 3}, model=linear), ALONE)
    task.compile("default")
    batch = first_batch(task)
    for size in (3, 2):
        task.begin_step(0)
        part = {name: value[:size] for name, value in batch.items() if name != "keep"}
        task.loss(task.prepare(part | {"keep": batch["keep"][:, :size]}))
    assert len(compiled_sides) == 2
    assert all(type(side) is int for sides in compiled_sides for side in sides)


def test_under_several_ranks_the_encoder_is_compiled_and_what_exchanges_is_not(
    segment_config, compiled_sides
):
    task = SegmentTask(segment_config(), World(0, 2, torch.device("cpu")))
    task.model.eval()  # alone: in training its batch norms would wait for the other rank
    batch = task.prepare(first_batch(task))
    plain = task.loss(batch)[0]
    task.compile("default")
    assert torch.equal(task.loss(batch)[0], plain)
    assert len(compiled_sides) == 1


def test_evaluation_and_picture_change_nothing_of_the_run(segment_config, tmp_path):
    task = SegmentTask(segment_config(), ALONE)
    task.model.train()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    state = torch.get_rng_state()
    task.evaluate(task.model)
    task.picture(task.model, tmp_path / "picture.png")
    assert torch.equal(torch.get_rng_state(), state)
    assert task.model.training
    assert all(torch.equal(v, before[n]) for n, v in task.model.state_dict().items())
