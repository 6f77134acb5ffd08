"""The table that a page keeps current."""

import dataclasses
import json

import pytest

from advkit.benchmarks.findings import Finding
from advkit.benchmarks.leaderboard import table, update
from advkit.errors import UsageError
from tests.test_gates import made


@pytest.fixture
def records():
    finding = Finding("zero-gradients", "suspect", "we|ak", "linf(0.5)", "e")
    distances = {"we|ak": [1.0] * 10 + [0.1] * 90, "strong": [1.0] * 60 + [0.1] * 40}
    found = made(distances, radii=(0.5,), findings=[finding])
    found.about["advkit"] = "0.1"
    return found


def test_the_most_robust_model_is_first_and_a_suspect_number_is_marked(records):
    lines = table(records).splitlines()
    assert lines[0] == "| model | clean | linf(0.5) |"
    assert lines[2].startswith("| strong | 100.00 %")
    assert lines[3].startswith("| we\\|ak | 100.00 %")
    assert "60.00 %" in lines[2]
    assert "10.00 %" in lines[3]
    assert "(suspect)" in lines[3]
    assert "(suspect)" not in lines[2]


def test_a_page_is_brought_up_to_date_and_the_rest_stays(records, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Before\n\nwords\n")
    update(page, records)
    once = page.read_text()
    page.write_text(once + "\nafter\n")
    update(page, records)
    assert page.read_text() == once + "\nafter\n"
    assert once.startswith("# Before\n\nwords\n\n<!-- advkit benchmark: ")
    assert once.count("| strong |") == 1
    page.write_text(once.replace("<!-- end of", "<!-- no end of"))
    with pytest.raises(UsageError, match="without"):
        update(page, records)


def test_a_title_does_not_end_its_comment_and_a_page_is_text(records, tmp_path):
    page = tmp_path / "page.md"
    bold = dataclasses.replace(records, title="a --> <script>\nb")
    update(page, bold)
    update(page, bold)
    lines = page.read_text().splitlines()
    assert lines[0] == r"<!-- advkit benchmark: a -\> \<script\> b -->"
    assert page.read_text().count("| strong |") == 1
    page.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not text in UTF-8"):
        update(page, records)


def test_numbers_of_robustbench_are_added_where_norm_and_radius_agree(records, tmp_path):
    info = {"name": "A paper", "architecture": "ResNet-18", "eps": "0.5", "clean_acc": "80.24", "autoattack_acc": "51.06"}
    for folder in ("Linf", "L2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "Doe2020.json").write_text(json.dumps({**info, "external": "49.5"}))
    lines = table(records, [tmp_path / "Linf" / "Doe2020.json", tmp_path / "L2" / "Doe2020.json"]).splitlines()
    assert lines[4] == "| Doe2020 (ResNet-18), as reported by RobustBench | 80.24 % | 49.50 % |"
    assert lines[5].endswith("| 80.24 % |  |")
    for bad in ({}, {**info, "eps": "8/0"}):
        (tmp_path / "L2" / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(UsageError, match="RobustBench"):
            table(records, [tmp_path / "L2" / "bad.json"])
