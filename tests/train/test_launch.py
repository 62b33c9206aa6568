"""The launcher's variables: what is read of them, and what is refused in one line."""

import pytest

from beit_fast.train.launch import Launch, launched_rank, read_launch

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = dict(zip(NAMES, ("4", "2", "1", "node0", "29500"), strict=True))


@pytest.fixture
def variables(monkeypatch):
    def variables(**given: str) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return variables


def test_all_of_them_are_a_rank_and_none_of_them_is_one_process(variables):
    variables(**WHOLE)
    assert read_launch() == Launch(rank=2, size=4, local_rank=1, address="node0:29500")
    assert launched_rank().says_who == "rank 2 of 4: "
    for alone in ({}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}):
        variables(**alone)
        assert read_launch() == Launch()
        assert launched_rank().says_who == ""


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is 4 and MASTER_ADDR not set: start it with torchrun"),
        ({"RANK": "", "MASTER_PORT": ""}, "WORLD_SIZE is 4 and RANK, MASTER_PORT not set"),
        ({"RANK": "4"}, "RANK is 4 and WORLD_SIZE is 4: ranks count from 0"),
        ({"WORLD_SIZE": ""}, "RANK is 2 and WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "1"}, "RANK is 2 and WORLD_SIZE is 1: ranks count from 0"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0: start it with torchrun"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', which is no number from 0 on"),
        ({"RANK": "-1"}, "RANK is '-1', which is no number from 0 on"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', which is no number from 0 on"),
    ],
)
def test_some_of_them_or_ones_that_contradict_are_refused(changed, said, variables):
    variables(**WHOLE | changed)
    with pytest.raises(ValueError, match="unset WORLD_SIZE, RANK and LOCAL_RANK to run one") as no:
        read_launch()
    assert str(no.value).startswith(said)
    assert "\n" not in str(no.value)
    assert launched_rank() == Launch()  # who says so
