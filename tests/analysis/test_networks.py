"""The report on runs of several networks."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.__main__ import main
from finetune.analysis.by_strategy import by_group, varied_fields
from finetune.analysis.comparison import Comparison, compare
from finetune.analysis.importances import field_importances
from finetune.analysis.read_runs import read_runs
from finetune.analysis.report import figures, search_figures
from finetune.analysis.report.traces import colour_of
from finetune.config import backbones
from finetune.config.backbones import BACKBONES
from finetune.config.strategies import STRATEGIES
from tests.analysis.test_report import CLIPPED_TEXTS, EMPTY_FIGURES, WIDE_TABLES
from tests.conftest import ROOT
from tests.support.chromium import Browser
from tests.support.synthetic import NETWORKS, write_failure, write_networks, write_run

SHOWN = (
    """[...document.querySelectorAll('.figure text, p, td, th')].map(place => place.textContent)"""
)


def compared(runs_dir: Path) -> Comparison:
    return compare(read_runs(runs_dir))


def write_confirmed_groups(runs_dir: Path, accuracies: dict[tuple[str, str], float]) -> None:
    for (model, strategy), accuracy in accuracies.items():
        for seed in range(5):
            write_run(runs_dir, f"{model}-{strategy}-{seed}", accuracy + 0.002 * seed, model=model, strategy=strategy, seed=seed)  # noqa: E501  # fmt: skip


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks, four strategies, two learning rates, and fresh seeds of the best."""
    path = tmp_path_factory.mktemp("networks")
    write_networks(path)
    write_failure(path, "f", "failed", "out of memory", model="resnet50", strategy="lp-ft")
    assert not main(["report", str(path)])
    return path


@pytest.fixture(scope="module")
def comparison(runs_dir: Path) -> Comparison:
    return compared(runs_dir)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def test_runs_of_one_network_are_compared_by_strategy_alone(tmp_path: Path) -> None:
    write_confirmed_groups(tmp_path, {("resnet50", "partial"): 0.85, ("resnet50", "freeze"): 0.7})
    comparison = compared(tmp_path)
    assert [str(summary.group) for summary in comparison.summaries] == ["partial", "freeze"]
    assert comparison.headline.startswith("partial wins with 8")
    assert "model" not in comparison.varied


def test_groups_are_ordered_as_the_tables_list_networks_and_strategies(tmp_path: Path) -> None:
    names = list(BACKBONES)[2::-1]
    for model in names:
        for strategy in reversed(STRATEGIES):
            write_run(tmp_path, f"{model}-{strategy}", model=model, strategy=strategy)
    write_run(tmp_path, "a", model="timm:a", parts=("stem", "body", "head"))
    expected = [f"{model} {strategy}" for model in names[::-1] for strategy in STRATEGIES]
    assert [str(group) for group in by_group(read_runs(tmp_path))] == [*expected, "timm:a partial"]


def test_a_network_all_of_whose_runs_failed_still_makes_groups_of_networks(tmp_path: Path) -> None:
    write_run(tmp_path, "a")
    write_failure(tmp_path, "b", "failed", "out of memory", model="resnet50")
    assert compared(tmp_path).headline.startswith("Only resnet18 with partial has finished runs")


def test_the_headline_names_the_best_network_with_its_strategy(tmp_path: Path) -> None:
    accuracies = {("resnet50", "gradual"): 0.9, ("resnet50", "partial"): 0.84}
    accuracies |= {("resnet18", "gradual"): 0.8, ("resnet18", "partial"): 0.78}
    write_confirmed_groups(tmp_path, accuracies)
    headline = compared(tmp_path).headline
    assert headline.startswith("resnet50 with gradual is best: 90.4 %, the mean of 5 fresh seeds; ")
    assert "resnet50 with partial is 6.0 points worse; resnet18 with gradual is 10.0" in headline


@pytest.mark.parametrize(
    ("similar", "opening"),
    [
        (
            ("resnet50 partial", "resnet50 gradual"),
            "resnet50 is best, with no significant difference between partial (90.4 %) and gradual "
            "(90.4 %) over 5 fresh seeds; resnet18 with partial is 20.0 points worse",
        ),
        (
            ("resnet18 gradual", "resnet50 gradual"),
            "gradual is best, with no significant difference between resnet18 (90.4 %) and "
            "resnet50 (90.4 %) over 5 fresh seeds; resnet18 with partial is 20.0 points worse",
        ),
        (
            ("resnet18 partial", "resnet50 gradual"),
            "No significant difference between resnet18 with partial (90.4 %) and resnet50 with "
            "gradual (90.4 %) over 5 fresh seeds; resnet18 with gradual is 20.0 points worse",
        ),
    ],
)
def test_the_headline_says_whether_the_network_or_the_strategy_is_undecided(
    similar: tuple[str, str], opening: str, tmp_path: Path
) -> None:
    pairs = [(model, strategy) for model in NETWORKS for strategy in ("partial", "gradual")]
    accuracies = {pair: 0.9 if " ".join(pair) in similar else 0.7 for pair in pairs}
    write_confirmed_groups(tmp_path, accuracies)
    assert compared(tmp_path).headline.startswith(opening)


def test_many_groups_are_summed_up_in_the_headline(comparison: Comparison) -> None:
    assert len(comparison.summaries) == 8
    assert re.search(r"; resnet18 with partial is 4\.\d points worse", comparison.headline)
    assert re.search(r"; the other 5 are 5\.8 to 46\.8 points worse", comparison.headline)
    assert len(comparison.headline) < 300


def test_of_many_pairs_those_with_the_best_group_are_drawn_and_all_are_in_the_table(
    runs_dir: Path, comparison: Comparison
) -> None:
    assert len(comparison.differences) == 8 * 7 / 2
    assert {d.first for d in comparison.main_differences} == {"resnet50 partial"}
    assert len(comparison.main_differences) == 7
    page = (runs_dir / "report.html").read_text(encoding="utf-8")
    table = page.partition("Differences between networks and strategies")[2].partition("</table>")
    assert table[0].count("<tr><td>") == len(comparison.differences)


def test_without_fresh_seeds_the_advice_asks_for_them_for_networks_and_strategies(
    tmp_path: Path,
) -> None:
    write_networks(tmp_path, num_seeds=0)
    comparison = compared(tmp_path)
    assert comparison.headline.startswith("The best model found is resnet50-partial-lr0.01 at ")
    assert "not the networks and strategies" in comparison.advice
    assert "each network with each strategy's best setting" in comparison.advice


def test_the_terminal_and_the_csv_name_network_and_strategy(
    runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["report", str(runs_dir)])
    shown = capsys.readouterr().out
    assert re.search(r"^network, strategy +accuracy", shown, re.MULTILINE)
    assert re.search(r"^resnet18 freeze +7\S+ % .* resnet18-freeze-lr0.01\b", shown, re.MULTILINE)
    with (runs_dir / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == set(NETWORKS)
    assert list(rows[0])[3:5] == ["model", "strategy"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_two_networks_is_drawn_without_an_error(
    runs_dir: Path, browser: Browser, width: int, scheme: str
) -> None:
    browser.complaints.clear()
    browser.open(runs_dir / "report.html", width, 900, scheme)
    assert browser.complaints == []
    assert browser.run(EMPTY_FIGURES) == []
    assert browser.run(CLIPPED_TEXTS) == []
    assert width < 600 or browser.run(WIDE_TABLES) == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    shown = browser.run(SHOWN)
    assert "The symbol is the network: ●resnet18, ■resnet50." in " ".join(shown)
    assert "57 runs of 2 networks and 5 strategies in" in " ".join(shown)
    assert {"●resnet18 freeze", "■resnet50 lp-ft", "network, strategy"} <= {*shown}


def test_colours_are_strategies_and_symbols_are_networks(comparison: Comparison) -> None:
    _, *points = figures.accuracy_against_time(comparison.compared)["data"]
    drawn = {(one["marker"]["color"], one["marker"]["symbol"]): one for one in points}
    assert len(points) == len(drawn) == 8
    for run in comparison.compared:
        symbol = {"resnet18": "circle", "resnet50": "square"}[run.group.model]
        assert run.name in drawn[colour_of(run.group), symbol]["text"]
    explained = [one["name"] for one in points if one["showlegend"]]
    assert explained == [name for name in STRATEGIES if name in explained]
    assert len(explained) == 4


def test_each_network_has_its_own_panel_of_learning_curves(comparison: Comparison) -> None:
    figure = figures.learning_curves(comparison.summaries)
    names = [note["text"] for note in figure["layout"]["annotations"]]
    assert names == ["<b>resnet18</b>", "<b>resnet50</b>"]
    panels = {"y": "resnet18-", "y2": "resnet50-"}
    for one in figure["data"]:
        assert one["hovertemplate"].startswith(panels[one["yaxis"]]) or one["name"] != "training"
    named = [one["name"] for one in figure["data"] if one["showlegend"]]
    assert sorted(named) == sorted({summary.strategy for summary in comparison.summaries})


def test_the_network_is_an_axis_of_the_search_with_one_line_per_strategy(
    comparison: Comparison,
) -> None:
    assert list(comparison.varied) == ["model", "learning_rate"]
    runs, varied = comparison.compared, comparison.varied
    parallel = search_figures.parallel_coordinates(runs, varied)
    heads = ["network", "strategy", "learning<br>rate", "accuracy"]
    assert parallel["layout"]["xaxis"]["ticktext"] == heads
    lines = search_figures.marginal_means(runs, "model", varied["model"])["data"]
    assert [line["x"] for line in lines] == [[*NETWORKS]] * 4
    lines = search_figures.marginal_means(runs, "learning_rate", [0.001, 0.01])["data"]
    assert [line["line"]["dash"] for line in lines] == ["solid"] * 4 + ["dash"] * 4


def test_the_importances_have_the_network(tmp_path: Path) -> None:
    write_networks(tmp_path, num_seeds=0)
    write_run(tmp_path, "more", 0.8, learning_rate=0.1)  # so that it is no grid
    assert set(field_importances(read_runs(tmp_path))) == {"model", "strategy", "learning_rate"}


def test_every_varied_field_is_in_a_name_and_no_constant_one(tmp_path: Path) -> None:
    for part in ("layer3", "layer2"):
        for decay in (1.0, 0.5):
            write_run(tmp_path, f"{part}{decay}", strategy="partial", unfreeze_from=part, lr_decay=decay, weight_decay=0.01)  # noqa: E501  # fmt: skip
    comparison = compared(tmp_path)
    assert list(comparison.varied) == ["lr_decay", "unfreeze_from"]
    begin, from_layer2 = "partial", "partial-from-layer2"
    assert {run.run_id: run.name for run in comparison.compared} == {
        "layer31.0": f"{begin}, learning rate decay 1, unfreeze from layer3",
        "layer30.5": f"{begin}, learning rate decay 0.5, unfreeze from layer3",
        "layer21.0": f"{from_layer2}, learning rate decay 1",
        "layer20.5": f"{from_layer2}, learning rate decay 0.5",
    }
    _, *points = figures.accuracy_against_time(comparison.compared)["data"]
    assert len({text for one in points for text in one["text"]}) == 4


def test_the_default_part_of_each_network_is_not_a_varied_field(tmp_path: Path) -> None:
    timm_parts = ("stem", "low", "middle", "high", "head")
    write_run(tmp_path, "a", strategy="gradual")
    write_run(tmp_path, "b", strategy="gradual", model="convnext_tiny")
    write_run(tmp_path, "c", strategy="gradual", model="timm:x", parts=timm_parts, unfreeze_from="low")  # noqa: E501  # fmt: skip
    assert list(varied_fields(read_runs(tmp_path))) == ["model"]
    write_run(tmp_path, "d", strategy="gradual", model="timm:x", parts=timm_parts, unfreeze_from="high")  # noqa: E501  # fmt: skip
    assert list(varied_fields(read_runs(tmp_path))) == ["model", "unfreeze_from"]


def test_weights_may_differ_between_networks_but_not_within_one(tmp_path: Path) -> None:
    for model in NETWORKS:
        prints = ("data-0", "split-0", f"{model}'s weights")
        write_run(tmp_path, model, model=model, weights=f"/x/{model}.pth", fingerprints=prints)
    comparison = compared(tmp_path)
    assert comparison.warnings == ()
    assert list(comparison.varied) == ["model"]
    write_run(tmp_path, "odd", model="resnet50", weights="/x/odd.pth", seed=1)
    comparison = compared(tmp_path)
    (warning,) = comparison.warnings
    assert warning.startswith("the runs have different weights of resnet50: ")
    assert list(comparison.varied) == ["model", "weights"]


def test_runs_of_timm_are_reported_without_importing_timm_or_torch(tmp_path: Path) -> None:
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", 0.9, model="timm:of_no_version", parts=("stem", "body", "head"))
    code = (
        "import sys\n"
        "from finetune.__main__ import main\n"
        f"assert not main(['report', {str(tmp_path)!r}])\n"
        "assert not {'timm', 'torch'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^timm:of_no_version partial +90.0 %", done.stdout, re.MULTILINE)


def test_runs_of_a_network_that_is_not_registered_here_are_reported(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(backbones._registered, "elsewhere", BACKBONES["convnext_tiny"])
        write_run(tmp_path, "a", model="elsewhere", strategy="gradual")
    write_run(tmp_path, "b", strategy="gradual")
    runs = read_runs(tmp_path)
    assert [(run.state, str(run.group)) for run in runs] == [
        ("finished", "elsewhere gradual"),
        ("finished", "resnet18 gradual"),
    ]
    assert figures.unfreezings(runs[0]) == {1: ["stage4"], 2: ["stage3"], 3: ["stage2"]}
    assert list(varied_fields(runs)) == ["model"]
