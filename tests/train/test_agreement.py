"""What ranks must have alike: which fields, and how a difference is told."""

import pytest

from beit_fast.recipes import FINETUNE, PRETOKENIZE, PRETRAIN, SEGMENT
from beit_fast.train.agreement import BY_NODE, code_digest, compare, flat, settings_of_all

pytestmark = pytest.mark.promise("R20")


def told(*all_fields) -> str:
    with pytest.raises(ValueError, match="do not start alike") as error:
        compare(all_fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_ranks_that_are_alike_are_let_through():
    compare([{"run.steps": 3, "optim.betas": [0.9, 0.98]}] * 3)


def test_a_difference_names_the_field_and_who_has_which_value():
    fields = {"run.log_every": 50, "run.steps": 3}
    said = told(*[fields] * 5, fields | {"run.log_every": 10}, fields | {"run.log_every": 5})
    assert "run.log_every is 50 on ranks 0-4, 10 on rank 5, 5 on rank 6. Give every node" in said
    assert "run.steps" not in said


def test_a_field_that_some_have_not_and_types_count():
    assert "code is 'a' on rank 0, 'nothing' on rank 1" in told({"code": "a"}, {})
    assert "strict is True on rank 0, 1 on rank 1" in told({"strict": True}, {"strict": 1})


def test_many_differences_are_counted_and_long_lists_are_told_by_one_entry():
    said = told({str(i): 0 for i in range(9)}, {str(i): 1 for i in range(9)})
    assert "4 is 0 on rank 0, 1 on rank 1; and 4 more. Give" in said
    classes = [f"n{i}" for i in range(1000)]
    said = told({"classes": classes}, {"classes": [*classes[:-1], "other"]})
    assert "a list of 1000 with 'other' at 999 on rank 1" in said
    assert len(said) < 300


def test_habits_are_compared_and_places_of_files_are_not():
    config = PRETRAIN["digits"]()
    fields = settings_of_all(config)
    assert {"run.log_every", "run.save_every", "run.seed", "model.depth"} <= fields.keys()
    assert "tokenizer_training.run.steps" in fields
    assert not {"run.output", "data.path", "tokenizer_training.data.path"} & fields.keys()


def test_every_place_that_is_left_out_is_a_setting():
    recipes = (FINETUNE, PRETRAIN, PRETOKENIZE, SEGMENT)
    known = {name for group in recipes for recipe in group.values() for name in flat(recipe())}
    assert not BY_NODE - known


def test_the_code_is_all_source_files(tmp_path, monkeypatch):
    assert len(code_digest()) == 16
    before = code_digest()
    (tmp_path / "more.py").write_text("")
    monkeypatch.setattr("beit_fast.__path__", [*__import__("beit_fast").__path__, str(tmp_path)])
    assert code_digest() != before
