"""Tables of images as Hugging Face datasets write them, made on the fly."""

import json
from pathlib import Path

from shards import picture

CLASSES = ["cat", "dog", "owl"]


def image_type():
    import pyarrow as pa  # of an extra: tests of more than tables are in the files that use this

    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def schema_of(classes=CLASSES, **more):
    """Columns image and label, and others of these types; what datasets say of the former."""
    import pyarrow as pa

    features = {
        "image": {"_type": "Image"},
        "label": {"names": classes, "_type": "ClassLabel"},
    }
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {"image": image_type(), "label": pa.int64(), **more}
    return pa.schema([*columns.items()], metadata=said)


def row(number: int, **changes):
    content = {"bytes": picture(number), "path": f"{number}.jpg"}
    return {"image": content, "label": number % len(CLASSES), **changes}


def write_table(path, rows, *, per_shard=5, schema=None, **options) -> Path:
    """Parquet; a file of Arrow where the name ends in .arrow, and a stream in .stream.arrow."""
    import pyarrow as pa
    import pyarrow.parquet

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema or schema_of())
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path, row_group_size=per_shard, **options)
        return path
    new = pa.ipc.new_stream if path.suffixes[:-1] == [".stream"] else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=per_shard)
    return path
