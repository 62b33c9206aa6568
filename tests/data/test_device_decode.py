"""Batches of JPEGs on a device that decodes no better than it must: here a CPU in its place."""

import numpy as np
import pytest
import torch

from beit_fast.data.device_decode import (
    REFUSED,
    DecodeCounts,
    DeviceDecodeError,
    DeviceDecoder,
    check_torchcodec,
    device_decoder,
)
from beit_fast.data.sources.decode import BadImageError, decode_fast, import_decode_jpeg
from beit_fast.data.sources.jpeg import plain_jpeg

CPU = torch.device("cpu")


class Device:
    """Decodes batches on the CPU, and gives up those that hold one of `refused`; None: all."""

    def __init__(self, refused=(), error=None):
        self.refused = None if refused is None else [bytes(data) for data in refused]
        self.error = error or RuntimeError("nvjpeg: bad stream\nsecond line")
        self.batches = []

    def __call__(self, encoded):
        self.batches.append(len(encoded))
        if self.refused is None or any(bytes(x.numpy()) in self.refused for x in encoded):
            raise self.error
        return [import_decode_jpeg()(x, mode="RGB") for x in encoded]


@pytest.fixture
def files(make_image, make_file):
    return [make_file(make_image(20 + i, 30, i), "JPEG") for i in range(8)]


def images_of(files):
    return [plain_jpeg(data) for data in files]


def assert_pixels(found, files):
    for (pixels, _), data in zip(found, files, strict=True):
        assert pixels.shape[0] == 3
        assert np.array_equal(pixels.permute(1, 2, 0), decode_fast(data))


def reasons(found):
    return [why for _, why in found]


def without_tables(data: bytes) -> bytes:
    """Whole by its headers and its end; only decoding shows that it is broken."""
    start = data.index(b"\xff\xdb")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4]) :]


def test_a_batch_is_decoded_at_once(files):
    device = Device()
    found = DeviceDecoder(CPU, device)(images_of(files))
    assert device.batches == [8]
    assert reasons(found) == [""] * 8
    assert_pixels(found, files)


def test_without_a_decoder_on_the_device_the_cpu_decodes_and_nothing_is_odd(files):
    found = device_decoder(CPU)(images_of(files))
    assert reasons(found) == [""] * 8
    assert_pixels(found, files)


def test_a_refused_image_alone_goes_to_the_cpu(files):
    device = Device(refused=[files[5]])
    found = DeviceDecoder(CPU, device)(images_of(files))
    assert device.batches == [8, 4, 4, 2, 1, 1, 2]
    assert reasons(found) == [""] * 5 + [REFUSED] + [""] * 2
    assert_pixels(found, files)


def test_an_image_that_the_cpu_cannot_decode_either_is_a_bad_one(files):
    files[2] = without_tables(files[2])
    found = DeviceDecoder(CPU, Device(refused=[files[2]]))(images_of(files))
    assert isinstance(found[2][0], BadImageError)
    assert "broken data stream" in str(found[2][0])
    del found[2], files[2]
    assert_pixels(found, files)
    (alone,) = device_decoder(CPU)(images_of([without_tables(files[0])]))
    assert isinstance(alone[0], BadImageError)


def test_pixels_of_another_size_than_the_header_says_are_not_taken(files):
    """As of a decoder that rotates, or skips an image and says nothing."""

    def rotates(encoded):
        return [x.transpose(1, 2) if i == 1 else x for i, x in enumerate(Device()(encoded))]

    found = DeviceDecoder(CPU, rotates)(images_of(files))
    assert reasons(found) == ["", REFUSED] + [""] * 6
    assert_pixels(found, files)


def test_a_device_that_decodes_nothing_at_all_is_no_silent_cpu(files):
    decoder = DeviceDecoder(CPU, Device(refused=None))
    with pytest.raises(
        DeviceDecodeError,
        match=r"the decoder of cpu refuses every image, the CPU's does not \(nvjpeg: bad stream\)"
        r": see that torchcodec and driver fit, or pass --views.kind fast",
    ):
        decoder(images_of(files))


def test_a_device_may_refuse_the_only_plain_image_of_its_first_batch(files):
    """It has shown nothing yet, and decodes a photograph that is known."""
    device = Device(refused=files[:1])
    decoder = DeviceDecoder(CPU, device)
    assert reasons(decoder(images_of(files[:1]))) == [REFUSED]
    assert reasons(decoder(images_of(files[:1]))) == [REFUSED]
    assert device.batches == [1, 1, 1]  # asked once


def test_a_device_that_decoded_something_may_refuse_a_batch(files):
    decoder = DeviceDecoder(CPU, Device(refused=files[4:]))
    decoder(images_of(files[:4]))
    assert reasons(decoder(images_of(files[4:]))) == [REFUSED] * 4


def test_bad_images_alone_are_no_fault_of_the_device(files):
    bad = [without_tables(data) for data in files]
    found = DeviceDecoder(CPU, Device(refused=bad))(images_of(bad))
    assert all(isinstance(pixels, BadImageError) for pixels, _ in found)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: ...")],
    ids=["memory", "device"],
)
def test_errors_of_the_device_are_not_taken_for_bad_images(files, error):
    device = Device(refused=[files[0]], error=error)
    with pytest.raises(type(error)):
        DeviceDecoder(CPU, device)(images_of(files))
    assert device.batches == [8]


@pytest.mark.parametrize("version", ["0.16.1", "0.9", "0.16.0+cu130"])
def test_a_torchcodec_that_overwrites_memory_is_refused(version):
    with pytest.raises(DeviceDecodeError, match=r"pip install 'torchcodec>=0.17'.*views.kind fast"):
        check_torchcodec(version)


@pytest.mark.parametrize("version", ["0.17.0+cu130", "0.17.1", "0.20.0.dev1", "1.0"])
def test_a_torchcodec_that_waits_for_the_stream_is_taken(version):
    check_torchcodec(version)


def test_what_was_odd_is_counted_by_reason():
    counts = DecodeCounts()
    assert str(counts) == ""
    counts.add(["", "", ""])
    assert str(counts) == ""
    assert counts.odd() == {}
    counts.add(["CMYK", "", "progressive", "progressive"])
    assert counts.odd() == {"progressive": 2, "CMYK": 1}
    assert str(counts) == (
        "3 of 7 images loaded here were left to the CPU's decoder: 2 progressive, 1 CMYK"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs nvJPEG")
def test_the_gpu_decodes_photographs_as_the_cpu_does_but_for_rounding(photographs):
    found = device_decoder(torch.device("cuda"))(images_of(photographs))
    assert reasons(found) == [""] * len(photographs)
    for (pixels, _), data in zip(found, photographs, strict=True):
        assert pixels.is_cuda
        difference = pixels.permute(1, 2, 0).cpu().int() - torch.from_numpy(decode_fast(data)).int()
        assert difference.abs().float().mean() < 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs nvJPEG")
def test_the_gpu_decodes_over_no_memory_that_waiting_work_reads(photographs):
    """What torchcodec 0.16 and torchvision do: the engine writes before the stream's turn."""
    decoder, images = device_decoder(torch.device("cuda")), images_of(photographs * 4)
    first = [pixels.clone() for pixels, _ in decoder(images)]
    for _ in range(10):
        waiting = [torch.full((2**24,), 7, dtype=torch.uint8, device="cuda") for _ in range(4)]
        torch.cuda._sleep(50_000_000)
        sums = [part.long().sum() for part in waiting]
        del waiting  # free for the decoder, and yet to be read
        again = decoder(images)
        assert all(int(total) == 7 * 2**24 for total in sums)
        for (pixels, _), before in zip(again, first, strict=True):
            assert torch.equal(pixels, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs nvJPEG")
def test_one_bad_image_costs_the_gpu_no_other(photographs):
    files = [*photographs[:5], without_tables(photographs[5]), *photographs[6:10]]
    found = device_decoder(torch.device("cuda"))(images_of(files))
    assert [isinstance(pixels, BadImageError) for pixels, _ in found] == [i == 5 for i in range(10)]
