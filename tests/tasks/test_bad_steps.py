"""Every task skips a bad step and keeps what it was before, buffers too."""

import pytest
import torch

from beit_fast.cli import main
from beit_fast.tasks.finetune.task import FinetuneTask
from beit_fast.tasks.pretrain.dvae import DvaeTask
from beit_fast.tasks.pretrain.task import PretrainTask
from beit_fast.tasks.segment.training import SegmentTask
from beit_fast.train.bad_steps import read_record, record_path
from faults import Injector, fired
from masked_images import write_pairs
from task_runs import records_of
from tiny_commands import tiny_command

TASKS = {
    "pretrain": PretrainTask,
    "tokenizer": DvaeTask,
    "finetune": FinetuneTask,
    "segment": SegmentTask,
}
PRECISIONS = {"pretrain": "fp8", "tokenizer": "bf16", "finetune": "bf16", "segment": "bf16"}


@pytest.mark.promise("R12")
@pytest.mark.parametrize(("verb", "precision"), PRECISIONS.items())
def test_a_task_skips_a_bad_step(
    verb, precision, image_folder, tokenizer_file, tmp_path, monkeypatch
):
    """Its pixels are NaN, or of a tokenizer, whose are whole numbers, its loss."""
    task_class, output = TASKS[verb], tmp_path / "run"
    injector = Injector(tmp_path, ["0:6:nan" if verb == "tokenizer" else "0:6:nan_pixels"])
    loss, begin = task_class.loss, task_class.begin_step
    number, states = iter(range(1, 99)), []

    def spoiled(self, batch):
        now = next(number)
        for name in {"pixels", "patches"} & batch.keys():
            batch = batch | {name: injector.meet("pixels", now, batch[name])}
        value, metrics = loss(self, batch)
        return injector.meet("loss", now, value), metrics

    def begun(self, step):
        states.append({k: v.clone() for k, v in self.model.state_dict().items()})
        begin(self, step)

    monkeypatch.setattr(task_class, "loss", spoiled)
    monkeypatch.setattr(task_class, "begin_step", begun)
    files = {"images": image_folder, "tokenizer": tokenizer_file}
    pairs = write_pairs(tmp_path / "pairs", 8)
    assert main(tiny_command(verb, output, pairs=pairs, precision=precision, **files)) == 0
    assert sum(fired(tmp_path).values()) == 1
    before, after = states[2:]  # of the third step, whose second micro-batch it was
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert any(not torch.equal(states[1][name], before[name]) for name in before)
    record = read_record(record_path(output, 3))
    assert [batch["loss"] == "nan" for batch in record["ranks"][0]["micro_batches"]] == [
        False,
        True,
    ]
    files = [name for batch in record["ranks"][0]["micro_batches"] for name in batch["files"]]
    assert len(files) == 8
    assert all(str(tmp_path if verb == "segment" else image_folder) in name for name in files)
    assert [line.get("skipped") for line in records_of(output)] == [None, None, 1.0, None]
