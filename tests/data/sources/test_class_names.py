"""Files of class names."""

import json

import pytest

from beit_fast.data.sources.class_names import Classes, numbered_classes, read_classes


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


ROAD, CAR = {"name": "road", "color": [128, 64, 128]}, {"name": "car", "color": "#0000fF"}


@pytest.mark.parametrize(
    ("name", "content", "classes"),
    [
        ("names.txt", "road\ncar\n", Classes(("road", "car"), None, None)),
        ("names.txt", b"\xef\xbb\xbfroad \r\n traffic light\r\n\r\n", None),
        ("names", "road\ncar", Classes(("road", "car"), None, None)),
        ("a.json", ["road", "car"], Classes(("road", "car"), None, None)),
        ("a.JSON", {"classes": ["road", "car"]}, Classes(("road", "car"), None, None)),
        ("a.json", [ROAD, CAR], Classes(("road", "car"), ((128, 64, 128), (0, 0, 255)), None)),
        (
            "a.json",
            {"classes": [ROAD | {"id": 26}, CAR | {"id": 7}], "license": "CC0"},
            Classes(("car", "road"), ((0, 0, 255), (128, 64, 128)), (7, 26)),
        ),
    ],
    ids=range(7),
)
def test_classes_are_read_from_text_and_json(write, name, content, classes):
    expected = classes or Classes(("road", "traffic light"), None, None)
    assert read_classes(write(name, content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "names 0 classes: give 1 to 32767"),
        ("a.txt", "\n\n", "class 0: its name is empty"),
        ("a.txt", "road\n\ncar", "class 1: its name is empty"),
        ("a.txt", "road\ncar\nroad", "two classes have the name 'road': give each its own"),
        ("a.txt", '["road"]', "holds JSON: give it a name that ends in .json"),
        ("a.txt", b"stra\xdfe", "is no text in UTF-8"),
        ("a.json", '["road",', "is no valid JSON"),
        ("a.json", "[" * 100_000, "is no valid JSON"),
        ("a.json", {"names": []}, "holds no list of classes: write"),
        ("a.json", "3", "holds no list of classes"),
        ("a.json", [], "names 0 classes"),
        ("a.json", ["road", 3], '3 is no class: write "road"'),
        ("a.json", [{"label": "road"}], "class 0: {'label': 'road'} is no class"),
        (
            "a.json",
            [{"name": "road", "colour": 1}],
            "'colour' is no field of a class: it has color",
        ),
        ("a.json", [{"name": "road", "color": [1, 2, 256]}], "the color .* is none: write"),
        ("a.json", [{"name": "road", "color": "red"}], "the color 'red' is none"),
        ("a.json", [{"name": "road", "id": True}], "the id True is no whole number of 0 to 65535"),
        ("a.json", [{"name": "road", "id": 65536}], "the id 65536 is no whole number"),
        ("a.json", [ROAD, {"name": "car"}], "'car' has no 'color' and others have"),
        ("a.json", [ROAD | {"id": 1}, CAR], "'car' has no 'id' and others have"),
        ("a.json", [ROAD | {"id": 1}, CAR | {"id": 1}], "two classes have the id 1"),
    ],
)
def test_files_that_name_no_classes_are_refused_with_what_to_write(write, name, content, message):
    path = write(name, content)
    with pytest.raises(ValueError, match=message) as error:
        read_classes(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"names.txt does not exist: check the path"):
        read_classes(tmp_path / "names.txt")
    with pytest.raises(ValueError, match="is no file"):
        read_classes(tmp_path)


def test_classes_without_names_have_numbers():
    assert numbered_classes(2) == Classes(("class 0", "class 1"), None, None)
