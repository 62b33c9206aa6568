"""Messages name flags as they are typed, below the section of the task that another runs first."""

import pytest

from beit_fast.flags import flag, flags_of, section_of


def test_a_flag_is_that_of_the_running_task():
    assert flag("run.seed") == "--run.seed"
    with flags_of("tokenizer_training", ("run.output",)):
        assert flag("run.seed") == "--tokenizer_training.run.seed"
        assert flag("run.output") == "--run.output"  # the outer task's
        with flags_of("inner"):
            assert flag("run.seed") == "--tokenizer_training.inner.run.seed"
    assert flag("run.seed") == "--run.seed"


def test_an_argument_without_a_flag_is_called_by_its_place():
    assert flag("SHARDS") == "SHARDS"
    with flags_of("outer"):
        assert flag("SHARDS") == "SHARDS"


def test_an_error_knows_the_section_it_comes_from():
    with pytest.raises(MemoryError) as raised, flags_of("outer"), flags_of("inner"):
        raise MemoryError
    assert section_of(raised.value) == "outer.inner."
    assert section_of(MemoryError()) == ""
