"""Which columns of a table are the images and their classes, as Hugging Face datasets write them.

image    struct {bytes, path}; in the schema's metadata a feature of type Image
label    int64; in the metadata a feature of type ClassLabel, with the names of the classes
"""

import json
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from beit_fast.data.sources.scan import counted
from beit_fast.files import damage, describe

if TYPE_CHECKING:
    import pyarrow

NO_CLASS = -1  # the class of an image that has none, as datasets write it
_IMAGE, _LABEL = "image", "label"  # of several the columns called so


class DamagedTableError(ValueError):
    """A file that nothing can be had of."""


class Columns(NamedTuple):
    """Names; label "" and no classes where there is no class of images, or more than one."""

    image: str
    label: str
    classes: list[str]


def columns_of(schema: "pyarrow.Schema", path: str) -> Columns:
    """Raises ValueError for a table without images, and for one with several of each row."""
    pa = import_pyarrow()
    features = _features(schema.metadata or {})
    images = [field.name for field in schema if _is_image(pa, field.type)]
    if _IMAGE in images:
        images = [_IMAGE]
    if len(images) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)[:500]
        several = counted(len(images), "column of images", "columns of images", images)
        raise ValueError(
            f"{path} has {several or 'no column of images'} and not one: its columns are "
            f"{columns}. Give tables in which one column is a struct of bytes and path, as "
            "Hugging Face datasets write images, and if there are several is called image"
        )
    labels = [
        field.name
        for field in schema
        if _type_of(features, field.name) == "ClassLabel" and pa.types.is_integer(field.type)
    ]
    if _LABEL in labels:
        labels = [_LABEL]
    if len(labels) != 1:
        return Columns(images[0], "", [])
    names = features[labels[0]].get("names")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return Columns(images[0], labels[0], names if is_list else [])


def import_pyarrow() -> ModuleType:
    """Raises ValueError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"tables are read by pyarrow, which cannot be imported ({error}): pip install "
            '"beit_fast[tables]"'
        ) from error
    return pyarrow


def refuse(path: str, error: Exception) -> NoReturn:
    """Raise DamagedTableError for what the content of a file is not, ValueError for a disk that
    does not give it."""
    if isinstance(error, OSError) and error.errno is not None:
        raise ValueError(f"{path} cannot be read ({describe(error)})") from error
    raise DamagedTableError(damage(error)) from error


def _is_image(pa: ModuleType, kind: "pyarrow.DataType") -> bool:
    if not pa.types.is_struct(kind) or {field.name for field in kind} != {"bytes", "path"}:
        return False
    content = kind.field("bytes").type
    return pa.types.is_binary(content) or pa.types.is_large_binary(content)


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Of the columns, as the schema's metadata has them; {} where it says nothing of them."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _type_of(features: Mapping[str, Any], name: str) -> Any:
    feature = features.get(name)
    return feature.get("_type") if isinstance(feature, dict) else None
