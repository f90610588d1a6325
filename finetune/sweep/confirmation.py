"""Repeats the best settings with fresh seeds: `python -m finetune confirm RUNS_DIR`.

They are those of each strategy, or of each network with each strategy. The best of many runs
overestimates its setting; runs with fresh seeds don't.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Column, Table

from finetune.config.field_tables import fields_with_role, shown, title
from finetune.config.field_types import fold_of
from finetune.config.fields import NAMED_FIELDS, RunConfig
from finetune.runs.folds import describe_folds
from finetune.runs.result import RunResult
from finetune.runs.settings import (
    Group,
    best_setting,
    groups_of,
    results_by_group,
    results_by_setting,
)
from finetune.sweep.runner import conclude, run_sweep
from finetune.sweep.spec import Sweep
from finetune.sweep.table import open_console
from finetune.sweep.trials import TrialResult
from finetune.system.errors import ConfigError, RunDirError
from finetune.system.text import command_line, message, num

_SEARCHED = fields_with_role("searched")
_SHARED = {*fields_with_role("environment"), "project", "entity"} - {"out", "cache_gb"}
"""Fields that repeats take from the runs; `cache_gb` depends on the free disk space."""

_NO_SETTING_IN_0_1_0 = ("seed", "out", "name", "group", "cache_gb")


def confirm(
    runs_dir: Path,
    num_seeds: int = 5,
    folds: int | None = None,
    workers: int | None = None,
    storage: str | None = None,
) -> int:
    """Repeat each group's best setting and print its accuracies; returns the exit code.

    The runs go to RUNS_DIR/confirm. The same call resumes them; a larger `num_seeds` adds runs.
    With `folds`, each setting has one run per fold of train/ instead, in RUNS_DIR/folds. Raises
    `ConfigError` and what `run_sweep` raises.
    """
    if folds == 1:
        raise ConfigError("folds: got 1; must be an integer >= 2")
    sweep = over_folds(runs_dir, folds) if folds else confirmation(runs_dir, num_seeds)
    console = open_console()
    settings = [*sweep.source["settings"].values()]
    several = len({setting.get("model") for setting in settings}) > 1
    groups = (
        num(settings, "pair of network and strategy", "pairs of network and strategy")
        if several
        else num(settings, "strategy", "strategies")
    )
    repeats = f"{folds} folds" if folds else num(num_seeds, "fresh seed")
    console.print(f"{groups}, {repeats} each: {sweep.out_dir}")
    for line in described(sweep):
        console.print(line, soft_wrap=True)
    outcomes = run_sweep(sweep, workers=workers, storage=storage, console=console)
    code = conclude(outcomes, sweep.metric.name, console)
    console.print(spread_table(outcomes, "folds" if folds else "seeds"))
    if folds:
        for line in describe_folds(_complete_folds(outcomes, folds)):
            console.print(line, soft_wrap=True)
        return code
    words = ("-m", "finetune", "report", runs_dir)
    console.print(f"next: {command_line(*words)}", soft_wrap=True)
    return code


def described(sweep: Sweep) -> list[str]:
    """What is repeated, one line for each group: the fields that are not the run's defaults."""
    lines = []
    for group, setting in sweep.source["settings"].items():
        given = {name: setting[name] for name in ("model", "strategy") if name in setting}
        defaults = RunConfig.from_fields(given).to_fields()
        others = {n: v for n, v in setting.items() if n not in given}
        told = {n: v for n, v in others.items() if defaults[n] not in (v, "auto")}
        always = {n: others[n] for n in NAMED_FIELDS if n in others}
        values = (f"{title(name)} {shown(name, v)}" for name, v in (always | told).items())
        lines.append(f"  {group}: {', '.join(values)}")
    return lines


def confirmation(runs_dir: Path, num_seeds: int, groups: Sequence[str] = ()) -> Sweep:
    """The sweep that repeats the best settings of the runs in `runs_dir`, or of these groups.

    The best settings are those of the report. The runs may come from several machines: fields of
    the environment are kept if the repeated runs agree on them, and else have their defaults.
    `data_dir` and `weights` are paths that exist here, if there are any. A confirmation that was
    started by version 0.1.0 keeps its settings. Raises `ConfigError`.
    """
    results, out_dir = _results(runs_dir), runs_dir / "confirm"
    best, described = _best_of_0_1_0(results)
    if not any(out_dir.glob(f"{_name(described)}*")):  # the database, or runs
        best = _best_runs(results)
        best = {group: runs for group, runs in best.items() if not groups or str(group) in groups}
        described = {str(group): _setting(group, runs) for group, runs in best.items()}
    name = _name(described)
    first_seed = _first_seed(runs_dir, name)
    repeats = [{"seed": (first_seed + i) % 2**32} for i in range(num_seeds)]
    source = {"settings": described, "first_seed": first_seed}
    return _repeated(best, name, repeats, out_dir, source)


def over_folds(runs_dir: Path, num_folds: int) -> Sweep:
    """The sweep that has one run per fold of the best settings of `confirmation`, with one seed."""
    best = _best_runs(_results(runs_dir))
    described = {str(group): _setting(group, runs) for group, runs in best.items()}
    name = _name(described, f"folds{num_folds}")
    seed = _first_seed(runs_dir, name)
    repeats = [{"fold": f"{i}/{num_folds}", "seed": seed} for i in range(1, num_folds + 1)]
    source = {"settings": described, "num_folds": num_folds, "seed": seed}
    return _repeated(best, name, repeats, runs_dir / "folds", source)


def _repeated(
    best: Mapping[Group, Sequence[RunResult]],
    name: str,
    repeats: Sequence[Mapping[str, Any]],
    out_dir: Path,
    source: Mapping[str, Any],
) -> Sweep:
    """Each setting with each of these values; all settings with one before the next."""
    settings = [_setting(group, runs) for group, runs in best.items()]
    return Sweep(
        name=name,
        method="grid",
        dimensions=(),
        fixed=_environment([*chain(*best.values())]) | {"out": str(out_dir)},
        listed=tuple({**s, **repeat} for repeat, s in product(repeats, settings)),
        source=source,
    )


def _complete_folds(outcomes: Iterable[TrialResult], num_folds: int) -> dict[str, list[Path]]:
    """The run directories of the groups of which all folds have finished, in their order."""
    trials = [trial for trial in outcomes if trial.state == "finished"]
    groups = groups_of([{**trial.setting, "strategy": trial.strategy} for trial in trials])
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for trial, group in zip(trials, groups, strict=True):
        found[str(group)][fold_of(str(trial.setting["fold"]))[0]] = trial.run_dir
    complete = {name: paths for name, paths in found.items() if len(paths) == num_folds}
    return {name: [paths[i] for i in sorted(paths)] for name, paths in complete.items()}


def _name(settings: Mapping[str, Any], prefix: str = "confirm") -> str:
    text = json.dumps(settings, sort_keys=True)
    return f"{prefix}-{hashlib.blake2b(text.encode(), digest_size=3).hexdigest()}"


def _first_seed(runs_dir: Path, name: str) -> int:
    """The first seed of this confirmation if it was started before; else a seed above all others.

    Those include the seeds of other confirmations: a seed must be fresh for every setting.
    """
    results = _load(runs_dir.rglob("result.json"))
    mine = [result.seed for result in results if result.config.get("group") == name]
    return min(mine) if mine else max(result.seed for result in results) + 1


def _load(paths: Iterable[Path]) -> list[RunResult]:
    results = []
    for path in sorted(paths):
        try:
            results.append(RunResult.load(path.parent))
        except RunDirError as error:
            print(f"left out: {message(error)}", flush=True)
    return results


def _results(runs_dir: Path) -> list[RunResult]:
    results = _load(runs_dir.glob("*/result.json"))
    if not results:
        raise ConfigError(f"{runs_dir} has no finished runs; pass the --out folder of a sweep")
    splits = {result.split_fingerprint for result in results}
    if len(splits) > 1:
        raise ConfigError(
            f"{runs_dir} has runs on {len(splits)} different splits or data sets, whose accuracies "
            "can't be compared; pass a folder with runs on one"
        )
    return results


def _best_runs(results: Sequence[RunResult]) -> dict[Group, list[RunResult]]:
    """The results of each group's best setting, by group."""
    best = {}
    for group, members in results_by_group(results).items():
        settings = results_by_setting(members)
        best[group] = settings[best_setting(settings)]
    return best


def _best_of_0_1_0(
    results: Iterable[RunResult],
) -> tuple[dict[Group, list[RunResult]], dict[str, Any]]:
    """What version 0.1.0 repeated of each strategy: its runs, and the fields that it stored.

    Its setting had paths and the device too, and equal accuracies were decided by the fields' text.
    """
    groups: dict[tuple[str, str], list[RunResult]] = defaultdict(list)
    for result in results:
        config = {k: v for k, v in result.config.items() if v is not None}
        fields = {k: v for k, v in config.items() if k not in _NO_SETTING_IN_0_1_0}
        groups[result.strategy, json.dumps(fields, sort_keys=True)].append(result)

    def rank(key: tuple[str, str]) -> tuple[float, tuple[str, str]]:
        return -mean(result.best_val_acc for result in groups[key]), key

    # Of each strategy's settings the best one comes last.
    ranked = {strategy: (strategy, text) for strategy, text in sorted(groups, key=rank)[::-1]}
    best = {Group(strategy=name): groups[ranked[name]] for name in sorted(ranked)}
    return best, {strategy: json.loads(text) for strategy, text in ranked.values()}


def _setting(group: Group, runs: Sequence[RunResult]) -> dict[str, Any]:
    """The searched fields of runs with the same setting."""
    config = runs[0].config | ({"model": group.model} if group.model else {})
    setting = {name: config[name] for name in _SEARCHED if config.get(name) is not None}
    if "weights" in setting and setting["weights"] != "imagenet":
        setting["weights"] = _existing(run.config["weights"] for run in runs)
    return setting


def _environment(runs: Sequence[RunResult]) -> dict[str, Any]:
    """The fields of the environment on which the runs agree, and a `data_dir`."""
    config = runs[0].config
    names = [n for n in config if all(run.config.get(n) == config[n] for run in runs)]
    agreed = {name: config[name] for name in names if name in _SHARED}
    # All runs have the same split fingerprint, so their data is the same too.
    return {**agreed, "data_dir": _existing(run.config["data_dir"] for run in runs)}


def _existing(paths: Iterable[str]) -> str:
    """The first path that exists on this machine, or else the first one."""
    candidates = list(paths)
    return next((path for path in candidates if Path(path).exists()), candidates[0])


def spread_table(outcomes: Iterable[TrialResult], repeats: str = "seeds") -> Table:
    """Each group's best_val_acc and mean macro F1 over its repeats, the best mean first."""
    all_trials = list(outcomes)
    groups = groups_of([{**trial.setting, "strategy": trial.strategy} for trial in all_trials])
    found: dict[Group, list[float]] = defaultdict(list)
    scores: dict[Group, list[float]] = defaultdict(list)
    for outcome, group in zip(all_trials, groups, strict=True):
        if outcome.state == "finished" and outcome.best_val_acc is not None:
            found[group].append(outcome.best_val_acc)
            if outcome.best_val_macro_f1 is not None:
                scores[group].append(outcome.best_val_macro_f1)
    headings = (repeats, "mean", "standard deviation", "lowest", "highest", "macro F1")
    columns = [Column(heading, justify="right") for heading in headings]
    title = "network, strategy" if any(group.model for group in groups) else "strategy"
    table = Table(title, *columns, box=None, pad_edge=False)
    for group, values in sorted(found.items(), key=lambda item: -mean(item[1])):
        spread = f"{stdev(values):.4f}" if len(values) > 1 else "-"
        low, middle, high = (f"{n:.4f}" for n in (min(values), mean(values), max(values)))
        macro_f1 = f"{mean(scores[group]):.4f}" if scores[group] else "-"
        table.add_row(str(group), str(len(values)), middle, spread, low, high, macro_f1)
    return table
