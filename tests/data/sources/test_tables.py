"""Images in Parquet and Arrow files: which bytes, which classes, how much at once, what is lost."""

import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from beit_fast.data.config import DataConfig
from beit_fast.data.loader import Loader
from beit_fast.data.sources.decode import BadImageError, decode_fast
from beit_fast.data.sources.opening import labelled_images, open_images
from beit_fast.data.sources.parquet_table import ParquetTable, RowGroups
from beit_fast.data.sources.tables import TableImages
from beit_fast.tasks.finetune.config import LabelledDataConfig
from beit_fast.tasks.finetune.task import open_labelled
from beit_fast.tasks.sources import describe_source
from loaded import SAMPLE
from shards import picture
from tables import CLASSES, image_type, row, schema_of, write_table
from task_runs import take_batches

KINDS = [".parquet", ".arrow", ".stream.arrow"]
ROWS = [row(number) for number in range(23)]
SIZES = [5, 5, 5, 5, 3]


@pytest.fixture
def parquet(tmp_path):
    return write_table(tmp_path / "data" / "train-00000-of-00001.parquet", ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_gives_its_images_and_their_classes(tmp_path, kind):
    write_table(tmp_path / f"b-1{kind}", ROWS[12:])
    write_table(tmp_path / f"b-0{kind}", ROWS[:12])
    (tmp_path / "dataset_info.json").write_text("{}")
    source, labels, classes = labelled_images(tmp_path)
    assert isinstance(source, TableImages)
    assert [source.read(number) for number in range(23)] == [*map(picture, range(23))]
    assert labels.tolist() == [number % 3 for number in range(23)]
    assert classes == CLASSES
    assert list(source.shard_sizes) == [5, 5, 2, 5, 5, 1]
    assert source.key(13) == f"b-1{kind}/1"
    assert source.name(22) == f"{tmp_path}/b-1{kind}/10"
    assert describe_source(source, classes) == f"{tmp_path}: 23 images, 3 classes"
    with pytest.raises(IndexError):
        source.read(23)
    again = open_images(f"{tmp_path}/b-*{kind}")
    assert again.digest() == source.digest() != open_images(f"{tmp_path}/b-0{kind}").digest()


@pytest.mark.parametrize("kind", KINDS)
def test_another_image_in_a_table_is_another_list(tmp_path, kind):
    path = tmp_path / f"t{kind}"
    source = TableImages(str(write_table(path, ROWS)))
    other = TableImages(str(write_table(path, [*ROWS[:-1], row(23)])))
    assert source.key(22) == other.key(22)
    assert source.size(22) != other.size(22)
    assert source.digest() != other.digest()


def test_a_window_reads_each_row_group_once_and_keeps_those_of_two(parquet, monkeypatch):
    read, kept = [], []

    def read_group(self, shard, num_bytes, real=ParquetTable._read_group):
        read.append(shard)
        return real(self, shard, num_bytes)

    def get(self, key, num_bytes, reading, real=RowGroups.get):
        found = real(self, key, num_bytes, reading)
        kept.append(len(self._kept))
        return found

    monkeypatch.setattr(ParquetTable, "_read_group", read_group)
    monkeypatch.setattr(RowGroups, "get", get)
    options = {"batch_size": 4, "num_threads": 2}
    take_batches(Loader(TableImages(str(parquet)), SAMPLE, window=2, **options), 5)
    assert sorted(read[:5]) == [0, 1, 2, 3, 4]
    assert max(kept) <= 4
    del read[:], kept[:]
    source = TableImages(str(parquet))
    assert [source.read(number) for number in range(23)] == [*map(picture, range(23))]
    assert read == [0, 1, 2, 3, 4]


def test_a_row_group_that_several_threads_want_is_read_once():
    groups, begun = RowGroups(), []

    def read():
        begun.append(threading.current_thread())
        time.sleep(0.05)
        return "images"

    found = []
    threads = [
        threading.Thread(target=lambda: found.append(groups.get(("a", 0), 1, read)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, len(begun)) == (["images"] * 4, 1)


def test_what_is_kept_of_row_groups_is_bounded():
    def kept(groups, num_bytes):
        for number in range(40):
            groups.get(("a", number), num_bytes, lambda number=number: number)
        return [number for _, number in groups._kept]

    assert kept(RowGroups(), 1) == [*range(24, 40)]
    assert kept(RowGroups(), 2**28) == [*range(36, 40)]
    assert kept(RowGroups(), 2**31) == [39]
    windowed = RowGroups()
    windowed.windowed(3)
    assert kept(windowed, 2**31) == [*range(34, 40)]


def test_a_read_that_fails_in_passing_is_tried_again_and_a_damaged_group_is_not():
    groups, tries = RowGroups(), []

    def fail(error):
        tries.append(error)
        raise error

    for error, count in ((OSError(5, "Input/output error"), 2), (BadImageError("cut"), 1)):
        del tries[:]
        for _ in range(2):
            with pytest.raises(type(error)):
                groups.get(("a", count), 1, lambda error=error: fail(error))
        assert len(tries) == count


@pytest.mark.promise("R16")
def test_an_arrow_file_that_is_cut_is_used_up_to_there(tmp_path):
    whole = write_table(tmp_path / "whole.stream.arrow", ROWS).read_bytes()
    path = tmp_path / "cut.arrow"
    for length, num_images, said in (
        (len(whole) - 8, 23, "it has no end"),
        (len(whole) - 9, 20, "Expected to be able to read"),
        (len(whole) // 2, 10, "Expected to be able to read"),
    ):
        path.write_bytes(whole[:length])
        source, labels, _ = labelled_images(path)
        assert len(source) == len(labels) == num_images
        assert source.read(num_images - 1) == picture(num_images - 1)
        (why,) = source.damage.values()
        assert why.startswith(said)
        assert why.endswith(f"; {num_images} images before that are used")
        assert "1 damaged table" in describe_source(source)
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"no images in .*1 damaged table \(.*cut.arrow: "):
        open_images(path)
    write_table(tmp_path / "d-0.parquet", ROWS)
    (tmp_path / "d-1.parquet").write_bytes(b"PAR1 no more PAR1")
    source = open_images(f"{tmp_path}/d-*.parquet")
    assert len(source) == 23
    assert [*source.damage] == [f"{tmp_path}/d-1.parquet"]


@pytest.mark.promise("R16")
def test_an_arrow_file_that_shrinks_later_gives_bad_images_and_no_end_of_the_process(tmp_path):
    path = write_table(tmp_path / "t.arrow", ROWS)
    source = open_images(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(OSError, match="bytes from"):
        source.read(22)


@pytest.mark.promise("R16")
def test_flipped_bytes_of_a_parquet_file_are_bad_images_or_none(tmp_path):
    path = write_table(tmp_path / "t.parquet", ROWS, write_page_checksum=True)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    num_bad = num_refused = 0
    for at in rng.integers(0, len(whole), 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            source = open_images(path)
        except ValueError:
            num_refused += 1
            continue
        for number in range(len(source)):
            try:
                assert source.read(number) == picture(number)
            except (BadImageError, OSError):
                num_bad += 1
    assert num_bad > 60
    assert num_refused < 20


def test_flipped_bytes_of_an_arrow_file_read_nothing_outside_of_it(tmp_path):
    path = write_table(tmp_path / "t.stream.arrow", ROWS)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    header = [at for at in range(len(whole)) if at < 2500]
    num_read = 0
    for at in rng.choice(header, 80):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            source = open_images(path)
        except ValueError:
            continue
        for number in range(len(source)):
            try:
                num_read += len(source.read(number)) <= len(whole)
            except (BadImageError, OSError):
                continue
    assert num_read > 100


def test_columns_that_do_not_fit_their_schema_are_broken_files_and_not_the_end(tmp_path):
    """Asked what it knows of such a column, pyarrow ends the process."""
    path = write_table(tmp_path / "t.parquet", [row(number) for number in range(3)])
    before, optional, required = (
        path.read_bytes(),
        b"\x35\x02\x18\x05image",
        b"\x35\x00\x18\x05image",
    )
    assert before.count(optional) == 1
    path.write_bytes(before.replace(optional, required))
    source = open_images(path)
    assert len({source.size(number) for number in range(3)}) == 1
    with pytest.raises(BadImageError, match=r"its row group cannot be read .*histogram"):
        source.read(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_any_bytes_is_one_of_broken_files(tmp_path, kind):
    rows = [row(1, image=None), row(2, image={"bytes": b"", "path": ""}), row(3)]
    source = open_images(write_table(tmp_path / f"t{kind}", rows, per_shard=2))
    assert (source.shard_sizes, source.read(2)) == ([2, 1], picture(3))
    for number in (0, 1):
        with pytest.raises(BadImageError, match=r"no bytes|empty"):
            decode_fast(source.read(number))


@pytest.mark.promise("S4")
@pytest.mark.parametrize("kind", KINDS)
def test_a_path_in_a_row_is_never_opened(tmp_path, kind):
    (tmp_path / "secret.jpg").write_bytes(picture(0))
    gone = {"bytes": None, "path": str(tmp_path / "secret.jpg")}
    rows = [row(1), row(2, image=gone), row(3, image=None), row(4)]
    source = open_images(write_table(tmp_path / f"t{kind}", rows))
    for number in (1, 2):
        with pytest.raises(BadImageError, match="its row has no bytes"):
            source.read(number)
    assert source.read(3) == picture(4)


def test_an_image_of_no_bytes_and_one_that_is_none_are_bad_images(tmp_path):
    rows = [row(0), row(1, image={"bytes": b"", "path": ""}), row(2)]
    for kind in KINDS:
        source = open_images(write_table(tmp_path / f"t{kind}", rows))
        with pytest.raises(BadImageError):
            decode_fast(source.read(1))


def test_tables_of_several_parts_are_told_apart(tmp_path):
    for part in ("train", "validation"):
        for number in range(2):
            write_table(tmp_path / f"{part}-{number:05d}-of-00002.parquet", ROWS[:6])
    assert len(open_images(tmp_path)) == 24
    with pytest.raises(ValueError, match="tables of train, validation") as refused:
        labelled_images(tmp_path)
    for pattern in str(refused.value).rsplit("pass one of them, ", 1)[1].split(" or "):
        source, _, _ = labelled_images(pattern)
        assert len(source) == 12


def test_fine_tuning_holds_images_out_of_tables(parquet):
    data = LabelledDataConfig(path=str(parquet.parent), held_out=0.3, shuffle="window", window=2)
    source, labels, classes, (test, test_labels) = open_labelled(data)
    assert classes == CLASSES
    assert len(source) + len(test) == 23
    for part, of_part in ((source, labels), (test, test_labels)):
        numbers = [int(part.key(i).rsplit("/", 1)[1]) for i in range(len(part))]
        assert [number % 3 for number in numbers] == of_part.tolist()
        assert sum(part.shard_sizes) == len(part)
    loader = Loader(source, SAMPLE, batch_size=len(source), window=data.shards_at_once)
    (batch,) = take_batches(loader, 1)
    assert sorted(batch["sample_index"].tolist()) == [*range(len(source))]


def test_what_has_no_classes_is_refused_for_fine_tuning_alone(tmp_path):
    path = tmp_path / "t.parquet"
    for schema, rows, said in (
        (schema_of().remove_metadata(), ROWS, "does not say the classes"),
        (
            schema_of(),
            [*ROWS, row(5, label=-1)],
            r"1 of the 24 .* the first is .*/23 with no class",
        ),
        (schema_of(), [*ROWS, row(5, label=None)], "1 of the 24 .* with no class"),
        (schema_of(), [*ROWS, row(5, label=3)], "1 of the 24 .* with class 3: leave them out"),
        (schema_of(), ROWS[::3], "images of class cat alone"),
    ):
        write_table(path, rows, schema=schema)
        with pytest.raises(ValueError, match=said):
            labelled_images(path)
        assert len(open_images(path)) == len(rows)
    write_table(path, [row(0)] * 3)
    assert labelled_images(path, fewest=1)[2] == CLASSES


def test_tables_without_images_or_with_other_classes_are_refused(tmp_path):
    path = tmp_path / "t.parquet"
    pa.parquet.write_table(pa.table({"text": ["a"], "label": [1]}), path)
    with pytest.raises(ValueError, match=r"no column of images .* columns are text \(string\)"):
        open_images(path)
    schema = pa.schema([("left", image_type()), ("right", image_type())])
    image = row(0)["image"]
    write_table(path, [{"left": image, "right": image}], schema=schema)
    with pytest.raises(ValueError, match=r"2 columns of images \(left, right\) and not one"):
        open_images(path)
    write_table(
        path, [row(0, right=image)], schema=schema_of(right=image_type())
    )  # as the error advises
    assert open_images(path).read(0) == picture(0)
    write_table(tmp_path / "u.parquet", ROWS, schema=schema_of(["a", "b", "c"]))
    with pytest.raises(
        ValueError, match=r"t.parquet and u.parquet in .* have not the same classes"
    ):
        open_images(tmp_path)
    assert len(open_images(f"{tmp_path}/u*.parquet")) == 23


def test_a_compressed_arrow_file_is_refused_and_its_remedies_read(tmp_path):
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    path = write_table(tmp_path / "t.arrow", ROWS, options=options)
    with pytest.raises(ValueError, match="write it without compression, or as Parquet"):
        open_images(path)
    assert len(open_images(write_table(tmp_path / "u.arrow", ROWS))) == 23
    assert len(open_images(write_table(tmp_path / "u.parquet", ROWS))) == 23


def test_what_is_not_there_is_said(tmp_path, parquet):
    for path, said in (
        (f"{tmp_path}/none/*.parquet", "cannot be read .*: check the path"),
        (f"{parquet.parent}/test-*.parquet", r"there are 1 table \(train-00000-of-00001.parquet\)"),
        (f"{parquet.parent}/train-0000{{0..1}}-of-00001.parquet", "1 table is .* not in .*braces"),
        ("s3://bucket/train-*.parquet", "read from disk alone: copy them"),
    ):
        with pytest.raises(ValueError, match=said):
            open_images(path)
    with pytest.raises(ValueError, match="the folder that they lie in, where nothing") as refused:
        open_images(tmp_path)  # of which they are one folder below
    pattern = str(refused.value).rpartition(" ")[2]
    assert len(open_images(parquet.parent)) == len(open_images(pattern)) == 23  # as it says
    empty = write_table(tmp_path / "empty.parquet", [])
    with pytest.raises(
        ValueError, match=r"no images in .*empty.parquet: give tables that have rows"
    ):
        open_images(empty)


def test_without_pyarrow_the_error_names_the_extra(parquet, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r'pip install "beit_fast\[tables\]"'):
        open_images(parquet)


def test_a_window_of_one_rank_is_that_of_two(parquet):
    def batches(**options):
        source = open_images(parquet)
        data = DataConfig(shuffle="window", window=2)
        return take_batches(Loader(source, SAMPLE, window=data.shards_at_once, **options), 6)

    whole = batches(batch_size=8)
    halves = [batches(batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
    for one, *parts in zip(whole, *halves, strict=True):
        read = [number for part in parts for number in part["sample_index"].tolist()]
        assert one["sample_index"].tolist() == read
