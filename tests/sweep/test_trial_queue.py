"""Trials in Optuna's storages are claimed once, finished once, and requeued when interrupted."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution

from finetune.sweep.spec import Sweep, cell_key
from finetune.sweep.storage import has_ended, open_storage, this_process
from finetune.sweep.sweep_file import read_sweep
from finetune.sweep.trial_queue import MAX_CRASHES, Claim, TrialQueue
from finetune.sweep.trials import enqueue_copy
from finetune.system.errors import ConfigError, FinetuneError, MissingPackage
from tests.support.process_server import fast_python

ROOT = Path(__file__).parents[2]
METRIC = {"name": "best_val_acc", "goal": "maximize"}
ELSEWHERE = {"machine": "elsewhere/boot/pid", "pid": 1, "started": "1"}


def grid(cells: int = 6, **changed: Any) -> Sweep:
    content = {"name": "grid", "method": "grid", "metric": METRIC}
    content["parameters"] = {"seed": {"values": list(range(cells))}}
    return read_sweep(content | changed)


def drawn(method: str, **changed: Any) -> Sweep:
    parameters = {
        "learning_rate": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1.0},
        "momentum": {"min": 0.0, "max": 0.95},
        "data_aug": {"values": ["y", "n"]},
    }
    content = {"name": "drawn", "method": method, "metric": METRIC, "parameters": parameters}
    return read_sweep(content | changed)


def score(values: dict[str, Any]) -> float:
    """A known function with one peak, at 1e-2, 0.7 and n."""
    off = (math.log10(values["learning_rate"]) + 2) ** 2 / 4 + (values["momentum"] - 0.7) ** 2
    return 1 - off - 0.1 * (values["data_aug"] == "y")


def work_off(trial_queue: TrialQueue, limit: int = 10_000) -> list[Claim]:
    done = []
    while len(done) < limit and (claim := trial_queue.claim()):
        value = score(claim.values) if "momentum" in claim.values else 0.5
        assert trial_queue.finish(claim, "finished", value, {})
        done.append(claim)
    return done


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'sweep.db'}"


@pytest.fixture(params=["sqlite", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "journal":
        return f"journal:{tmp_path / 'sweep.journal'}"
    return f"sqlite:///{tmp_path / 'sweep.db'}"


def trials(where: str, name: str = "grid") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=open_storage(where)).get_trials()


def states(where: str, name: str = "grid") -> Counter[str]:
    return Counter(trial.state.name for trial in trials(where, name))


# one process


def test_each_cell_has_one_trial_and_one_result(storage: str) -> None:
    trial_queue = TrialQueue(grid(), storage, 6)
    claims = work_off(trial_queue)
    assert [claim.values for claim in claims] == [{"seed": i} for i in range(6)]
    assert len({claim.run_id for claim in claims}) == 6
    assert trial_queue.is_complete() and states(storage) == {"COMPLETE": 6}
    assert work_off(TrialQueue(grid(), storage, 6)) == []


def test_a_requeued_trial_keeps_its_run_id(storage: str) -> None:
    trial_queue = TrialQueue(grid(2), storage, 2)
    first = trial_queue.claim()
    assert first is not None and trial_queue.requeue(first)
    again = work_off(trial_queue)
    assert sorted(claim.run_id for claim in again) == sorted({c.run_id for c in again})
    assert first.run_id in {claim.run_id for claim in again}
    assert states(storage) == {"COMPLETE": 2, "FAIL": 1}


def test_failed_trials_wait_for_retry_failed(storage: str) -> None:
    trial_queue = TrialQueue(grid(2), storage, 2)
    claim = trial_queue.claim()
    assert claim is not None
    trial_queue.finish(claim, "failed", None, {"reason": "no"})
    work_off(trial_queue)
    assert trial_queue.is_complete()
    assert sorted(s.state for s in trial_queue.results()) == ["failed", "finished"]
    later = TrialQueue(grid(2), storage, 2)
    assert later.claim() is None
    assert later.retry_failed() == 1
    assert [c.run_id for c in work_off(later)] == [claim.run_id]
    assert later.retry_failed() == 0


def test_a_trial_whose_worker_keeps_crashing_is_not_requeued_forever(storage: str) -> None:
    trial_queue = TrialQueue(grid(1), storage, 1)
    for _ in range(MAX_CRASHES - 1):
        claim = trial_queue.claim()
        assert claim is not None and trial_queue.requeue(claim, crashed=True)
    claim = trial_queue.claim()
    assert claim is not None and not trial_queue.requeue(claim, crashed=True)


def test_a_late_result_is_discarded(storage: str) -> None:
    late = TrialQueue(grid(1), storage, 1, ELSEWHERE)
    slow = late.claim()
    assert slow is not None
    trial_queue = TrialQueue(grid(1), storage, 1)
    trial_queue._fail_and_copy(_trial(storage, slow))
    quick = work_off(trial_queue)
    assert [c.run_id for c in quick] == [slow.run_id]
    assert late.finish(slow, "finished", 0.9, {}) is False
    assert any(name.startswith("discarded-") for name in late._study.user_attrs)
    assert states(storage) == {"COMPLETE": 1, "FAIL": 1}
    assert [s.value for s in trial_queue.results()] == [0.5]


def _trial(where: str, claim: Claim) -> optuna.trial.FrozenTrial:
    return next(t for t in trials(where) if t._trial_id == claim.trial_id)


def test_of_two_copies_of_a_trial_only_one_runs(storage: str) -> None:
    trial_queue = TrialQueue(grid(1), storage, 1)
    claim = trial_queue.claim()
    assert claim is not None
    trial = _trial(storage, claim)
    trial_queue.requeue(claim)
    enqueue_copy(trial_queue._study, trial)  # as a second process might at the same time
    assert len(work_off(trial_queue)) == 1
    assert trial_queue.is_complete()
    assert states(storage) == {"COMPLETE": 1, "FAIL": 1, "WAITING": 1}


@pytest.mark.parametrize("place", ["before it", "after it"])
def test_a_duplicate_of_a_finished_trial_is_neither_claimed_nor_open(
    place: str, storage: str
) -> None:
    trial_queue = TrialQueue(grid(1), storage, 1)
    study = trial_queue._study
    study.add_trial(trials(storage)[0])  # as a second process might at the same time
    early = TrialQueue(grid(1), storage, 1)  # sees two waiting trials
    ids = [trial._trial_id for trial in trials(storage)]
    done = ids[place == "before it"]
    study._storage.set_trial_state_values(done, optuna.trial.TrialState.RUNNING)
    study._storage.set_trial_state_values(done, optuna.trial.TrialState.COMPLETE, [0.5])
    for each in (early, trial_queue, TrialQueue(grid(1), storage, 1)):
        each.refresh()
        assert each.claim() is None
        assert each.is_complete()
        assert [(r.state, r.value) for r in each.results()] == [("finished", 0.5)]
        assert each.retry_failed() == 0
    assert states(storage) == {"COMPLETE": 1, "WAITING": 1}


def test_another_sweep_of_the_same_name_is_refused(storage: str) -> None:
    trial_queue = TrialQueue(grid(2), storage, 2)
    claim = trial_queue.claim()
    other = r"with other parameters \(seed\); pass another --name"
    with pytest.raises(ConfigError, match=other):  # a trial is running
        TrialQueue(grid(3), storage, 3)
    assert claim and trial_queue.finish(claim, "finished", 0.5, {})
    with pytest.raises(ConfigError, match=other):
        TrialQueue(grid(3), storage, 3)


def test_a_sweep_may_change_until_a_trial_has_finished(storage: str) -> None:
    first = TrialQueue(grid(2), storage, 2)
    claim = first.claim()
    assert claim and first.finish(claim, "failed", None, {"reason": "no data"})
    assert len(work_off(TrialQueue(grid(3), storage, 3))) == 3


def test_a_larger_max_runs_continues_where_the_smaller_ended(storage: str) -> None:
    assert len(work_off(TrialQueue(grid(), storage, 2))) == 2
    assert [c.values["seed"] for c in work_off(TrialQueue(grid(), storage, 6))] == [2, 3, 4, 5]
    assert work_off(TrialQueue(grid(), storage, 3)) == []


def test_a_target_that_is_reached_ends_the_sweep(sqlite: str) -> None:
    trial_queue = TrialQueue(grid(metric={**METRIC, "target": 0.5}), sqlite, 6)
    assert len(work_off(trial_queue)) == 1
    assert trial_queue.claim() is None
    assert trial_queue.is_complete()


# a grid's cells


def two_by_two(*names: str) -> Sweep:
    """A grid of four cells, with its parameters in this order."""
    values = {"strategy": ["freeze", "partial"], "learning_rate": [0.01, 0.001]}
    parameters = {name: {"values": values[name]} for name in names}
    return read_sweep({"name": "small", "method": "grid", "parameters": parameters})


ORDERS = (("strategy", "learning_rate"), ("learning_rate", "strategy"))
FOUR_CELLS = {(s, r) for s in ("freeze", "partial") for r in (0.01, 0.001)}


def cells_of(claims: list[Claim]) -> list[tuple[Any, Any]]:
    return [(claim.values["strategy"], claim.values["learning_rate"]) for claim in claims]


@pytest.mark.parametrize("caps", [(4, 4), (2, 4), (2, 3, 4)])
def test_each_cell_runs_once_though_the_file_s_lines_are_swapped(
    caps: tuple[int, ...], storage: str
) -> None:
    claims: list[Claim] = []
    for i, cap in enumerate(caps):
        trial_queue = TrialQueue(two_by_two(*ORDERS[i % 2]), storage, cap)
        claims += work_off(trial_queue, 2 if i == 0 else cap)
        assert len(claims) == (2 if i == 0 else cap)
    assert len(claims) == 4 and set(cells_of(claims)) == FOUR_CELLS
    assert len({claim.run_id for claim in claims}) == 4
    results = {r.run_id: (r.strategy, r.setting) for r in trial_queue.results()}
    for claim, (strategy, rate) in zip(claims, cells_of(claims), strict=True):
        assert results[claim.run_id] == (strategy, {"learning_rate": rate})


def test_a_cell_that_is_enqueued_twice_runs_once(storage: str) -> None:
    trial_queue = TrialQueue(two_by_two(*ORDERS[0]), storage, 2)
    study = trial_queue._study
    study.set_user_attr("num_enqueued", 0)
    for trial in study.get_trials():  # as a second process might at the same time
        study.add_trial(trial)
    swapped = TrialQueue(two_by_two(*ORDERS[1]), storage, 4)
    assert sorted(cells_of(work_off(swapped))) == sorted(FOUR_CELLS)
    assert swapped.is_complete()


def write_old_study(where: str, sweep: Sweep, num_done: int, num_enqueued: int) -> list[str]:
    """A study as version 0.1.0 wrote it; the run ids of its trials."""
    study = optuna.create_study(
        storage=open_storage(where), study_name=sweep.name, direction="maximize"
    )
    source = json.dumps(sweep.source, sort_keys=True, default=str)
    study.set_user_attr("sweep", {"token": "af8537", "source": source, "owner": ELSEWHERE})
    distributions = {d.name: CategoricalDistribution(d.steps or ()) for d in sweep.dimensions}
    for i, cell in enumerate(islice(sweep.cells(), num_enqueued)):
        attributes = {"key": f"cell-{i}"}
        done = optuna.trial.TrialState.COMPLETE if i < num_done else optuna.trial.TrialState.WAITING
        study.add_trial(
            optuna.trial.create_trial(
                state=done,
                value=0.5 if i < num_done else None,
                params=cell if distributions else {},
                distributions=distributions,
                user_attrs=attributes,
            )
        )
    study.set_user_attr("num_enqueued", num_enqueued)
    return [f"{sweep.name}-af8537-{i:03d}" for i in range(num_enqueued)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_enqueued", [2, 4])
def test_a_grid_of_version_0_1_0_is_completed_and_nothing_runs_twice(
    num_enqueued: int, order: tuple[str, ...], storage: str
) -> None:
    old = two_by_two(*ORDERS[0])
    old_ids = write_old_study(storage, old, 2, num_enqueued)
    trial_queue = TrialQueue(two_by_two(*order), storage, 4)
    assert len(trial_queue.results()) == 4
    claims = work_off(trial_queue)
    assert sorted(cells_of(claims)) == [("partial", 0.001), ("partial", 0.01)]
    assert trial_queue.is_complete()
    results = {r.run_id: (r.strategy, r.setting["learning_rate"]) for r in trial_queue.results()}
    assert len(results) == 4
    for run_id, cell in zip(old_ids, old.cells(), strict=False):
        assert results[run_id] == (cell["strategy"], cell["learning_rate"])


def test_listed_cells_of_version_0_1_0_are_known_by_their_number(storage: str) -> None:
    cells = tuple({"strategy": "freeze", "seed": seed} for seed in range(4))
    sweep = Sweep("confirm", "grid", (), {}, listed=cells)
    old_ids = write_old_study(storage, sweep, 2, 3)
    trial_queue = TrialQueue(sweep, storage, 4)
    claims = work_off(trial_queue)
    assert [claim.values for claim in claims] == list(cells[2:])
    assert claims[0].run_id == old_ids[2]
    assert [r.setting["seed"] for r in trial_queue.results()] == [0, 1, 2, 3]
    fewer = TrialQueue(replace(sweep, listed=cells[:2]), storage, 2)
    assert fewer.is_complete() and len(fewer.results()) == 2


def test_the_database_of_version_0_1_0_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "tests/old_formats/v0_1_0", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    trial_queue = TrialQueue(read_sweep(Path("sweep.yaml")), "sqlite:///swept/small.db", 4)
    before = [r for r in trial_queue.results() if r.state == "finished"]
    assert [(r.run_id, r.best_epoch) for r in before] == [
        ("small-af8537-000", 0),
        ("small-af8537-001", 0),
    ]
    assert all((r.run_dir / "result.json").exists() for r in before)
    claims = work_off(trial_queue)
    assert cells_of(claims) == [("partial", 0.01), ("partial", 0.001)]
    assert [c.run_id for c in claims] == ["small-af8537-002", "small-af8537-003"]
    assert trial_queue.is_complete()


# search


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_search_draws_the_same_values_after_an_interruption(method: str, tmp_path: Path) -> None:
    sweep = drawn(method)
    urls = [f"sqlite:///{tmp_path / f'{i}.db'}" for i in range(2)]
    straight = [c.values for c in work_off(TrialQueue(sweep, urls[0], 13))]
    in_pieces = [
        c.values for num in (6, 6, 1) for c in work_off(TrialQueue(sweep, urls[1], 13), num)
    ]
    assert straight == in_pieces and len(straight) == 13
    assert len({str(values) for values in straight}) == 13
    other = drawn(method, parameters={**_parameters(sweep), "seed": {"value": 7}})
    url = f"sqlite:///{tmp_path / 'other.db'}"
    assert work_off(TrialQueue(other, url, 1))[0].values != straight[0]


def _parameters(sweep: Sweep) -> dict[str, Any]:
    return dict(sweep.source["parameters"])


def test_bayes_beats_random_on_a_known_function_with_the_same_budget(tmp_path: Path) -> None:
    best: dict[str, list[float]] = {"random": [], "bayes": []}
    for method, found in best.items():
        for seed in range(2):
            sweep = drawn(method, name=f"{method}{seed}")
            sweep = sweep.amended(None, {"seed": seed}, {})
            trial_queue = TrialQueue(sweep, f"journal:{tmp_path / sweep.name}", 40)
            found.append(max(score(claim.values) for claim in work_off(trial_queue)))
    assert all(b > r for b, r in zip(best["bayes"], best["random"], strict=True)), best


def test_a_bad_trial_is_pruned_at_the_first_rung_and_not_before(sqlite: str) -> None:
    early = {"type": "hyperband", "min_iter": 4, "eta": 3}
    trial_queue = TrialQueue(grid(9, early_terminate=early), sqlite, 9)
    ended: dict[int, int] = {}
    for i in range(9):
        claim = trial_queue.claim()
        assert claim is not None
        for iteration in range(1, 13):
            value = (0.9 if i in (0, 5) else 0.1 - i / 100) + iteration / 1000
            if reason := trial_queue.report(claim, iteration, value, judge=True):
                assert "is not among the best 1 in 3" in reason
                ended[i] = iteration
                break
        trial_queue.finish(claim, "pruned" if i in ended else "finished", value, {"reason": ""})
    assert ended == dict.fromkeys((1, 2, 3, 4, 6, 7, 8), 4)
    assert states(sqlite) == {"COMPLETE": 2, "PRUNED": 7}


# several processes

OTHER_PROCESS = """
import json, sys, time
from finetune.sweep.trial_queue import TrialQueue
from finetune.sweep.sweep_file import read_sweep
content, where, count, pause = json.loads(sys.argv[1])
trial_queue = TrialQueue(read_sweep(content), where, count)
print("open", flush=True)
while claim := trial_queue.claim():
    print(claim.key, flush=True)
    time.sleep(pause)
    trial_queue.finish(claim, "finished", 0.5, {})
print("done", flush=True)
"""


def other_process(content: dict[str, Any], where: str, count: int, pause: float) -> Any:
    return subprocess.Popen(
        [fast_python(), "-c", OTHER_PROCESS, json.dumps([content, where, count, pause])],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def content(cells: int) -> dict[str, Any]:
    parameters = {"seed": {"values": list(range(cells))}}
    return {"name": "grid", "method": "grid", "metric": METRIC, "parameters": parameters}


def share(where: str, cells: int = 12) -> None:
    """Two processes work on a sweep; one is killed while it runs a trial."""
    slow = other_process(content(cells), where, cells, 60)
    with slow.stdout:
        assert slow.stdout.readline() == "open\n"
        held = slow.stdout.readline().strip()
        quick = other_process(content(cells), where, cells, 0.01)
        assert quick.stdout.readline() == "open\n"
        slow.kill()
        slow.wait()
    quick.communicate(timeout=120)
    trial_queue = TrialQueue(read_sweep(content(cells)), where, cells)
    finished = [t for t in trials(where) if t.state.name == "COMPLETE"]
    work_off(trial_queue)
    assert trial_queue.is_complete()
    found = trials(where)
    done = Counter(t.user_attrs["key"] for t in found if t.state.name == "COMPLETE")
    assert done == {cell_key({"seed": i}): 1 for i in range(cells)}
    assert held in done and len(finished) >= cells - 1
    trial_queue.close()
    assert len([t for t in found if "copy_of" not in t.user_attrs]) == cells, "enqueued twice"


def test_two_processes_share_a_journal_and_one_is_killed(tmp_path: Path) -> None:
    share(f"journal:{tmp_path / 'shared.journal'}")


def test_two_processes_share_sqlite_and_one_is_killed(sqlite: str) -> None:
    share(sqlite)


def test_a_cap_holds_for_two_processes_that_draw(sqlite: str) -> None:
    sweep = {"name": "drawn", "method": "random", "metric": METRIC}
    sweep["parameters"] = {"momentum": {"min": 0.0, "max": 0.9}}  # type: ignore[assignment]
    both = [other_process(sweep, sqlite, 15, 0) for _ in range(2)]
    for process in both:
        process.communicate(timeout=120)
    assert states(sqlite, "drawn")["COMPLETE"] == 15


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A server of its own, from Debian's package, on a socket in a temporary directory."""
    found = shutil.which("pg_ctl") or next(
        (str(p) for p in sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))), None
    )
    if not found:
        pytest.skip("PostgreSQL is missing: apt-get install postgresql")
    programs = Path(found).resolve().parent
    place = Path(tempfile.mkdtemp(prefix="pg"))
    runner = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if runner:
        shutil.chown(place, "postgres")

    def call(*words: str) -> None:
        subprocess.run([*runner, *words], check=True, capture_output=True, cwd="/")

    data = str(place / "data")
    call(str(programs / "initdb"), "-D", data, "-A", "trust", "-U", "tester")
    options = f"-c listen_addresses='' -k {place}"
    call(
        str(programs / "pg_ctl"), "-D", data, "-w", "-l", str(place / "log"), "-o", options, "start"
    )
    try:
        yield f"postgresql://tester@/postgres?host={place}"
    finally:
        call(str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(place)


@pytest.mark.slow
def test_two_processes_share_postgresql_and_one_is_killed(postgresql: str) -> None:
    share(postgresql)


# other machines


@pytest.mark.slow
def test_a_trial_without_a_heartbeat_is_requeued(
    sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.sweep.storage.HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr("finetune.sweep.storage.GRACE_SECONDS", 5)
    gone = TrialQueue(grid(1), sqlite, 1, owner=ELSEWHERE)
    claim = gone.claim()
    here = TrialQueue(grid(1), sqlite, 1)
    assert here.claim() is None and not here.is_complete()
    deadline = time.monotonic() + 6
    while time.monotonic() < deadline:
        gone.record_heartbeats()
        time.sleep(0.2)
    assert here.claim() is None and not here.is_complete(), "it was alive"
    time.sleep(6.5)
    assert not here.is_complete()
    again = here.claim()
    assert again is not None and claim is not None and again.run_id == claim.run_id


def test_a_journal_s_trial_of_another_machine_waits_for_retry_failed(tmp_path: Path) -> None:
    where = f"journal:{tmp_path / 'x.journal'}"
    assert TrialQueue(grid(1), where, 1, owner=ELSEWHERE).claim() is not None
    here = TrialQueue(grid(1), where, 1)
    assert here.claim() is None and not here.is_complete()
    assert list(here.unobservable()) == ["elsewhere"]
    assert here.retry_failed() == 1
    assert here.claim() is not None


def test_a_process_is_distinguished_from_a_later_one_with_its_id() -> None:
    ours = this_process()
    assert not has_ended(ours)
    assert has_ended({**ours, "started": "1"})
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,))
    process.start()
    pid = process.pid
    process.join()
    assert has_ended({**ours, "pid": pid})
    assert not has_ended({**ours, "pid": pid, "machine": "elsewhere"})


@pytest.mark.parametrize(
    ("where", "kind", "message"),
    [
        ("nonsense", ConfigError, "not a URL; pass sqlite:///FILE.db"),
        ("oracul://x/y", ConfigError, "knows no database 'oracul'"),
        ("mysql://u:secret@h/d", MissingPackage, "pip install mysqlclient"),
        ("sqlite:////nonexistent/x.db", FinetuneError, "unable to open database file"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_message(
    where: str, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.sweep.storage._TRIES", 1)
    with pytest.raises(kind) as refused:
        open_storage(where)
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_study_with_repeated_combinations_is_continued(
    sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = {
        "strategy": {"values": ["probe", "freeze"]},
        "learning_rate": {"values": [0.1, 0.01, 0.001]},
    }
    sweep = grid(parameters=parameters)
    with monkeypatch.context() as older:  # it enqueued every combination
        older.setattr(Sweep, "cells", Sweep._combinations)
        started = TrialQueue(grid(parameters=parameters), sqlite, 6)
        assert len(work_off(started, 2)) == 2
        started.close()
    trial_queue = TrialQueue(sweep, sqlite, sweep.num_trials())
    done = work_off(trial_queue)
    assert [claim.values["strategy"] for claim in done] == ["freeze"] * 3
    assert trial_queue.is_complete()
    assert [result.state for result in trial_queue.results()] == ["finished"] * 4
