"""Pre-training on views of kind gpu: where the device is a CPU it is the run of kind reference."""

import pytest

from beit_fast.tasks.pretrain.pipeline import run_pretraining
from beit_fast.tasks.pretrain.task import PretrainTask
from task_runs import (
    assert_the_same_run,
    stopped_in_step,
)


@pytest.fixture
def spoiled_folder(image_folder, tmp_path):
    """The twelve images, of which one is broken in its pixels alone, one a PNG, one progressive."""
    import shutil

    from PIL import Image

    folder = shutil.copytree(image_folder, tmp_path / "spoiled")
    broken, png, progressive, *_ = sorted(folder.rglob("*.jpg"))
    data = broken.read_bytes()
    tables = data.index(b"\xff\xdb")
    end = tables + 2 + int.from_bytes(data[tables + 2 : tables + 4])
    broken.write_bytes(data[:tables] + data[end:])
    image = Image.open(png).copy()
    image.save(png, "PNG")
    image.save(progressive, "JPEG", progressive=True)
    return folder


def test_a_run_is_bitwise_that_of_the_reference_stopped_or_not(
    pretrain_config, spoiled_folder, tmp_path, capsys
):
    def run(kind, output):
        return run_pretraining(
            pretrain_config(
                views={"kind": kind},
                data={"path": str(spoiled_folder), "max_bad_share": 0.1},
                run={"steps": 8, "log_every": 1, "output": str(tmp_path / output)},
            )
        )

    run("reference", "reference")
    capsys.readouterr()
    run("gpu", "gpu")
    said = " ".join(capsys.readouterr().out.split())
    assert "1 images could not be used and were replaced" in said
    assert "images were left to the CPU's decoder:" in said
    with stopped_in_step(PretrainTask, 3):
        run("gpu", "stopped")
    run("gpu", "stopped")
    assert_the_same_run(tmp_path / "gpu", tmp_path / "reference")
    assert_the_same_run(tmp_path / "stopped", tmp_path / "reference")
