"""Views of kind gpu through the loader, the CPU in the device's place: to the bit those of kind
reference, whatever is broken, whoever asks."""

import logging
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from beit_fast.data import device_views, loader
from beit_fast.data.bad_samples import BadDataError
from beit_fast.data.config import MaskingConfig
from beit_fast.data.device_decode import REFUSED, DecodeCounts, DeviceDecodeError, DeviceDecoder
from beit_fast.data.device_views import DeviceViews, taken
from beit_fast.data.loader import Loader
from beit_fast.data.samples import PretrainSample, TokenViewSample
from beit_fast.data.seeds import SampleSeed
from beit_fast.data.sources.decode import BadImageError, import_decode_jpeg
from beit_fast.data.sources.folder import ImageFolder
from beit_fast.data.sources.limits import ReadConfig
from beit_fast.data.views.config import ViewConfig
from beit_fast.data.views.two_views import LATE, VIEWS, make_views
from faults import LET_GO, Injector, fired
from loaded import Faulty, assert_equal
from task_runs import take_batches

CPU = torch.device("cpu")
VIEW = ViewConfig(kind="gpu", size=(32, 48), token_size=(16, 24))
MASKING = MaskingConfig(num_masked=6, min_block=2)
NUM_IMAGES = 40


def sample(kind="gpu", **changes):
    return PretrainSample(replace(VIEW, kind=kind, **changes), MASKING, (4, 6))


@pytest.fixture
def folder(tmp_path, make_image, make_file):
    """40 images of many sizes: among them grey, progressive, CMYK, PNG and tiny ones."""
    path = tmp_path / "images"
    path.mkdir()
    odd = {
        3: lambda image: make_file(image.convert("L"), "JPEG"),
        8: lambda image: make_file(image, "JPEG", progressive=True),
        9: lambda image: make_file(image.convert("CMYK"), "JPEG"),
        17: lambda image: make_file(image, "PNG"),
        21: lambda image: make_file(image.resize((1, 2)), "JPEG"),
    }
    for number in range(NUM_IMAGES):
        image = make_image(30 + number, 90 - number, number)
        data = odd.get(number, lambda image: make_file(image, "JPEG"))(image)
        (path / f"{number:02}.jpg").write_bytes(data)
    return path


def without_tables(path) -> None:
    """Whole by its headers and its end; only decoding shows that it is broken."""
    data = path.read_bytes()
    start = data.index(b"\xff\xdb")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
    path.write_bytes(data[:start] + data[end:])


def spoil(folder) -> list[str]:
    """Three that are broken in their pixels, two of them neighbours, and one in its header before
    and one cut behind the last of these."""
    paths = sorted(folder.iterdir())
    for number in (10, 12, 39):
        without_tables(paths[number])
    paths[11].write_bytes(b"")
    paths[0].write_bytes(paths[0].read_bytes()[:-30])
    return [str(paths[number]) for number in (0, 10, 11, 12, 39)]


def load(folder, kind, count, start=0, **options):
    options = {"batch_size": 7, "num_threads": 2, "max_bad_share": 0.2, "seed": 5} | options
    made = Loader(ImageFolder(folder), sample(kind), **options)
    return take_batches(made, count, start), made


@pytest.mark.parametrize("num_threads", [0, 3])
def test_batches_are_those_of_the_reference(folder, num_threads):
    theirs, _ = load(folder, "reference", 12)
    ours, made = load(folder, "gpu", 12, num_threads=num_threads)
    assert_equal(ours, theirs)
    assert made.decode_counts.odd().keys() == {"progressive", "CMYK", "not JPEG"}


@pytest.mark.parametrize("changes", [{"color_jitter": 0.0}, {"hflip": 1.0}, {"max_pixels": 3000}])
def test_other_views_are_those_of_the_reference(folder, changes):
    batches = [
        take_batches(
            Loader(
                ImageFolder(folder),
                sample(kind, **changes),
                batch_size=10,
                max_bad_share=1.0,
            ),
            4,
        )
        for kind in ("reference", "gpu")
    ]
    assert_equal(*batches)


def test_broken_images_are_replaced_as_by_the_other_kinds_named_and_counted_once(folder, caplog):
    bad = spoil(folder)
    theirs, reference = load(folder, "reference", 18)  # over three passes
    caplog.clear()
    with caplog.at_level(logging.WARNING, "beit_fast.data"):
        ours, made = load(folder, "gpu", 18)
    assert_equal(ours, theirs)
    assert list(made.bad_samples) == bad
    assert made.bad_samples == reference.bad_samples
    assert [sum(path in record.message for record in caplog.records) for path in bad] == [1] * 5
    counts = torch.bincount(torch.cat([batch["sample_index"] for batch in ours]), minlength=40)
    assert counts[[0, 10, 11, 12, 39]].tolist() == [0] * 5
    assert counts[13] > 3 * 3  # in place of three others


def test_resumed_and_split_over_ranks_it_is_the_same_stream(folder):
    spoil(folder)
    whole, _ = load(folder, "reference", 12, batch_size=8)
    resumed, _ = load(folder, "gpu", 7, start=5, batch_size=8, num_threads=4)
    assert_equal(resumed, whole[5:])
    ranks = [load(folder, "gpu", 12, batch_size=4, rank=rank, world_size=2)[0] for rank in range(2)]
    for number, batch in enumerate(whole):
        for name in ("images", "token_images", "sample_index", "mask"):
            parts = [rank[number][name] for rank in ranks]
            assert torch.equal(torch.cat(parts), batch[name])


def test_too_many_broken_ones_stop_it_where_they_stop_the_others(folder):
    spoil(folder)

    def stops(kind):
        made = Loader(
            ImageFolder(folder), sample(kind), batch_size=40, max_bad_share=0.1, num_threads=0
        )
        with pytest.raises(BadDataError, match="5 of 40 files are bad") as error:
            take_batches(made, 1)
        return error.value

    stops("reference")
    assert "--data.max_bad_share 0.1 allows 4" in str(stops("gpu"))


def test_where_nothing_can_be_decoded_it_ends(tmp_path, make_image, make_file):
    for number in range(3):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(make_file(make_image(30, 30), "JPEG"))
        without_tables(path)
    with pytest.raises(BadDataError, match="none of the 3 images can be used"):
        load(tmp_path, "gpu", 1, max_bad_share=1.0)


def test_a_read_that_hangs_for_a_replacement_is_a_broken_file_too(folder, tmp_path):
    """Of the image after one whose pixels are broken, read when its batch is long under way."""
    LET_GO.clear()
    spoil(folder)

    def run(kind, fault):
        (output := tmp_path / kind).mkdir()
        made = Loader(
            Faulty(ImageFolder(folder), Injector(output, [fault])),
            sample(kind),
            batch_size=40,
            num_threads=1,
            max_bad_share=0.5,
            reads=ReadConfig(read_timeout=0.3),
        )
        batches = take_batches(made, 1)
        assert fired(output) == {fault: 1}
        return batches, made.bad_samples

    fault = "0:13:hang_read"
    theirs, bad = run("reference", fault)
    ours, same = run("gpu", fault)
    LET_GO.set()
    assert_equal(ours, theirs)
    assert bad == same
    assert len(bad) == 6


def test_closing_waits_for_no_read_of_a_replacement(tmp_path, make_image, make_file):
    """The worker is in it, and is told."""
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(make_file(make_image(30, 30, number), "JPEG"))
    source = ImageFolder(tmp_path)
    without_tables(tmp_path / "1.jpg")
    asked, let_go = threading.Event(), threading.Event()

    class Hangs:
        reads = 0

        def read(self, index):
            self.reads += 1
            if self.reads > 3:  # all that the batch needs of itself
                asked.set()
                let_go.wait(60)
            return source.read(index)

        def __len__(self):
            return 3

        name = key = staticmethod(source.name)
        size = staticmethod(source.size)

    class Told(BaseException):
        pass

    def tell(*_):
        raise Told

    before = signal.signal(signal.SIGALRM, tell)
    hanging = Loader(Hangs(), sample(), batch_size=3, num_threads=0, max_bad_share=1.0)
    wakes = threading.Thread(target=lambda: asked.wait(10) and os.kill(os.getpid(), signal.SIGALRM))
    wakes.start()
    began = time.monotonic()
    try:
        with pytest.raises(Told):
            next(hanging.batches_in_order(0, 0, 3))
    finally:
        signal.signal(signal.SIGALRM, before)
        took = time.monotonic() - began
        let_go.set()
    wakes.join()
    assert asked.is_set()
    assert took < 5


class Refusing(DeviceDecoder):
    """A device in whose place the CPU decodes, and that gives up batches with a portrait in it."""

    def __init__(self, device):
        def decode_batch(encoded):
            decoded = [import_decode_jpeg()(x, mode="RGB") for x in encoded]
            if any(x.shape[1] > x.shape[2] for x in decoded):
                raise RuntimeError("refused")
            return decoded

        super().__init__(device, decode_batch)


def test_what_the_device_refuses_changes_no_batch_and_is_counted(folder, monkeypatch):
    spoil(folder)
    theirs, _ = load(folder, "reference", 8)
    monkeypatch.setattr(device_views, "device_decoder", Refusing)
    ours, made = load(folder, "gpu", 8)
    assert_equal(ours, theirs)
    assert made.decode_counts.odd()[REFUSED] > 0
    assert f"{REFUSED}" in str(made.decode_counts)


@pytest.mark.parametrize(("most", "count"), [(1, 1), (7600, 2), (15_000, 4)])
def test_images_are_decoded_some_at_a_time(folder, monkeypatch, most, count):
    spoil(folder)
    theirs, _ = load(folder, "reference", 3, batch_size=20)
    sizes, decode = [], DeviceDecoder.__call__

    def noted(self, images):
        sizes.append([image.height * image.width for image in images])
        return decode(self, images)

    monkeypatch.setattr(DeviceDecoder, "__call__", noted)
    monkeypatch.setattr(device_views, "PIXELS_AT_ONCE", most)
    ours, _ = load(folder, "gpu", 3, batch_size=20)
    assert_equal(ours, theirs)
    assert all(sum(part) <= most or len(part) == 1 for part in sizes)
    assert count <= max(map(len, sizes)) <= count + 1


def late_of(data, seed=0):
    (made, _) = make_views(data, VIEW, SampleSeed(0, 0, seed).rng("view"))
    return made[LATE]


def refuse(row, error):
    raise AssertionError("nothing is broken")


@pytest.mark.parametrize("format", ["PNG", "CMYK", "cut", "small"])
def test_threads_make_the_views_of_what_no_device_decodes_and_refuse_what_they_can(
    make_image, make_file, format
):
    image, config = make_image(60, 70), VIEW
    data = make_file(image, "JPEG")
    if format == "PNG":
        data = make_file(image, "PNG")
    elif format == "CMYK":
        data = make_file(image.convert("CMYK"), "JPEG")
    elif format == "cut":
        data = data[:-300]
    else:
        config = replace(VIEW, max_pixels=4199)
    rng = SampleSeed(0, 0, 0).rng
    if format in ("cut", "small"):
        with pytest.raises(BadImageError):
            make_views(data, config, rng("view"))
        return
    made, draw = make_views(data, config, rng("view"), ("images",))
    reference = replace(VIEW, kind="reference")
    expected, same = make_views(data, reference, rng("view"), ("images",))
    assert draw == same == made[LATE].draw
    assert made[LATE].jpeg is None
    assert made[LATE].made.keys() == expected.keys()
    assert (made[LATE].made["images"] == expected["images"]).all()


@pytest.mark.parametrize("names", [VIEWS, ("images",), ("token_images",)], ids=str)
def test_only_the_views_asked_for_are_made(photographs, names):
    late = [late_of(data, i) for i, data in enumerate(photographs[:3])]
    made = DeviceViews(VIEW, names, CPU, DecodeCounts())(late, refuse)
    both = DeviceViews(VIEW, VIEWS, CPU, DecodeCounts())(late, refuse)
    assert tuple(made) == tuple(names)
    for name, view in made.items():
        assert torch.equal(view, both[name])


def test_draws_are_those_of_the_other_kinds(photographs):
    for number, data in enumerate(photographs):
        draws = {
            make_views(data, replace(VIEW, kind=kind), SampleSeed(1, 2, number).rng("view"))[1]
            for kind in ("reference", "fast", "gpu")
        }
        assert len(draws) == 1


def test_pixels_by_plane_or_by_pixel_are_the_same_image(photographs):
    """Decoders give either."""
    late = late_of(photographs[0])
    ((pixels, _),) = DeviceDecoder(CPU, None)([late.jpeg])

    class Gives(DeviceDecoder):
        def __call__(self, images):
            return [(self.pixels, "")]

    made = []
    for self_pixels in (pixels, pixels.contiguous()):
        decoder = Gives(CPU, None)
        decoder.pixels = self_pixels
        made.append(DeviceViews(VIEW, VIEWS, CPU, DecodeCounts(), decoder)([late], refuse))
    assert not pixels.is_contiguous()
    for name in VIEWS:
        assert torch.equal(made[0][name], made[1][name])


def test_views_are_finished_when_they_are_handed_over(photographs, monkeypatch):
    """On a stream of their own, which the thread that makes them waits for."""
    done = []

    class Stream:
        def __enter__(self):
            done.append("stream")

        def __exit__(self, *_):
            done.append("left")

    class Event:
        def __init__(self, blocking):
            assert blocking  # a host that spins takes a core from the loader

        def record(self):
            done.append("recorded")

        def synchronize(self):
            done.append("waited")

    made = DeviceViews(VIEW, VIEWS, CPU, DecodeCounts())
    made._stream = Stream()
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    of_images = made.made
    monkeypatch.setattr(made, "made", lambda *args: done.append("made") or of_images(*args))
    made([late_of(photographs[0])], refuse)
    assert done == ["stream", "made", "recorded", "waited", "left"]


def test_all_that_is_decoded_on_a_device_shares_a_stream(monkeypatch):
    """Or each evaluation would leave the memory of its own with the allocator."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    first, second, other = (torch.device("cuda", index) for index in (97, 97, 98))
    decoder = DeviceDecoder(CPU, None)
    streams = [
        DeviceViews(VIEW, VIEWS, device, DecodeCounts(), decoder)._stream
        for device in (first, second, other)
    ]
    assert streams[0] is streams[1] is not streams[2]
    assert made == [first, other]


def test_whoever_takes_views_tells_the_allocator_on_which_stream_they_are_read(monkeypatch):
    told = []

    class OnDevice:
        is_cuda, device = True, "cuda:1"

        def record_stream(self, stream):
            told.append(stream)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    taken({"images": OnDevice(), "mask": torch.zeros(3)})
    assert told == ["stream of cuda:1"]


def test_batches_are_taken_in_the_thread_that_asks_for_them(folder, monkeypatch):
    """Whose current stream is the one that reads them."""
    told = []

    def note(batch):
        told.append((threading.current_thread(), batch["sample_index"].tolist()))

    monkeypatch.setattr(loader, "taken", note)
    batches, _ = load(folder, "gpu", 3)
    here = threading.current_thread()
    assert told == [(here, batch["sample_index"].tolist()) for batch in batches]


def test_too_little_memory_on_the_device_says_what_to_do(photographs):
    def full(encoded):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    views = DeviceViews(VIEW, VIEWS, CPU, DecodeCounts(), DeviceDecoder(CPU, full))
    with pytest.raises(
        DeviceDecodeError,
        match=r"the views of 1 images found too little memory on cpu \(CUDA out of memory. Tried "
        r"to allocate\): pass a smaller --data.batch_size, or --views.kind fast",
    ):
        views([late_of(photographs[0])], refuse)


def test_records_of_a_token_cache_are_those_of_the_reference(folder):
    spoil(folder)
    made = []
    for kind in ("reference", "gpu"):
        tokens = TokenViewSample(replace(VIEW, kind=kind))
        source = Loader(ImageFolder(folder), tokens, batch_size=7, seed=5, max_bad_share=0.2)
        made.append(list(source.batches_in_order(1, 2, 40)))
    assert_equal(*made)
    assert len(made[0][-1]["seed"]) == 38 % 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs nvJPEG")
def test_on_a_gpu_batches_differ_from_the_reference_by_its_decoder_alone(folder):
    spoil(folder)
    theirs, _ = load(folder, "reference", 12)
    ours, made = load(folder, "gpu", 12, device=torch.device("cuda"))
    for batch, expected in zip(ours, theirs, strict=True):
        for name, value in expected.items():
            if name in VIEWS:
                assert batch[name].is_cuda
                difference = (batch[name].cpu().int() - value.int()).abs().float()
                assert difference.mean() < 2
            else:
                assert torch.equal(batch[name], value)
    assert REFUSED not in made.decode_counts.odd()
