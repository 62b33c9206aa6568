"""beit-fast evaluate-segmentation: the table, the file, classes that do not fit, two ranks."""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.cli import main
from beit_fast.data.sources import ade20k
from beit_fast.data.sources.segmentation import open_segmentation
from beit_fast.data.views.statistics import STATISTICS
from beit_fast.tasks.segment.config_evaluation import SlideConfig
from beit_fast.tasks.segment.evaluate import match_names
from beit_fast.tasks.segment.evaluation import evaluate_segmenter
from task_runs import ALONE, TWO_RANKS
from tiny_segmenter import save_run, tiny_segmenter

CLASSES = ("ground", "red", "blue")
ALONE_FLAGS = ["--device", "cpu", "--num_threads", "1", "--precision", "fp32"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return save_run(folder, tiny_segmenter(), statistics="half", classes=CLASSES)


@pytest.fixture
def evaluate(run_folder, boxes, tmp_path):
    """`evaluate(*flags, checkpoint=, folder=)` is (exit code, what the file holds or None)."""

    def run(*flags, checkpoint=run_folder, folder=boxes / "test", masks=True):
        output = tmp_path / "found.json"
        output.unlink(missing_ok=True)
        arguments = [checkpoint, folder, "--output", output, *ALONE_FLAGS, *flags]
        if masks:
            arguments += ["--data.masks", boxes / "test_masks", "--data.ignore", 9]
        code = main(["evaluate-segmentation", *map(str, arguments)])
        return code, json.loads(output.read_text()) if output.exists() else None

    return run


def test_the_file_and_the_table_have_what_is_counted(evaluate, boxes, tmp_path, capsys):
    code, found = evaluate()
    assert code == 0
    source = open_segmentation(boxes / "test", masks=boxes / "test_masks", ignore=9, num_classes=3)
    wanted = evaluate_segmenter(
        tiny_segmenter(),
        source,
        slide=SlideConfig(),
        statistics=STATISTICS["half"],
        precision="fp32",
        num_threads=1,
        world=ALONE,
    )
    assert (found["num_images"], found["miou"]) == (3, wanted.miou)
    assert (found["macc"], found["aacc"]) == (wanted.macc, wanted.aacc)
    assert [row["name"] for row in found["classes"]] == list(CLASSES)
    assert [row["iou"] for row in found["classes"]] == wanted.iou.tolist()
    assert [row["pixels"] for row in found["classes"]] == wanted.confusion.sum(1).tolist()
    assert [row["called"] for row in found["classes"]] == wanted.confusion.sum(0).tolist()
    assert found["checkpoint"].endswith("step_00000004")
    assert (found["window"], found["stride"], found["scale"]) == ([32, 40], [21, 26], [128, 32])
    said = capsys.readouterr().out
    assert f"images: {boxes / 'test'}: 3 images, 3 classes\n" in said
    assert "classes: by number, names are of the checkpoint\n" in said
    assert "All classes, worst first" in said
    order = sorted(CLASSES, key=lambda name: wanted.iou[CLASSES.index(name)])
    assert sorted(CLASSES, key=said.index) == order
    for line in (
        f"mIoU  {wanted.miou:.2%}  of 3 classes that occur",
        f"mAcc  {wanted.macc:.2%}",
        f"aAcc  {wanted.aacc:.2%}  of the pixels of 3 images",
        f"all of it in {tmp_path / 'found.json'}",
    ):
        assert line in said


def test_images_that_exif_turns_are_named(evaluate, boxes, tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 3
    for number in range(3):
        image = Image.open(boxes / "test" / f"{number}.png")
        image.save(tmp_path / f"{number}.jpg", exif=exif if number == 1 else Image.Exif())
    code, _ = evaluate(folder=tmp_path)
    assert code == 0
    said = f"1 of 3 images have an EXIF orientation, which is not applied ({tmp_path / '1.jpg'}): "
    assert [r.getMessage().startswith(said) for r in caplog.records] == [True]


def test_flags_choose_window_scales_mirrors_and_order(evaluate, capsys):
    _, single = evaluate("--order", "id")
    said = capsys.readouterr().out
    assert sorted(CLASSES, key=said.index) == list(CLASSES)
    flags = ["--stride", "[16,8]", "--scale", "[96,48]", "--multi_scale", "[0.75,1.25]"]
    code, several = evaluate(*flags, "--flip", "true", "--statistics", "imagenet")
    assert code == 0
    assert (several["stride"], several["scale"]) == ([16, 8], [96, 48])
    assert (several["multi_scale"], several["flip"]) == ([0.75, 1.25], True)
    assert several["miou"] != single["miou"]


def test_classes_that_are_nowhere_are_left_out_of_the_means(boxes, evaluate, tmp_path, capsys):
    model = tiny_segmenter(num_classes=4)
    torch.nn.init.constant_(model.decode_head.conv_seg.bias[3:], -1e6)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "four.pth")
    flags = ["--num_heads", "2", "--img_size", "[32,40]"]
    code, found = evaluate(*flags, checkpoint=tmp_path / "four.pth")
    assert code == 0
    assert found["classes"][3]["iou"] is found["classes"][3]["acc"] is None
    assert found["miou"] == pytest.approx(sum(row["iou"] for row in found["classes"][:3]) / 3)
    said = capsys.readouterr().out
    assert "of 3 classes that occur" in said
    assert "classes: by number, nothing names them" in said
    last = [line for line in said.splitlines() if "class 3" in line]
    assert last[0].count(" - ") == 2


def write_ade(root, ids):
    for part in ("images", "annotations"):
        (root / part / "validation").mkdir(parents=True)
    pixels = np.zeros((*ids.shape, 3), np.uint8)
    Image.fromarray(pixels).save(root / "images" / "validation" / "1.png")
    Image.fromarray(ids).save(root / "annotations" / "validation" / "1.png")
    return root


def test_ade20ks_layout_ignores_0_and_names_its_classes(evaluate, tmp_path):
    ids = np.arange(40 * 50, dtype=np.int64).reshape(40, 50) % 151
    root = write_ade(tmp_path / "ade", ids.astype(np.uint8))
    state = tiny_segmenter(num_classes=150, img_size=32).state_dict()
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    code, found = evaluate(checkpoint=tmp_path / "w.pth", folder=root, masks=False)
    assert code == 0
    assert [row["name"] for row in found["classes"]] == list(ade20k.CLASSES)
    assert sum(row["pixels"] for row in found["classes"]) == (ids > 0).sum()
    # The same layout with classes of one's own, as many as the checkpoint has.
    root = write_ade(tmp_path / "own", (ids % 4).astype(np.uint8))
    code, found = evaluate(folder=root, masks=False)
    assert code == 0
    assert [row["name"] for row in found["classes"]] == list(CLASSES)
    assert sum(row["pixels"] for row in found["classes"]) == (ids % 4 > 0).sum()


def test_classes_of_another_number_are_told_with_what_to_do(evaluate, tmp_path, capsys):
    (tmp_path / "five.txt").write_text("a\nb\nc\nd\ne\n")
    code, _ = evaluate("--data.classes_file", tmp_path / "five.txt")
    assert code == 1
    said = capsys.readouterr().err
    assert "tells 3 classes apart, the masks have 5: evaluate it on the classes" in said
    assert "beit-fast segment RECIPE --init" in said


def test_names_in_another_order_are_refused_and_a_file_with_ids_helps(evaluate, tmp_path, capsys):
    _, wanted = evaluate()
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["red", "ground", "blue"]))
    code, _ = evaluate("--data.classes_file", names)
    assert code == 1
    said = capsys.readouterr().err
    assert (
        "0 is 'red' in the masks and 'ground' in the checkpoint: pass --data.classes_file" in said
    )
    # What it says: the checkpoint's order is that of the ids, which here is right.
    entries = [{"name": name, "id": i} for i, name in enumerate(CLASSES)]
    names.write_text(json.dumps(entries[::-1]))
    code, found = evaluate("--data.classes_file", names)
    assert (code, found["miou"]) == (0, wanted["miou"])
    assert found["classes_are"] == "the same in the masks and in the checkpoint"


def test_names_are_matched_by_number():
    assert match_names(None, None) == (None, "by number, nothing names them")
    assert match_names(("a", "b"), None) == (("a", "b"), "by number, names are of the masks")
    names, how = match_names(("a", "b"), ("a", "c"))
    assert names == ("a", "b")
    assert "though names differ: 1 is 'b' in the masks and 'c' in the checkpoint" in how
    more = match_names(("a", "b", "c"), ("a", "b"))
    assert more == (("a", "b", "c"), "3 in the masks and 2 in the checkpoint")


def test_a_broken_mask_is_named_and_nothing_is_written(evaluate, boxes, tmp_path, capsys):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in (boxes / "test_masks").iterdir():
        (masks / path.name).write_bytes(path.read_bytes())
    (masks / "1.png").write_bytes((masks / "1.png").read_bytes()[:50])
    code, found = evaluate("--data.masks", masks, "--data.ignore", 9, masks=False)
    assert (code, found) == (1, None)
    said = capsys.readouterr().err
    assert f"cannot use {boxes / 'test' / '1.png'} (" in said
    assert "every image counts" in said


def test_an_id_that_is_not_ignored_is_told_with_its_flag(evaluate, boxes, capsys):
    code, _ = evaluate("--data.masks", boxes / "test_masks", masks=False)
    assert code == 1
    said = capsys.readouterr().err
    assert "the mask has the id 9 and the classes have 0 to 2: pass --data.ignore" in said


def test_a_stride_beyond_the_window_is_told(evaluate, capsys):
    assert evaluate("--stride", 33)[0] == 1
    assert "stride is 33 and the window 32x40" in capsys.readouterr().err


def test_two_ranks_write_what_one_writes(evaluate, boxes, run_folder, tmp_path):
    _, alone = evaluate()
    output = tmp_path / "two.json"
    arguments = [run_folder, boxes / "test", "--output", output, *ALONE_FLAGS]
    arguments += ["--data.masks", boxes / "test_masks", "--data.ignore", 9]
    program = "import sys; from beit_fast.cli import main; sys.exit(main())"
    (tmp_path / "run.py").write_text(program)
    done = subprocess.run(
        [*TWO_RANKS, tmp_path / "run.py", "evaluate-segmentation", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mIoU") == 1
    found = json.loads(output.read_text())
    assert found["num_ranks"] == 2
    for name in ("miou", "macc", "aacc", "num_images", "classes"):
        assert found[name] == alone[name]
