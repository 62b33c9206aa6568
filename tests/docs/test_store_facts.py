"""What docs/shards.md says of stores is what the code does."""

import re

from beit_fast.data.sources.in_flight import MOST_REQUESTS
from beit_fast.data.sources.limits import READS
from beit_fast.data.sources.store_clients import FSSPEC, OBSTORE, request_limit
from pages import ROOT

PAGE = (ROOT / "docs" / "shards.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## Object stores\n")[2].partition("\n## ")[0]


def test_the_table_has_every_scheme_beside_its_client():
    rows = [line.split(" | ") for line in SECTION.splitlines() if "://" in line and "|" in line]
    clients = {"obstore": set(), "fsspec": set()}
    for urls, client, *_ in rows:
        clients[client.split()[0]] |= set(re.findall(r"(\w+)://", urls))
    others = {"s3a", "azure", "abfss", "adl"}  # more names of the same stores
    assert clients["obstore"] == set(OBSTORE) - others
    assert clients["fsspec"] == set(FSSPEC)


def test_limits_and_defaults_are_those_of_the_code():
    words = " ".join(SECTION.split())
    assert f"at most {MOST_REQUESTS} at a time" in words
    assert request_limit(READS) == READS.read_timeout / 4
    assert "a quarter of `--data.read_timeout`" in words
    assert f'| `--data.cache` | `"{READS.cache}"` |' in words
    assert f"| `--data.cache_size` | {READS.cache_size:g} |" in words
