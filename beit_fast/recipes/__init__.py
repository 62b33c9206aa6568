"""Named runs: functions that return a whole configuration, here by the verb that runs them.

A variation is `dataclasses.replace`, or a flag on the command line.
"""

from collections.abc import Callable

from beit_fast.recipes import finetune as _finetune
from beit_fast.recipes import segment as _segment
from beit_fast.recipes.digit_scenes import digit_scenes, segment_digits, tokenizer_digit_scenes
from beit_fast.recipes.digits import digits, finetune_digits, probe_digits, tokenizer_digits
from beit_fast.recipes.pretrain import (
    beit_base_in1k,
    beit_large_in1k,
    beit_plus_base_in1k,
    beit_plus_base_in22k,
    beit_plus_large_in22k,
    demo,
    small,
    tokens_of,
)
from beit_fast.recipes.probe import probe_imagenet, probe_small
from beit_fast.recipes.tokenizer import dalle_tokenizer, demo_tokenizer, small_tokenizer
from beit_fast.tasks.finetune.config import FinetuneConfig
from beit_fast.tasks.pretrain.config import DvaeTrainingConfig, PretrainConfig
from beit_fast.tasks.probe.config import ProbeConfig
from beit_fast.tasks.segment.config import SegmentConfig

PRETRAIN: dict[str, Callable[[], PretrainConfig]] = {
    "demo": demo,
    "digits": digits,
    "digit_scenes": digit_scenes,
    "small": small,
    "beit_base_in1k": beit_base_in1k,
    "beit_plus_base_in1k": beit_plus_base_in1k,
    "beit_plus_base_in22k": beit_plus_base_in22k,
    "beit_large_in1k": beit_large_in1k,
    "beit_plus_large_in22k": beit_plus_large_in22k,
}
PRETOKENIZE = {name: tokens_of(recipe) for name, recipe in PRETRAIN.items()}
FINETUNE: dict[str, Callable[[], FinetuneConfig]] = {
    "digits": finetune_digits,
    "small_data": _finetune.small_data,
    "beit_plus_base_in1k": _finetune.beit_plus_base_in1k,
    "beit_plus_large_in1k": _finetune.beit_plus_large_in1k,
    "beit_plus_base_in22k": _finetune.beit_plus_base_in22k,
    "beit_plus_large_in22k": _finetune.beit_plus_large_in22k,
    "beit_plus_base_in22k_in1k": _finetune.beit_plus_base_in22k_in1k,
    "beit_plus_large_in22k_in1k": _finetune.beit_plus_large_in22k_in1k,
    "beit_plus_base_in22k_in1k_384": _finetune.beit_plus_base_in22k_in1k_384,
    "beit_plus_large_in22k_in1k_384": _finetune.beit_plus_large_in22k_in1k_384,
    "beit_plus_large_in22k_in1k_512": _finetune.beit_plus_large_in22k_in1k_512,
    "beit_base_in1k": _finetune.beit_base_in1k,
    "beit_large_in1k": _finetune.beit_large_in1k,
    "beit_base_cifar100": _finetune.beit_base_cifar100,
}
SEGMENT: dict[str, Callable[[], SegmentConfig]] = {
    "digits": segment_digits,
    "small_data": _segment.small_data,
    "beit_plus_base_ade20k_512": _segment.beit_plus_base_ade20k_512,
    "beit_plus_base_in22k_ade20k_512": _segment.beit_plus_base_in22k_ade20k_512,
    "beit_plus_base_in22k_ade20k_640": _segment.beit_plus_base_in22k_ade20k_640,
    "beit_plus_large_in22k_ade20k_512": _segment.beit_plus_large_in22k_ade20k_512,
    "beit_plus_large_in22k_ade20k_640": _segment.beit_plus_large_in22k_ade20k_640,
    "beit_base_ade20k_512": _segment.beit_base_ade20k_512,
    "beit_v2_base_ade20k_512": _segment.beit_v2_base_ade20k_512,
    "beit_v2_base_in21k_ade20k_512": _segment.beit_v2_base_in21k_ade20k_512,
    "beit_v2_large_ade20k_512": _segment.beit_v2_large_ade20k_512,
    "beit_v2_large_in21k_ade20k_512": _segment.beit_v2_large_in21k_ade20k_512,
}
PROBE: dict[str, Callable[[], ProbeConfig]] = {
    "digits": probe_digits,
    "small": probe_small,
    "imagenet": probe_imagenet,
}
TOKENIZER: dict[str, Callable[[], DvaeTrainingConfig]] = {
    "demo": demo_tokenizer,
    "digits": tokenizer_digits,
    "digit_scenes": tokenizer_digit_scenes,
    "small": small_tokenizer,
    "dalle": dalle_tokenizer,
}
