from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from finetune.__main__ import main
from finetune.analysis.comparison import compare
from finetune.analysis.importances import importances
from finetune.analysis.read_runs import read_runs
from finetune.analysis.report import figures
from finetune.analysis.report import search_figures as search
from finetune.system.errors import RunDirError
from tests.support.chromium import Browser
from tests.support.synthetic import write_confirmed, write_failure, write_run, write_sweep

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    runs_dir = tmp_path_factory.mktemp("sweep")
    pictures = sorted((digits / "val").glob("*/*.png"))
    write_sweep(runs_dir, classes=(SCRIPT, "Aves", "Fungi"), pictures=pictures)
    assert not main(["report", str(runs_dir)])
    return runs_dir / "report.html"


@pytest.fixture(scope="module")
def confirmed_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs_dir = tmp_path_factory.mktemp("confirmed")
    write_confirmed(runs_dir, {"partial": 0.85, "gradual": 0.84, "freeze": 0.7})
    assert not main(["report", str(runs_dir)])
    return runs_dir / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


EMPTY_FIGURES = """[...document.querySelectorAll('.figure')].filter(place => {
  const drawn = [...place.querySelectorAll(
    '.scatterlayer path, .barlayer path, .heatmaplayer image, .points path')];
  return !drawn.some(mark => mark.getBoundingClientRect().width > 0);
}).map(place => place.id)"""


CLIPPED_TEXTS = """[...document.querySelectorAll('.figure text')].filter(text => {
  const [mine, whole] = [text, text.closest('svg')].map(node => node.getBoundingClientRect());
  return mine.width && (mine.left < whole.left - 1 || mine.right > whole.right + 1
                        || mine.top < whole.top - 1 || mine.bottom > whole.bottom + 1);
}).map(text => text.textContent)"""

WIDE_TABLES = """[...document.querySelectorAll('.scroll')]
  .filter(place => place.scrollWidth > place.clientWidth).map(place => place.innerText)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("which", "num_figures"), [("sweep", 9), ("confirmed", 5)])
def test_every_figure_is_drawn_without_an_error_or_a_request(
    request: pytest.FixtureRequest,
    browser: Browser,
    which: str,
    num_figures: int,
    width: int,
    scheme: str,
) -> None:
    page = request.getfixturevalue(f"{which}_page")
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(page, width, 900, scheme)
    assert browser.run("document.querySelectorAll('.figure').length") == num_figures
    assert browser.run(EMPTY_FIGURES) == []
    assert browser.run(CLIPPED_TEXTS) == []
    assert width < 600 or browser.run(WIDE_TABLES) == []
    assert browser.complaints == []
    outside = [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert outside == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelector('main').firstElementChild.tagName") == "H1"


def test_a_class_named_as_a_script_is_shown_as_text(browser: Browser, sweep_page: Path) -> None:
    browser.open(sweep_page, 1280, 900)
    assert browser.run(f"document.body.innerText.includes({SCRIPT!r})")
    labels = browser.run("document.querySelector('#confusion').textContent")
    assert SCRIPT in labels
    assert browser.run("document.querySelectorAll('script').length") == 3


def test_a_click_on_a_heading_sorts_the_table(browser: Browser, sweep_page: Path) -> None:
    browser.open(sweep_page, 1280, 900)
    column = "[...document.querySelectorAll('table')][0].querySelectorAll('tbody td:nth-child(2)')"
    click = "document.querySelector('th:nth-child(2) button').click()"
    values = f"[...{column}].map(cell => Number(cell.dataset.value))"
    browser.run(click)
    falling = browser.run(values)
    browser.run(click)
    assert falling == sorted(falling, reverse=True)
    assert browser.run(values) == falling[::-1] != falling


def test_failed_pruned_and_stopped_runs_are_listed_with_their_reasons(sweep_page: Path) -> None:
    text = sweep_page.read_text(encoding="utf-8")
    for reason in ("diverged in epoch 1", "below the median", "stopped by SIGTERM"):
        assert reason in text


def test_the_table_has_a_row_a_run(sweep_page: Path) -> None:
    with (sweep_page.parent / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 * 2 * 2 + 2
    assert {row["state"] for row in rows} == {"finished", "failed", "pruned", "stopped"}
    best = max(rows, key=lambda row: float(row["best_val_acc"] or 0))
    assert (best["strategy"], best["learning_rate"]) == ("partial", "0.01")


def test_the_terminal_has_the_answer_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_confirmed(tmp_path, {"partial": 0.85, "freeze": 0.7})
    capsys.readouterr()
    main(["report", str(tmp_path), "--out", str(tmp_path / "there")])
    shown = capsys.readouterr().out
    assert shown.startswith("partial wins with 8")
    assert "told from luck" in shown
    assert (tmp_path / "there" / "report.html").exists()


def test_a_folder_of_failures_alone_still_gives_a_page(tmp_path: Path) -> None:
    write_failure(tmp_path, "a", "failed", "no weights")
    main(["report", str(tmp_path)])
    assert "No run has ended well" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="holds no run directories"):
        main(["report", str(tmp_path)])


def test_a_folder_that_cannot_be_read_is_an_error(locked: Path) -> None:
    """The comparison would go without its runs in silence."""
    write_run(locked.parent, "there")
    with pytest.raises(RunDirError, match="locked can't be read: Permission denied"):
        main(["report", str(locked.parent)])


def test_unfreezing_is_shown_where_it_happened(tmp_path: Path) -> None:
    write_run(tmp_path, "g", strategy="gradual")
    (run,) = read_runs(tmp_path)
    assert figures.unfreezings(run) == {1: ["layer4"], 2: ["layer3"], 3: ["layer2"]}
    (diamonds,) = figures.learning_curves(compare([run]))["data"][-1:]
    assert diamonds["marker"]["symbol"] == "diamond"
    assert diamonds["x"] == [1, 2, 3]
    assert diamonds["y"] == [100 * run.rows[epoch]["val_acc"] for epoch in (1, 2, 3)]


def test_a_setting_repeated_with_more_seeds_weighs_no_more_in_the_marginal_means(
    tmp_path: Path,
) -> None:
    write_run(tmp_path, "other", 0.6, learning_rate=0.01, batch_size=64)
    for seed in range(5):
        write_run(tmp_path, f"again{seed}", 0.8, learning_rate=0.01, seed=seed)
    figure = search.marginal_means(read_runs(tmp_path), "learning_rate", [0.01])
    assert figure["data"][0]["y"] == pytest.approx([70])


def test_the_numbers_of_a_continuous_search_do_not_stand_on_one_another(tmp_path: Path) -> None:
    for i in range(30):
        write_run(tmp_path, f"r{i}", learning_rate=0.0001 * 1.25**i)
    figure = search.parallel_coordinates(read_runs(tmp_path))
    heights = sorted(note["y"] for note in figure["layout"]["annotations"] if note["x"] == 1)
    assert len(heights) == 5
    assert min(b - a for a, b in pairwise(heights)) > 0.1


def test_classes_whose_long_names_begin_and_end_alike_stay_apart() -> None:
    names = [f"a long name that {middle} another one has too" for middle in "abc"]
    (heat,) = figures.confusion(np.eye(3, dtype=int), names)["data"]
    (bars,) = figures.per_class(np.eye(3, dtype=int), names)["data"]
    assert len(set(heat["x"])) == len(set(heat["y"])) == len(set(bars["y"])) == 3


def test_importances_are_for_searches_that_were_no_grid(tmp_path: Path) -> None:
    write_sweep(tmp_path / "grid")
    grid = read_runs(tmp_path / "grid")
    assert importances([one for one in grid if one.state in ("finished", "failed")]) == {}
    for i in range(24):
        rate = 0.001 * 1.2**i
        write_run(
            tmp_path / "random", f"r{i}", 0.9 - 0.02 * i, learning_rate=rate, batch_size=32 + i % 7
        )
    shares = importances(read_runs(tmp_path / "random"))
    assert next(iter(shares)) == "learning_rate"
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.slow
def test_a_thousand_runs_take_under_ten_seconds_and_fifteen_megabytes(tmp_path: Path) -> None:
    for i in range(1000):
        write_run(
            tmp_path,
            f"run{i:04}",
            0.6 + 0.0002 * i,
            strategy=("freeze", "partial", "gradual", "scratch")[i % 4],
            learning_rate=0.001 * (1 + i % 17),
            num_val=2000,
        )
    started = time.perf_counter()
    main(["report", str(tmp_path)])
    assert time.perf_counter() - started < 10
    assert (tmp_path / "report.html").stat().st_size < 15e6
