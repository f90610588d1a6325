from __future__ import annotations

import csv
import html
import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.__main__ import main
from finetune.analysis.by_strategy import varied_fields
from finetune.analysis.comparison import compare
from finetune.analysis.importances import field_importances
from finetune.analysis.read_runs import RunRecord, read_runs
from finetune.analysis.report import figures, run_tables, search_figures
from finetune.runs.run_dir import RunDir
from finetune.system.errors import RunDirError
from tests.support.chromium import Browser
from tests.support.synthetic import (
    write_confirmed,
    write_failure,
    write_predictions,
    write_pruned,
    write_run,
    write_sweep,
)

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
@pytest.mark.parametrize(("which", "num_figures"), [("sweep", 10), ("confirmed", 6)])
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
    assert browser.run("document.querySelectorAll('script').length") == 2


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


def test_the_page_begins_with_a_sentence_the_accuracies_and_the_next_command(
    browser: Browser, confirmed_page: Path
) -> None:
    browser.open(confirmed_page, 1280, 900)
    begin = "[...document.querySelectorAll('main > *')].slice(0, 5).map(part => part.innerText)"
    title, headline, _, first, tiles = browser.run(begin)
    assert re.fullmatch(r"partial leads with 8\d\.\d %; only freeze is clearly worse", title)
    assert headline.startswith("No significant difference between partial")
    assert first.startswith("Accuracy by strategy")
    runs_dir = confirmed_page.parent
    assert f"python -m finetune evaluate {runs_dir}" in tiles.replace("\n", "")
    points = "JSON.parse(document.querySelector('#accuracies').dataset.figure).data"
    assert browser.run(f"{points}.map(trace => trace.x.length)") == [1, 5] * 3


def test_the_test_accuracy_of_the_winner_is_in_a_tile(tmp_path: Path) -> None:
    write_run(tmp_path, "a b", 0.8)
    record = {"folder": "/data/val", "accuracy": 0.765, "num_pictures": 200}
    RunDir(tmp_path / "a b").write_evaluations([record])
    assert not main(["report", str(tmp_path)])
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "<b>76.5 %</b><span>test accuracy of the winner, on 200 pictures of val/" in page
    assert f"<code>python -m finetune predict '{tmp_path / 'a b'}' PICTURES</code>" in page


def test_all_runs_can_be_filtered_and_link_to_their_directories(
    browser: Browser, sweep_page: Path
) -> None:
    browser.open(sweep_page, 1280, 900)
    rows = "[...document.querySelectorAll('.filter ~ .scroll tbody')].filter(b => !b.hidden)"
    assert browser.run(f"{rows}.length") == 4 * 3 * 2 * 2 + 2
    typed = "const field = document.querySelector('.filter'); field.value = 'gradual STOPPED'; "
    browser.run(f"{typed} field.dispatchEvent(new Event('input'))")
    assert browser.run(f"{rows}.map(b => b.rows[0].cells[0].innerText)") == ["stopped1"]
    links = [*re.findall(r'<a href="([^"]+)"><code>', sweep_page.read_text(encoding="utf-8"))]
    assert all((sweep_page.parent / link / "config.yaml").exists() for link in links)


def test_failed_pruned_and_stopped_runs_are_listed_with_their_reasons(sweep_page: Path) -> None:
    text = sweep_page.read_text(encoding="utf-8")
    for reason in ("diverged in epoch 1", "below the median", "stopped by SIGTERM"):
        assert reason in text


def test_the_report_ends_with_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        write_run(tmp_path / "searched", f"r{i}", 0.8, learning_rate=0.01 * (i + 1))
    write_confirmed(tmp_path / "confirmed", {"partial": 0.85, "freeze": 0.7})
    expected = {"searched": "confirm ", "confirmed": f"evaluate {tmp_path / 'confirmed'}/"}
    for name, command in expected.items():
        assert not main(["report", str(tmp_path / name)])
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(f"next: python -m finetune {command}") and str(tmp_path) in last


def test_the_csv_has_one_row_per_run(sweep_page: Path) -> None:
    with (sweep_page.parent / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 * 2 * 2 + 2
    assert {row["state"] for row in rows} == {"finished", "failed", "pruned", "stopped"}
    best = max(rows, key=lambda row: float(row["best_val_acc"] or 0))
    assert (best["strategy"], best["learning_rate"]) == ("partial", "0.01")
    assert 0 < float(best["best_val_macro_f1"]) < 1


def test_the_terminal_summary_starts_with_the_conclusion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_confirmed(tmp_path, {"partial": 0.85, "freeze": 0.7})
    capsys.readouterr()
    main(["report", str(tmp_path), "--out", str(tmp_path / "there")])
    shown = capsys.readouterr().out
    assert shown.startswith("partial wins with 8")
    assert "  significant" in shown
    runs = [run for run in read_runs(tmp_path) if run.strategy == "partial"]
    summary = f"{100 * np.mean([run.macro_f1 for run in runs]):.1f} %"
    assert re.search(rf"^partial +8\S+ % +{summary} ", shown, re.MULTILINE)
    page = (tmp_path / "there" / "report.html").read_text(encoding="utf-8")
    tables = re.findall(r"<h2>([^<]*)</h2>(?:(?!</section>).)*<button>macro F1</button>", page)
    assert tables == ["Strategies", "All runs"]
    assert summary in page
    assert (tmp_path / "there" / "report.html").exists()


def test_a_folder_of_failures_alone_still_gives_a_page(tmp_path: Path) -> None:
    write_failure(tmp_path, "a", "failed", "no weights")
    main(["report", str(tmp_path)])
    assert "No run that can be compared has finished" in (tmp_path / "report.html").read_text(
        encoding="utf-8"
    )


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="holds no run directories"):
        main(["report", str(tmp_path)])


def test_trials_that_failed_before_their_first_epoch_are_named(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "output.log").write_text("error: no weights")
    said = "2 trials failed before the first epoch; the reason is in .*runs/a/output.log"
    with pytest.raises(RunDirError, match=said):
        main(["report", str(tmp_path / "runs")])


def test_a_folder_that_cannot_be_read_is_an_error(locked: Path) -> None:
    write_run(locked.parent, "there")
    with pytest.raises(RunDirError, match="locked can't be read: Permission denied"):
        main(["report", str(locked.parent)])


def test_runs_of_version_0_1_0_are_reported_next_to_an_unreadable_one(tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    shutil.copytree(Path(__file__).parents[1] / "old_formats/v0_1_0/runs", runs_dir)
    shutil.copytree(runs_dir / "freeze", runs_dir / "newer")
    result = json.loads((runs_dir / "newer" / "result.json").read_bytes())
    result["config"]["strategy"] = "of a newer version"
    (runs_dir / "newer" / "result.json").write_text(json.dumps(result))
    assert not main(["report", str(runs_dir)])
    with (runs_dir / "runs.csv").open(newline="") as file:
        rows = {row["run_id"]: row for row in csv.DictReader(file)}
    states = {run_id: row["state"] for run_id, row in rows.items()}
    assert 0 < float(rows["gradual"]["best_val_macro_f1"]) < 1  # from its predictions
    finished = dict.fromkeys(("freeze", "gradual", "whole"), "finished")
    assert states == {**finished, "interrupted": "stopped", "newer": "unreadable"}
    gradual = next(run for run in read_runs(runs_dir) if run.run_id == "gradual")
    assert figures.unfreezings(gradual)


def test_only_searched_fields_that_differ_have_a_column(tmp_path: Path) -> None:
    write_run(tmp_path, "a", weight_decay=0.01)
    write_run(tmp_path, "b", weight_decay=0.1)
    write_run(tmp_path, "c", strategy="gradual", weight_decay=0.1)  # other unfreezing defaults
    heads = [column.head for column in run_tables.field_columns(read_runs(tmp_path))]
    assert heads == ["weight decay"]


def test_a_diamond_marks_each_unfreezing(tmp_path: Path) -> None:
    write_run(tmp_path, "g", strategy="gradual")
    (run,) = read_runs(tmp_path)
    assert figures.unfreezings(run) == {1: ["layer4"], 2: ["layer3"], 3: ["layer2"]}
    (diamonds,) = figures.learning_curves(compare([run]).summaries)["data"][-1:]
    assert diamonds["marker"]["symbol"] == "diamond"
    assert diamonds["x"] == [1, 2, 3]
    assert diamonds["y"] == [100 * run.rows[epoch]["val_acc"] for epoch in (1, 2, 3)]


def test_repeated_seeds_give_a_setting_no_more_weight_in_marginal_means(
    tmp_path: Path,
) -> None:
    write_run(tmp_path, "other", 0.6, learning_rate=0.01, batch_size=64)
    for seed in range(5):
        write_run(tmp_path, f"again{seed}", 0.8, learning_rate=0.01, seed=seed)
    figure = search_figures.marginal_means(read_runs(tmp_path), "learning_rate", [0.01])
    assert figure["data"][0]["y"] == pytest.approx([70])


def test_the_ticks_of_a_continuous_field_do_not_overlap(tmp_path: Path) -> None:
    for i in range(30):
        write_run(tmp_path, f"r{i}", learning_rate=0.0001 * 1.25**i)
    runs = read_runs(tmp_path)
    figure = search_figures.parallel_coordinates(runs, varied_fields(runs))
    heights = sorted(note["y"] for note in figure["layout"]["annotations"] if note["x"] == 0)
    assert len(heights) == 5
    assert min(b - a for a, b in pairwise(heights)) > 0.1


def test_shortened_class_names_stay_unique() -> None:
    names = [f"a long name that {middle} another one has too" for middle in "abc"]
    (heat,) = figures.confusion(np.eye(3, dtype=int), names)["data"]
    (bars,) = figures.accuracy_per_class(np.eye(3, dtype=int), names)["data"]
    assert len(set(heat["x"])) == len(set(heat["y"])) == len(set(bars["y"])) == 3


def test_more_than_100_classes_are_shown_as_tables_of_pairs_and_accuracies(
    browser: Browser, tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path, "r", classes=[f"class {i}" for i in range(120)])
    counts = {(i, i): 3 for i in range(1, 120)} | {(i, i - 1): 2 for i in range(1, 120)}
    counts |= {(i, i - 2): 1 for i in range(2, 120)} | {(7, 6): 4}
    write_predictions(run_dir, counts, 120)
    assert not main(["report", str(tmp_path)])
    browser.complaints.clear()
    browser.open(tmp_path / "report.html", 1280, 900)
    assert browser.complaints == []
    assert browser.run(EMPTY_FIGURES) == []
    assert browser.run("document.querySelectorAll('#confusion, #classes').length") == 0
    text = browser.run("document.body.innerText")
    assert "The 200 most frequent of 237 pairs" in text
    assert "mean over 119 of 120 classes" in text
    rows = """[...document.querySelectorAll('.columns table')].map(
      table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText)))"""
    pairs, classes = browser.run(rows)
    assert pairs[:3] == [
        ["label", "prediction", "count"],
        ["class 7", "class 6", "4"],
        ["class 1", "class 0", "2"],
    ]
    assert len(pairs) == 1 + 200
    assert len(classes) == 1 + 120
    assert classes[1] == ["class 7", "37.5 %", "8"]
    assert classes[-1] == ["class 0", "–", "0"]


def test_a_class_without_pictures_is_shown_without_an_accuracy(
    browser: Browser, tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path, "r", classes=("a", "b", "c"))
    write_predictions(run_dir, {(0, 0): 3, (0, 1): 1, (2, 2): 1, (2, 1): 3}, 3)
    assert not main(["report", str(tmp_path)])
    browser.open(tmp_path / "report.html", 1280, 900)
    assert "50.0 %, mean over 2 of 3 classes." in browser.run("document.body.innerText")
    figure = browser.run("document.querySelector('#classes').textContent")
    for shown in ("b (no pictures)", "25 % of 4", "75 % of 4"):
        assert shown in figure


def test_importances_are_shown_only_if_the_search_was_not_a_grid(tmp_path: Path) -> None:
    write_sweep(tmp_path / "grid")
    grid = read_runs(tmp_path / "grid")
    assert field_importances([one for one in grid if one.state in ("finished", "failed")]) == {}
    for i in range(24):
        rate = 0.001 * 1.2**i
        write_run(
            tmp_path / "random", f"r{i}", 0.9 - 0.02 * i, learning_rate=rate, batch_size=32 + i % 7
        )
    shares = field_importances(read_runs(tmp_path / "random"))
    assert next(iter(shares)) == "learning_rate"
    assert sum(shares.values()) == pytest.approx(1)
    write_failure(tmp_path / "random", "f", "failed", "no memory", learning_rate=1e4, mixup=5)
    assert field_importances(read_runs(tmp_path / "random")) == shares


def test_an_ablation_of_one_strategy_shows_what_varied(browser: Browser, tmp_path: Path) -> None:
    for rate, size, aug in product((0.01, 0.1), (32, 64), "yn"):
        fields = {"learning_rate": rate, "batch_size": size, "data_aug": aug}
        write_run(tmp_path, f"r{rate}{size}{aug}", 0.8 - rate, strategy="partial", **fields)
    assert not main(["report", str(tmp_path)])
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    for rate, size, aug in product(("0.01", "0.1"), (32, 64), ("flip", "none")):
        setting = f"{size} / {aug} / {rate}"
        assert page.count(setting) >= 2, "in a table and in a plot"
    assert "<button>setting: batch size / augmentation / learning rate</button>" in page
    browser.open(tmp_path / "report.html", 1400, 900)
    heights = browser.run(
        "[...document.querySelectorAll('.tile b:not(:has(code))')].map(b => b.offsetHeight)"
    )
    assert max(heights) < 45, "a long name fits into its tile"
    for name in ("learning_rate", "batch_size", "data_aug"):
        assert f'id="marginal-{name}"' in page
    figure = search_figures.parallel_coordinates(*_search_of(tmp_path))
    titles = ["batch<br>size", "augmentation", "learning<br>rate", "accuracy"]
    assert figure["layout"]["xaxis"]["ticktext"] == titles  # without the strategy
    for width in (390, 1280):
        browser.open(tmp_path / "report.html", width, 900)
        assert browser.run(EMPTY_FIGURES) == []
        assert browser.run(CLIPPED_TEXTS) == []
        assert browser.run("document.documentElement.scrollWidth") <= width


def _search_of(runs_dir: Path) -> tuple[list[RunRecord], dict[str, list[Any]]]:
    runs = read_runs(runs_dir)
    return runs, varied_fields(runs)


def test_pruned_runs_are_drawn_as_pruned_and_listed_with_their_accuracy(tmp_path: Path) -> None:
    for i, rate in enumerate((0.1, 0.01, 0.001)):
        write_run(tmp_path, f"r{i}", 0.8, learning_rate=rate)
    write_pruned(tmp_path, "p", 0.6, learning_rate=0.0001)
    comparison = compare(read_runs(tmp_path))
    assert [run.run_id for run in comparison.pruned] == ["p"]
    *_, points = figures.accuracy_against_time(comparison.compared, comparison.pruned)["data"]
    assert points["marker"]["symbol"] == "circle-open"
    assert points["y"] == [pytest.approx(60)]
    assert "pruned" in points["text"][0]
    arguments = comparison.compared, comparison.varied, comparison.pruned
    *_, line = search_figures.parallel_coordinates(*arguments)["data"]
    assert line["line"]["dash"] == "dot"
