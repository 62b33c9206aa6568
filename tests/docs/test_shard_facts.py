"""What docs/shards.md says of orders and tables is what was measured, and what the code does."""

import csv
import re
from dataclasses import fields

import pytest

from beit_fast.data.config import DataConfig
from beit_fast.data.sources import parquet_table
from beit_fast.data.sources.limits import ReadConfig
from beit_fast.tasks.check.config import CheckConfig
from beit_fast.tasks.pack.config import QUALITY, PackConfig
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


def test_the_rates_of_pack_and_check_are_the_measured_ones():
    rows = {row["work"]: row for row in results("pack.csv")}
    rate = {work: float(row["images_per_second"]) for work, row in rows.items()}

    def minutes(work, cores):
        return f"{1_281_167 / rate[work] / cores / 60:.0f}"

    pack, smaller, check = "pack", "pack --short_side 256", "check"
    text = " ".join(PAGE.split())
    assert f"{round(rate[pack], -1):.0f} images a second and core are copied" in text
    assert f"{round(rate[smaller], -1):.0f} with `--short_side 256`: by CPU time" in text
    assert f"would take {minutes(pack, 16)} and {minutes(smaller, 16)} minutes" in text
    alone = f"{pack} without decoding"
    assert f"did {round(rate[alone], -3):,.0f} images a second" in text
    assert f"which is {minutes(alone, 1)} minutes" in text
    assert f"{round(rate[check], -1):.0f} images a second and core, measured as" in text
    alone = f"{check} without decoding"
    assert f"did {round(rate[alone], -3):,.0f}. For ImageNet's" in text
    assert f"{minutes(check, 16)} minutes on 16 cores and {minutes(alone, 1)} minutes" in text
    assert f"{int(rows[pack]['images']):,} JPEGs" in text
    assert f"and {rows[pack]['kB']} kB" in text


@pytest.mark.parametrize("row", results("damage.csv"), ids=lambda row: row["damage"])
def test_the_table_of_damage_is_the_measured_one(row):
    cells = (row["damage"], row["refused"], row["with a warning"], row["not found"])
    assert f"\n| {' | '.join(cells)} |\n" in PAGE
    assert f"| of {row['damaged']} JPEGs, each with |" in PAGE


def test_the_settings_have_the_defaults_of_the_code():
    assert f"at most `--data.window` ({DataConfig().window})" in PAGE
    assert DataConfig().shuffle == "full"
    assert f"{parquet_table._KEPT} row groups or a gigabyte, with a window twice" in PAGE
    assert parquet_table._KEPT_BYTES == 2**30


@pytest.mark.parametrize(
    ("section", "config"),
    [("pack", PackConfig(images="a", shards="b")), ("check", CheckConfig(images="a"))],
)
def test_the_settings_of_shards_have_the_defaults(section, config):
    part = PAGE.partition(f": {section}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `--(\w+)` \| ([^|]*?) +\|", part, re.MULTILINE)
    said = {"the name of the folder `SHARDS`": None, "one for each core": None, "null": None}
    for name, default in rows:
        value = getattr(config, name)
        if name == "quality":
            value = QUALITY
        assert said.get(default, default) == (None if value is None else f"{value}".lower()), name
    own = {field.name for field in fields(config)} - {field.name for field in fields(ReadConfig)}
    told_elsewhere = {"images", "shards", "follow_links", "max_pixels"}
    assert {name for name, _ in rows} | told_elsewhere >= own
    assert len(rows) >= 5
