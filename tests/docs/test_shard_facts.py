"""What docs/shards.md says of orders and tables is what was measured, and what the code does."""

import csv

import pytest

from beit_fast.data.config import DataConfig
from beit_fast.data.sources import parquet_table
from pages import ROOT, text_of

PAGE = text_of(ROOT / "docs" / "shards.md")


def results(name: str) -> list[dict[str, str]]:
    with (ROOT / "bench" / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", results("order.csv"), ids=lambda row: row["order"])
def test_the_table_of_orders_is_the_measured_one(row):
    cells = (
        row["order"].replace("window ", "window of "),
        f"{float(row['rank correlation']):.3f}",
        f"{float(row['repeat distance']):.2f}",
        f"{float(row['shards a batch']):.0f}",
        f"{100 * float(row['same shard']):.1f} %",
        f"{float(row['us a sample']):.1f}",
    )
    assert f"\n| {' | '.join(cells)} |\n" in PAGE
    assert f"{int(row['shards']):,} with {int(row['images']):,} images each" in PAGE
    assert f"{int(row['batch']):,} images" in PAGE


def test_the_table_of_reads_is_the_measured_one():
    rows = results("reads.csv")
    us = {(row["source"], row["order"]): f"{float(row['us']):,.0f}" for row in rows}
    for source, said in (("tar", "tar shards"), ("arrow", "Arrow"), ("parquet", "Parquet")):
        assert f"\n| {said} | {us[source, 'full']} | {us[source, 'window']} |\n" in PAGE
    assert f"\n| folder of files | {us['folder', 'full']} | |\n" in PAGE
    assert f"{int(rows[0]['images']):,} images of 50 kB" in PAGE


def test_the_settings_have_the_defaults_of_the_code():
    assert f"at most `--data.window` ({DataConfig().window})" in PAGE
    assert DataConfig().shuffle == "full"
    assert f"{parquet_table._KEPT} row groups or a gigabyte, with a window twice" in PAGE
    assert parquet_table._KEPT_BYTES == 2**30
