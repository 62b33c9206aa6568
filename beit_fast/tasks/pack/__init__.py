"""Images -> tar shards that webdataset, timm and this package read."""
