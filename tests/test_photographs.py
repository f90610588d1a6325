"""The benchmark on photographs, with the small network, and the README's tables of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import photographs_cell
from benchmarks.photographs import RESULTS, main, read_cells
from benchmarks.photographs_cell import Approach, draw, packed, schedule, search, unpacked
from benchmarks.photographs_table import by_size, correct, details, differences
from finetune.data.pictures import find_pictures
from tests.conftest import ROOT
from tests.support.picture_trees import tree


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two classes of twelve training and four test pictures, and a broken training picture."""
    for name, content in tree(train=12, val=4).items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "mine" / "train" / "Aves" / "broken.gif").write_bytes(b"not found")
    return tmp_path / "mine"


def test_a_draw_is_contained_in_a_larger_one_and_skips_unreadable_pictures(
    photographs: Path, tmp_path: Path
) -> None:
    names = {}
    for count in (3, 5, None):
        folder, num_train = draw(photographs, count, tmp_path / f"draw{count}")
        drawn = find_pictures(folder / "train")
        assert len(drawn) == num_train == (2 * count if count else 24)
        assert len(find_pictures(folder / "val")) == 8
        names[count] = set(drawn.names)
    assert names[3] < names[5] < names[None]
    assert "Aves/broken.gif" not in names[None]


@pytest.mark.parametrize("num_train", [20, 100, 300, 1000, 3000])
def test_a_run_has_about_the_same_number_of_steps_on_any_size(num_train: int) -> None:
    given = schedule(num_train)
    num_steps = -(-(num_train * 4 // 5) // given["batch_size"]) * given["epochs"]
    least, most = photographs_cell.EPOCHS
    assert least <= given["epochs"] <= most
    assert num_steps >= photographs_cell.NUM_STEPS or given["epochs"] == most


def test_packed_rows_are_unpacked() -> None:
    row = np.random.default_rng(0).random(341) < 0.8
    assert (unpacked(packed(row), 341) == row).all()


@pytest.fixture
def command(
    photographs: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The command line on these pictures; it takes seconds."""
    monkeypatch.setattr(photographs_cell, "NUM_SEEDS", 3)
    monkeypatch.setattr(photographs_cell, "EPOCHS", (1, 1))
    return [
        *("--data_dir", str(photographs), "--model", weights.stem, "--weights", str(weights)),
        *("--image_size", "32", "--runs", str(tmp_path / "runs")),
        *("--out", str(tmp_path / "found.json"), "--workers", "1", "--sizes"),
    ]


@pytest.mark.slow
def test_cells_are_added_and_what_is_known_is_not_computed_again(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    main([*command, "6", "--strategies", "probe"])
    first = read_cells(found)
    main([*command, "6", "all", "--strategies", "probe"])
    cells = read_cells(found)
    assert [(cell["size"], [*cell["strategies"]]) for cell in cells] == [
        ("6", ["probe"]),
        ("all", ["probe"]),
    ]
    assert cells[0] == first[0]
    written = found.read_bytes()
    capsys.readouterr()
    main([*command, "6", "all", "--strategies", "probe"])
    assert found.read_bytes() == written
    shown = capsys.readouterr().out
    assert "a class: probe" not in shown and by_size(cells, "mine", "tiny") in shown
    _check_record(cells[1]["strategies"]["probe"])


def _check_record(record: dict[str, Any]) -> None:
    assert record["num_test"] == 8 and len(set(record["seeds"])) == 3
    assert correct(record).mean() == pytest.approx(record["test_accuracy"])
    low, high = record["test_interval"]
    assert low <= record["test_accuracy"] <= high


@pytest.mark.slow
def test_a_range_of_rates_is_extended_while_the_best_is_at_its_end(
    photographs: Path, weights: Path, tmp_path: Path
) -> None:
    fixed = {
        **{"strategy": "freeze", "model": weights.stem, "weights": weights, "image_size": 32},
        **{"data_dir": photographs, "cache_dir": tmp_path / "cache", "epochs": 1},
        "skip_unreadable": True,
    }
    found = search((0.0003, 0.001), fixed, tmp_path / "runs", workers=1)
    rates = [rate for rate, _ in found]
    assert rates in ([0.0001, 0.0003, 0.001], [0.0003, 0.001, 0.003]) or len(rates) == 4
    again = search((0.0003, 0.001), fixed, tmp_path / "runs", workers=1)
    assert again == found


def test_full_trains_from_the_first_part_and_lp_ft_as_partial() -> None:
    fields = {name: a.fields("resnet18") for name, a in photographs_cell.APPROACHES.items()}
    assert fields["full"] == {"strategy": "partial", "unfreeze_from": "stem"}
    assert fields["lp-ft"] == {"strategy": "lp-ft", "unfreeze_from": "layer3"}
    assert fields["partial"] == Approach("partial").fields("resnet18") == {"strategy": "partial"}


def test_the_tables_of_the_readme_and_the_notes_are_those_of_the_recorded_results() -> None:
    cells = read_cells(RESULTS)
    readme, notes = ((ROOT / name).read_text() for name in ("README.md", "NOTES.md"))
    for data, model in {(cell["data"], cell["model"]) for cell in cells}:
        assert by_size(cells, data, model) in readme
    for cell in cells:
        assert details(cell) in notes


def test_the_figure_of_the_readme_is_a_small_picture() -> None:
    picture = ROOT / "docs" / "photographs.png"
    assert "(docs/photographs.png)" in (ROOT / "README.md").read_text()
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert picture.stat().st_size < 300_000


def test_recorded_intervals_have_their_accuracies_and_differences_all_pairs() -> None:
    for cell in read_cells(RESULTS):
        for record in cell["strategies"].values():
            assert correct(record).mean() == pytest.approx(record["test_accuracy"])
            low, high = record["test_interval"]
            assert low <= record["test_accuracy"] <= high
            assert len(set(record["seeds"])) == len(record["test_accuracies"]) >= 5
        names = len(cell["strategies"])
        assert len(differences(cell)) == names * (names - 1) // 2
