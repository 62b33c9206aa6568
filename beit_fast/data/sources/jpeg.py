"""Which JPEGs a decoder on a device takes, found from their headers, without decoding.

Plain is what nearly all photographs are and what every hardware decoder knows: baseline, Huffman
coded, 8 bits, one scan, grey or YCbCr with common sampling, whole to its end marker. Of all others
it is said why not; they are for the CPU, whose word on odd and broken files is the same for every
kind of views. So a file that was cut never reaches a decoder that would fill the rest with grey.
"""

from dataclasses import dataclass

_MARKER, _START, _END = 0xFF, b"\xff\xd8\xff", b"\xff\xd9"
_SOS, _APP1, _APP14 = 0xDA, 0xE1, 0xEE
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # of 0xC0 .. 0xCF: tables, an extension, arithmetic conditioning
_ALONE = (0x00, 0x01, *range(0xD0, 0xD9))  # markers without a length
_SAMPLINGS = (0x11, 0x21, 0x22, 0x12)  # of luma, horizontal and vertical; colours have 0x11
_YCBCR = 1  # of Adobe's transforms


@dataclass(frozen=True)
class Jpeg:
    """A plain JPEG: its size, and its bytes without APP1 segments, whose EXIF some decoders would
    rotate by."""

    height: int
    width: int
    data: bytes


def plain_jpeg(data: bytes) -> Jpeg | str:
    """The JPEG, or why a device's decoder is not to have the file: "progressive", "not JPEG"."""
    if not data.startswith(_START):
        return "not JPEG"
    app1, frame, adobe = [], None, _YCBCR
    position = 2
    try:
        while True:
            if data[position] != _MARKER:  # decoders skip to the next marker, and warn
                return "damaged header"
            while data[position + 1] == _MARKER:  # fill bytes
                position += 1
            marker = data[position + 1]
            if marker == _SOS:
                break
            if marker in _ALONE or marker == _END[1]:
                return "damaged header"
            end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
            if marker == _APP1:
                app1.append((position, end))
            elif marker == _APP14 and data[position + 4 : position + 9] == b"Adobe":
                adobe = data[position + 15]
            elif 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
                if frame is not None:
                    return "damaged header"
                frame = marker, data[position + 4 : end]
            position = end
        if frame is None:
            return "damaged header"
        num_scanned = data[position + 4]
    except IndexError:
        return "damaged header"
    if why := _odd(*frame, adobe, num_scanned):
        return why
    if not data.endswith(_END):
        return "no end marker"
    for start, end in reversed(app1):
        data = data[:start] + data[end:]
    height, width = (int.from_bytes(frame[1][at : at + 2]) for at in (1, 3))
    return Jpeg(height, width, data)


def _odd(marker: int, frame: bytes, adobe: int, num_scanned: int) -> str:
    """What is not plain in a frame header, from its precision on; "" for nothing."""
    if marker == 0xC2:
        return "progressive"
    if marker != 0xC0:
        return "not baseline"
    if len(frame) < 6 or len(frame) != 6 + 3 * frame[5]:
        return "damaged header"
    components = [frame[at : at + 3] for at in range(6, len(frame), 3)]
    if len(components) == 4:
        return "CMYK"
    if frame[0] != 8 or not any(frame[1:3]) or not any(frame[3:5]):
        return "not 8 bits or without a size"
    if len(components) == 1:
        return "" if num_scanned == 1 else "damaged header"
    if len(components) != 3 or [c[0] for c in components] != [1, 2, 3] or adobe != _YCBCR:
        return "colours other than YCbCr"
    if num_scanned != 3:
        return "several scans"
    samplings = [c[1] for c in components]
    if samplings[0] not in _SAMPLINGS or samplings[1:] != [0x11, 0x11]:
        return "unusual sampling of colours"
    return ""
