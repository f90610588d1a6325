"""A saved W&B view and a W&B report on the runs of a project or a sweep.

python -m finetune workspace ENTITY/PROJECT/SWEEP
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from finetune.config.backbones import DEFAULT_MODEL
from finetune.config.field_tables import NUMERIC_FIELDS, fields_with_role, in_order, title
from finetune.system.errors import ConfigError, FinetuneError, MissingPackage
from finetune.system.text import num
from finetune.tracking.from_wandb import client_errors

ACCURACY = "best_val_acc"
CURVES = ("val_acc", "val_loss", "train_acc", "train_loss")
_MAX_RUNS = 100  # drawn in one panel
_WIDTH, _HEIGHT = 24, 8  # of a report, and of its panels, in W&B's units


def workspace(address: str) -> int:
    """Save a view and a report of `address`, ENTITY/PROJECT[/SWEEP]; returns the exit code.

    Each call makes new ones. Raises `ConfigError` for another address or without
    wandb-workspaces, and `FinetuneError` if W&B can't be reached or has no such runs.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", address):
        raise ConfigError(
            f"workspace: got {address!r}; must be ENTITY/PROJECT or ENTITY/PROJECT/SWEEP"
        )
    entity, project, sweep = (*address.split("/"), "")[:3]
    import wandb

    try:
        import wandb_workspaces.reports.v2  # noqa: F401
    except ImportError:
        raise MissingPackage("wandb-workspaces", "workspace", "workspace") from None
    with client_errors(address):
        api = wandb.Api()
        wandb.termsetup(wandb.Settings(silent=True), None)  # the addresses are printed below
        found = api.runs(f"{entity}/{project}", {"sweep": sweep} if sweep else None)
        if hasattr(found, "upgrade_to_full"):
            found.upgrade_to_full()  # else each run's config is a request of its own
        runs = [run for run in found if "strategy" in run.config]
    if not runs:
        raise FinetuneError(f"W&B: {address} has no runs that this program has logged")
    panels = _Panels(runs)
    print(f"{address}: {num(runs, 'run')}; varied: {', '.join(panels.varied) or 'nothing'}")
    for kind, make in {"view": _view, "report": _report}.items():
        made = make(panels, entity, project, sweep)
        with client_errors(address):
            print(f"{kind}: {made.save().url}")
    return 0


def varied_fields(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The strategy and the network if there are several, and the searched fields that differ
    between runs of one strategy and network: what differs by their defaults is left out."""
    groups = defaultdict(list)
    for config in configs:
        groups[config.get("strategy"), config.get("model") or DEFAULT_MODEL].append(config)
    heads = [
        name for i, name in enumerate(("strategy", "model")) if len({g[i] for g in groups}) > 1
    ]
    searched = [name for name in fields_with_role("searched") if name not in ("strategy", "model")]

    def differs(name: str, members: Sequence[Mapping[str, Any]]) -> bool:
        return len({str(config[name]) for config in members if config.get(name) is not None}) > 1

    return heads + [n for n in searched if any(differs(n, members) for members in groups.values())]


class _Panels:
    """The panels on some runs, which the view and the report share."""

    def __init__(self, runs: Sequence[Any]) -> None:
        self.runs = runs
        self.varied = varied_fields([run.config for run in runs])
        self.by = "model" if self.varied[:1] == ["model"] else "strategy"
        """What accuracies and curves are grouped by: strategies, or one strategy's networks."""
        has_seconds = any("train_seconds" in run.summary for run in runs)
        self.seconds = "train_seconds" if has_seconds else "_runtime"  # of older runs

    def sections(self) -> dict[str, list[Any]]:
        """The panels of each section, by its name."""
        return {
            f"Accuracy by {title(self.by)}": self._accuracy(),
            "What varied": self._search(),
            "Curves": self._curves(),
            "Confusion and mistakes": self._mistakes(),
        }

    def _grouped(self) -> dict[str, Any]:
        """A plot's options: the mean and the range of each group of runs."""
        import wandb_workspaces.reports.v2 as wr

        return {
            "groupby": wr.Config(self.by),
            "groupby_aggfunc": "mean",
            "groupby_rangefunc": "minmax",
            "max_runs_to_show": _MAX_RUNS,
        }

    def _accuracy(self) -> list[Any]:
        import wandb_workspaces.reports.v2 as wr

        bars = wr.BarPlot(
            title="Validation accuracy, mean and range",
            metrics=[ACCURACY],
            **self._grouped(),
        )
        frontier = wr.ScatterPlot(
            title="Accuracy and time; the line: the best so far",
            x=wr.SummaryMetric(self.seconds),
            y=wr.SummaryMetric(ACCURACY),
            log_x=True,
            running_ymax=True,
        )
        return [bars, frontier]

    def _search(self) -> list[Any]:
        import wandb_workspaces.reports.v2 as wr

        columns = [
            wr.ParallelCoordinatesPlotColumn(
                wr.Config(name), display_name=title(name), log=True if self._is_log(name) else None
            )
            for name in self.varied
        ]
        last = wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(ACCURACY))
        parallel = wr.ParallelCoordinatesPlot(title="What varied", columns=[*columns, last])
        return [parallel, wr.ParameterImportancePlot(with_respect_to=ACCURACY)]

    def _is_log(self, name: str) -> bool:
        """Whether a field's values are positive numbers over more than a factor of ten."""
        if name not in NUMERIC_FIELDS:
            return False
        values = [float(v) for run in self.runs if (v := run.config.get(name)) is not None]
        return min(values) > 0 and max(values) >= 10 * min(values)

    def _curves(self) -> list[Any]:
        import wandb_workspaces.reports.v2 as wr

        return [
            wr.LinePlot(
                title=metric,
                x="epoch",
                y=[metric],
                **self._grouped(),
            )
            for metric in CURVES
        ]

    def _mistakes(self) -> list[Any]:
        import wandb_workspaces.reports.v2 as wr

        columns = ("Actual", "Predicted", "nPredictions")
        confusion = wr.CustomChart(
            query={"summaryTable": {"tableKey": "confusion_matrix_table"}},
            chart_name="wandb/confusion_matrix/v1",
            chart_fields={name: name for name in columns},
            chart_strings={"title": "Confusion"},
        )
        tables = ("confident_mistakes", "per_class_accuracy")
        return [confusion, *(wr.WeavePanelSummaryTable(table_name=name) for name in tables)]

    def columns(self) -> list[str]:
        """The columns of the table of runs."""
        summary = ("state", ACCURACY, "best_val_macro_f1", self.seconds)
        fields = [f"config:{name}.value" for name in self.varied or ["strategy"]]
        return ["run:displayName", *fields, *(f"summary:{name}" for name in summary)]

    def table(self) -> str:
        """Accuracies by group in Markdown."""
        groups = defaultdict(list)
        for run in self.runs:
            if isinstance(accuracy := run.summary.get(ACCURACY), float | int):
                groups[run.config.get(self.by) or DEFAULT_MODEL].append(accuracy)
        lines = [f"| {title(self.by)} | runs | mean | best |", "| --- | --- | --- | --- |"]
        for name in in_order(self.by, groups):
            found = groups[name]
            lines.append(f"| {name} | {len(found)} | {fmean(found):.1%} | {max(found):.1%} |")
        return "\n".join(lines)


def _view(panels: _Panels, entity: str, project: str, sweep: str) -> Any:
    import wandb_workspaces.expr as we
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Strategies {sweep}".strip(),
        sections=[
            ws.Section(
                name=name,
                panels=made,
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=2, rows=-(-len(made) // 2)),
            )
            for name, made in panels.sections().items()
        ],
        settings=ws.WorkspaceSettings(max_runs=_MAX_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=[we.Metric("Sweep") == sweep] if sweep else [],
            order=[we.Ordering(we.Summary(ACCURACY), ascending=False)],
            pinned_columns=panels.columns(),
        ),
    )


def _report(panels: _Panels, entity: str, project: str, sweep: str) -> Any:
    import wandb_workspaces.expr as we
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [
        wr.MarkdownBlock(
            f"{panels.table()}\n\nThe highest `{ACCURACY}` of each of the runs. "
            "The best of many runs is partly chance: `python -m finetune report --wandb "
            "ENTITY/PROJECT/SWEEP` says which differences are significant."
        )
    ]
    for name, made in panels.sections().items():
        width = _WIDTH // min(len(made), 2)
        for i, panel in enumerate(made):
            panel.layout = wr.Layout(i % 2 * width, i // 2 * _HEIGHT, width, _HEIGHT)
        runset = wr.Runset(
            entity=entity,
            project=project,
            name=sweep or project,
            filters=[we.Metric("Sweep") == sweep] if sweep else [],
            order=[wr.OrderBy(wr.SummaryMetric(ACCURACY), ascending=False)],
        )
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runset], panels=made)]
    return wr.Report(
        entity=entity,
        project=project,
        title=f"Fine-tuning strategies of {sweep or project}",
        blocks=blocks,
        width="fluid",
    )
