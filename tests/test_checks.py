"""Every field of every configuration has a range, and refuses what lies outside it."""

import copy
import dataclasses
import math
from typing import Annotated, Literal, get_args, get_origin

import numpy as np
import pytest

from beit_fast import cli
from beit_fast.checks import (
    LARGE,
    Count,
    FieldError,
    Filled,
    Given,
    Positive,
    Range,
    Rising,
    Seed,
    ShareRange,
    Text,
    allowed,
    check_fields,
    fits,
    hints,
    leaves,
)
from beit_fast.parsing import make, paths, section_type
from beit_fast.tasks.evaluate.config import EvaluateConfig, PredictConfig
from beit_fast.train.config import OptimConfig
from beit_fast.train.optim import lr_at

OTHERS = {
    "evaluate": EvaluateConfig(checkpoint="run", folder="images"),
    "predict": PredictConfig(checkpoint="run", images=("a.png",)),
}
RECIPES = {
    f"{verb} {name}": recipe()
    for verb, (recipes, _) in cli.VERBS.items()
    for name, recipe in recipes.items()
} | OTHERS


def sections(config):
    """A configuration and all below it."""
    yield config
    for name in hints(type(config)):
        if dataclasses.is_dataclass(value := getattr(config, name)):
            yield from sections(value)


CONFIGS = {type(section): section for config in RECIPES.values() for section in sections(config)}
FIELDS = [(config_type, name) for config_type in CONFIGS for name in hints(config_type)]


def flat(mapping, section=""):
    for name, value in mapping.items():
        if isinstance(value, dict):
            yield from flat(value, f"{section}{name}.")
        else:
            yield section + name, value


def options(hint):
    """The ways a value of a type may look: of `int | tuple[int, int] | None` three."""
    return get_args(hint) if get_origin(hint) not in (Annotated, tuple, Literal, None) else (hint,)


def outside(hint):
    """Values just outside a type and far from it."""
    values = [object(), [object()]]
    for option in options(hint):
        inner = get_args(option)[0] if get_origin(option) is Annotated else option
        if get_origin(inner) is tuple:
            members = [member for member in get_args(inner) if member is not Ellipsis]
            inside = [next(iter(edges(member))) for member in members]
            values += [(*inside[:-1], value) for value in outside(members[-1])]
            values += [(*inside, *inside, *inside)] if Ellipsis not in get_args(inner) else []
            if any(isinstance(check, Rising) for check in get_args(option)[1:]):
                values.append(tuple(sorted(list(edges(members[0]))[-2:], reverse=True)))
        elif get_origin(option) is Annotated and isinstance(check := get_args(option)[1], Range):
            values += [math.nan, math.inf, -math.inf, True, "x", check.low - 1, -(10**400)]
            values += [check.low] if check.open in ("low", "both") else []
            values += [check.high] if check.open in ("high", "both") else []
            values += [check.high + 1] if check.high < math.inf else []
            values += [check.low + 0.5] if inner is int else []
        elif get_origin(option) is Annotated:
            values += [3, "a\0b"] + ([] if get_args(option)[1].empty else ["", "  "])
        elif inner is bool:
            values += [2, "yes"]
        elif get_origin(inner) is Literal:
            values += ["another", 7]
    values += [] if type(None) in options(hint) else [None]
    # What one way refuses another may take: true of `bool | Literal["selective"]`.
    return [value for value in values if not fits(value, hint)]


def edges(hint):
    """The outermost values inside a type."""
    for option in options(hint):
        inner = get_args(option)[0] if get_origin(option) is Annotated else option
        if get_origin(inner) is tuple:
            members = [member for member in get_args(inner) if member is not Ellipsis]
            yield from zip(*(sorted(edges(member)) for member in members), strict=False)
        elif get_origin(option) is Annotated and isinstance(check := get_args(option)[1], Range):
            whole = inner is int
            low, high = check.low, check.high if check.high < math.inf else 1e300
            step = 1 if whole else 1e-9
            yield low + step if check.open in ("low", "both") else (low if whole else float(low))
            yield high - step if check.open in ("high", "both") else high
        elif get_origin(option) is Annotated:
            yield from ["a b", *([""] if get_args(option)[1].empty else [])]
        elif get_origin(inner) is Literal:
            yield from get_args(inner)
        elif inner is bool:
            yield from (False, True)
        elif inner is type(None):
            yield None


def with_value(config, name, value):
    changed = copy.copy(config)
    object.__setattr__(changed, name, value)
    return changed


@pytest.mark.parametrize(("config_type", "name"), FIELDS, ids=lambda v: getattr(v, "__name__", v))
def test_a_field_of_numbers_or_text_has_a_range(config_type, name):
    hint = hints(config_type)[name]
    if section_type(hint) is None:
        for leaf in leaves(hint):
            if get_origin(leaf) is Annotated:
                assert isinstance(get_args(leaf)[1], Range | Text)
            else:
                assert leaf in (bool, type(None)) or get_origin(leaf) is Literal, (name, leaf)


@pytest.mark.parametrize(("config_type", "name"), FIELDS, ids=lambda v: getattr(v, "__name__", v))
def test_a_field_refuses_what_lies_outside_its_range_and_takes_its_edges(config_type, name):
    config, hint = CONFIGS[config_type], hints(config_type)[name]
    check_fields(config)
    wrong = list(outside(hint))
    assert len(wrong) >= 2
    for value in wrong:
        with pytest.raises(FieldError) as refused:
            dataclasses.replace(config, **{name: value})
        assert refused.value.field == name
        assert str(refused.value).startswith(f"{name} is {repr(value)[:60]}")
        assert ": give " in str(refused.value)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 250
    if section_type(hint) is None:
        right = list(edges(hint))
        assert right
        for value in right:
            check_fields(with_value(config, name, value))


@pytest.mark.parametrize("command", RECIPES)
def test_the_flag_is_named_as_it_is_typed(command):
    """Of every field of every recipe, those of a task inside a task too."""
    config = RECIPES[command]
    values = dataclasses.asdict(config)
    given = {path for path, _ in flat(values)}
    for path in paths(type(config)):
        if path not in given:  # of a section that is null here
            continue
        changed = copy.deepcopy(values)
        *parents, name = path.split(".")
        section = changed
        for parent in parents:
            section = section[parent]
        section[name] = object()
        with pytest.raises(ValueError, match=r"is <object object") as refused:
            make(type(config), changed)
        assert str(refused.value).startswith(f"--{path} is ")
    assert make(type(config), values) == config


def test_numbers_of_other_libraries_are_numbers():
    assert fits(np.int64(3), Count)
    assert fits(np.float32(0.5), Positive)
    assert fits(3, Positive)
    assert not fits(np.float64("nan"), Positive)
    assert not fits(3.0, Count)


@pytest.mark.parametrize(
    ("hint", "value", "words"),
    [
        (Count, 0, "a whole number, at least 1"),
        (Count, LARGE + 1, f"a whole number, at most {LARGE}"),
        (Seed, 2**63, f"a whole number, at least 0 and at most {2**63 - 1}"),
        (Positive | None, -1.0, "a finite number, above 0, or null"),
        (Literal["a", "b", ""], "c", "a, b or ''"),
        (bool | Literal["c"], "d", "true or false, or c"),
        (Filled | None, " ", "text without NUL that is not empty, or null"),
        (Given, "a\0", "text without NUL"),
        (ShareRange, (1, 0.5), "[a, b], each a finite number, above 0 and at most 1, low <= high"),
        (tuple[Count, ...], (0,), "a list [a, b, ...], each a whole number, at least 1"),
    ],
)
def test_what_is_allowed_is_said_in_words(hint, value, words):
    assert not fits(value, hint)
    assert allowed(hint, value) == words


def test_a_rate_may_fall_to_zero():
    optim = OptimConfig(lr=1.0, min_lr=0.0)
    assert [lr_at(step, optim, 10, 0) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"min_lr is 2.0 and lr is 1.0: give min_lr <= lr"):
        OptimConfig(lr=1.0, min_lr=2.0)
