"""The saved view and the report that `python -m finetune workspace` makes in W&B."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from typing import Any

import pytest

from finetune.config.fields import RunConfig
from finetune.system.errors import ConfigError, MissingPackage
from finetune.tracking.workspace import workspace
from tests.support.wandb_server import ENTITY, Run, View
from tests.tracking.conftest import PROJECT, Place

SWEEP = "sweep1"


def add_run(place: Place, name: str, sweep: str | None = SWEEP, **fields: Any) -> None:
    """Give the server a finished run of these fields."""
    config = RunConfig.from_fields(fields).to_fields()
    run = place.server.runs[name] = Run(name, PROJECT, sweep, state="finished", num_starts=1)
    run.config = {key: {"value": value} for key, value in config.items()}
    run.summary = {"best_val_acc": 0.5 + len(place.server.runs) / 100, "train_seconds": 3.5}


def panels(view: View) -> list[dict[str, Any]]:
    """Each panel, of a saved view or of a report."""

    def inside(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            if "viewType" in value:
                yield value
            for inner in value.values():
                yield from inside(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from inside(inner)

    return list(inside(view.spec))


def of_kind(view: View, kind: str) -> list[dict[str, Any]]:
    return [panel["config"] for panel in panels(view) if panel["viewType"] == kind]


def saved(place: Place, *address: str) -> tuple[View, View]:
    """Call the command; the view and the report that the server has then."""
    before = set(place.server.views)
    code = place.start("-m", "finetune", "workspace", "/".join((ENTITY, PROJECT, *address))).wait(
        60
    )
    assert code == 0
    view, report = (v for name, v in place.server.views.items() if name not in before)
    assert (view.project, view.kind) == (PROJECT, "project-view")
    assert (report.project, report.kind) == (PROJECT, "runs")
    return view, report


def assert_panels(view: View, varied: list[str], group: str = "strategy") -> None:
    (bars,) = of_kind(view, "Bar Chart")
    assert (bars["metrics"], bars["groupBy"]) == (["best_val_acc"], f"{group}.value")
    (frontier,) = of_kind(view, "Scatter Plot")
    assert (frontier["xAxis"], frontier["yAxis"]) == (
        "summary:train_seconds",
        "summary:best_val_acc",
    )
    (parallel,) = of_kind(view, "Parallel Coordinates Plot")
    columns = [column["accessor"] for column in parallel["columns"]]
    assert columns == [*(f"config:{name}.value" for name in varied), "summary:best_val_acc"]
    curves = of_kind(view, "Run History Line Plot")
    assert [c["metrics"] for c in curves] == [
        ["val_acc"],
        ["val_loss"],
        ["train_acc"],
        ["train_loss"],
    ]
    assert {(c["xAxis"], c["groupBy"], c["aggregate"]) for c in curves} == {
        ("epoch", f"{group}.value", True)
    }
    (confusion,) = of_kind(view, "Vega2")
    assert confusion["panelDefId"] == "wandb/confusion_matrix/v1"
    assert "confusion_matrix_table" in json.dumps(confusion)
    tables = json.dumps(of_kind(view, "Weave"))
    assert "confident_mistakes" in tables and "per_class_accuracy" in tables


def assert_panels_name_what_is_logged(place: Place, sweep: str) -> None:
    """Every field and metric of a panel is one that the sweep's finished runs have."""
    runs = place.server.sweep_runs(sweep)
    logged = {f"summary:{key}" for key in set[str]().union(*(run.summary for run in runs))}
    logged |= {f"config:{key}.value" for key in set[str]().union(*(run.config for run in runs))}
    for made in saved(place, sweep):
        (parallel,) = of_kind(made, "Parallel Coordinates Plot")
        (frontier,) = of_kind(made, "Scatter Plot")
        used = {column["accessor"] for column in parallel["columns"]}
        used |= {frontier["xAxis"], frontier["yAxis"]}
        for panel in (*of_kind(made, "Bar Chart"), *of_kind(made, "Run History Line Plot")):
            used |= {f"summary:{name}" for name in panel["metrics"]}
        tables = ("confusion_matrix_table", "confident_mistakes", "per_class_accuracy")
        used |= {f"summary:{name}" for name in tables}
        assert used <= logged


def test_a_sweep_s_view_and_report_show_what_varied(place: Place) -> None:
    for i, strategy in enumerate(["freeze", "gradual"]):  # their default lr_decay differs
        for j, rate in enumerate([0.001, 0.1]):
            add_run(place, f"run{i}{j}", strategy=strategy, learning_rate=rate, epochs=4 + 3 * i)
    add_run(place, "another", sweep="sweep2", strategy="partial", batch_size=8)
    view, report = saved(place, SWEEP)
    for made in (view, report):
        assert_panels(made, ["strategy", "learning_rate"])
        (parallel,) = of_kind(made, "Parallel Coordinates Plot")
        assert [column.get("log") for column in parallel["columns"]] == [None, True, None]
    (shown,) = view.spec["section"]["runSets"]
    assert "config:learning_rate.value" in shown["runFeed"]["columnPinned"]
    grids = [block for block in report.spec["blocks"] if block["type"] == "panel-grid"]
    for runset in (shown, *(grid["metadata"]["runSets"][0] for grid in grids)):
        assert '"sweep"' in json.dumps(runset["filters"]) and SWEEP in json.dumps(runset["filters"])
        assert runset["grouping"] == []  # else the parallel coordinates had a line a group
    table = next(
        block["content"] for block in report.spec["blocks"] if "| strategy |" in str(block)
    )
    assert "| gradual | 2 | 53.5% | 54.0% |" in table
    assert "varied: strategy, learning_rate" in place.output()
    assert f"{ENTITY}/{PROJECT}/reports/" in place.output()


def test_a_project_s_networks_are_compared_if_there_is_one_strategy(place: Place) -> None:
    for model in ("resnet18", "resnet34"):
        add_run(place, model, sweep=None, strategy="freeze", model=model)
    for made in saved(place):
        assert_panels(made, ["model"], "model")


@pytest.mark.parametrize("address", ["", "project", "a/b/c/d", "https://wandb.ai/a/b"])
def test_an_address_must_name_a_project(address: str) -> None:
    with pytest.raises(ConfigError, match="must be ENTITY/PROJECT or ENTITY/PROJECT/SWEEP"):
        workspace(address)


def test_no_runs_are_one_message(place: Place) -> None:
    add_run(place, "another", sweep="sweep2")
    address = f"{ENTITY}/{PROJECT}/{SWEEP}"
    assert place.start("-m", "finetune", "workspace", address).wait(60) == 1
    assert (
        place.output().strip() == f"error: W&B: {address} has no runs that this program has logged"
    )
    assert place.server.views == {}


@pytest.mark.parametrize("refused", ["query Runs", "mutation UpsertView2", "mutation upsertView"])
def test_a_refusal_is_one_message(place: Place, refused: str) -> None:
    add_run(place, "run", strategy="freeze")
    place.server.fail(refused, status=403, times=100)
    assert place.start("-m", "finetune", "workspace", f"{ENTITY}/{PROJECT}").wait(60) == 1
    (message,) = (line for line in place.output().splitlines() if "error" in line)
    assert message.startswith(f"error: W&B: {ENTITY}/{PROJECT}: ")
    assert "Traceback" not in place.output()


def test_without_its_package_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("wandb_workspaces"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingPackage, match=r"pip install wandb-workspaces"):
        workspace(f"{ENTITY}/{PROJECT}")


def test_a_report_on_a_sweep_that_w_and_b_refuses_is_one_message(place: Place) -> None:
    sweep = place.server.add_sweep({"method": "grid", "parameters": {}}, PROJECT).name
    place.server.fail("query Runs", status=403, times=100)
    address, runs = f"{ENTITY}/{PROJECT}/{sweep}", str(place.path / "runs")
    assert place.start("-m", "finetune", "report", runs, "--wandb", address).wait(60) == 1
    assert f"error: W&B: sweep {address}: " in place.output()
    assert "Traceback" not in place.output()
