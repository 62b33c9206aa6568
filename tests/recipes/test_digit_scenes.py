"""From scenes without labels to classes of pixels: the recipes fit together."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from beit_fast.data.sources.digit_scenes import CLASSES, SIDE
from beit_fast.recipes import PRETRAIN, SEGMENT, TOKENIZER
from beit_fast.recipes.digit_scenes import digit_scenes, segment_digits, tokenizer_digit_scenes
from beit_fast.tasks.pretrain.pipeline import run_pretraining
from beit_fast.tasks.segment.task import run_segmentation


def test_a_segmenter_starts_from_what_pretraining_leaves(tmp_path):
    pretrain, segment = digit_scenes(), segment_digits()
    tokenizer, short = pretrain.tokenizer_training, {"device": "cpu", "log_every": 1}
    pretrained = tmp_path / "pretrained"
    run_pretraining(
        replace(
            pretrain,
            data=replace(pretrain.data, path="digit-scenes:train:8", batch_size=4),
            optim=replace(pretrain.optim, warmup_steps=0),
            run=replace(pretrain.run, output=str(pretrained), steps=2, **short),
            tokenizer_training=replace(
                tokenizer,
                data=replace(tokenizer.data, path="digit-scenes:train:8"),
                optim=replace(tokenizer.optim, warmup_steps=0),
                run=replace(tokenizer.run, steps=2, **short),
            ),
        )
    )
    result = run_segmentation(
        replace(
            segment,
            init=str(pretrained),
            data=replace(
                segment.data,
                path="digit-scenes:train:4",
                test="digit-scenes:valid:3",
                batch_size=2,
            ),
            optim=replace(segment.optim, lr=1e-9, min_lr=0, warmup_steps=0),
            run=replace(segment.run, output=str(tmp_path / "segmented"), steps=1, **short),
        )
    )
    assert (result.classes, result.raw.num_images) == (CLASSES, 3)
    assert int(result.raw.confusion.sum()) == 3 * SIDE**2
    # At a rate of nothing the weights are those it started from.
    (before,), (after,) = (
        Path(folder).glob("checkpoints/*/model.safetensors")
        for folder in (pretrained, tmp_path / "segmented")
    )
    before, after = load_file(before), load_file(after)
    for name in ("patch_embed.proj.weight", "blocks.3.mlp.fc2.weight"):
        assert torch.allclose(after[name], before[name], atol=1e-6)
    table = before["rel_pos_bias.relative_position_bias_table"]
    for block in range(4):
        name = f"blocks.{block}.attn.relative_position_bias_table"
        assert torch.allclose(after[name][: len(table)], table, atol=1e-6)


def test_the_recipes_are_of_one_another():
    pretrain, segment = digit_scenes(), segment_digits()
    assert pretrain.tokenizer_training == tokenizer_digit_scenes()
    assert segment.init == pretrain.run.output
    assert segment.statistics == pretrain.statistics
    for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "init_values"):
        assert getattr(segment.model, name) == getattr(pretrain.model, name)
    assert pretrain.model.vocab_size == pretrain.tokenizer_training.dvae.vocab_size
    pretrain.views.check_grid(pretrain.model.grid)
    named = (PRETRAIN["digit_scenes"], TOKENIZER["digit_scenes"], SEGMENT["digits"])
    assert named == (digit_scenes, tokenizer_digit_scenes, segment_digits)


def test_nothing_is_learnt_from_scenes_that_are_counted():
    for config in (digit_scenes(), tokenizer_digit_scenes(), segment_digits()):
        assert config.data.path.startswith("digit-scenes:train")
    assert segment_digits().data.test == "digit-scenes:test"
