"""Reading sweep files: valid and invalid ones, and the meaning of their parameters."""

from __future__ import annotations

import datetime
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from finetune.__main__ import main
from finetune.config.fields import RunConfig
from finetune.config.given_values import read_mapping
from finetune.runs.run_dir import RunDir
from finetune.sweep import sampling
from finetune.sweep.distributions import DISTRIBUTIONS, Constant, Dimension, read_parameter
from finetune.sweep.spec import UNLIMITED, Sweep
from finetune.sweep.sweep_file import read_sweep
from finetune.system.errors import ConfigError, DataError, FinetuneError, WeightsError

ROOT = Path(__file__).parents[2]
METRIC = {"name": "best_val_acc", "goal": "maximize"}


def sweep(**changed: Any) -> Sweep:
    content = {"method": "grid", "metric": METRIC, "parameters": {"seed": {"values": [1, 2]}}}
    return read_sweep({k: v for k, v in (content | changed).items() if v is not None})


def read_config_of_a_run(path: Path) -> dict[str, Any]:
    return RunDir(path.parent).read_config().to_fields()


def draws(entry: dict[str, Any], count: int = 4000) -> list[Any]:
    dimension = read_parameter("x", entry)
    assert isinstance(dimension, Dimension)
    rng = random.Random(5)

    def point() -> Any:
        if dimension.choices:
            return rng.choice(dimension.choices)
        if dimension.whole:
            return rng.randint(int(dimension.low), int(dimension.high))
        if dimension.log:
            ends = math.log(dimension.low), math.log(dimension.high)
            return math.exp(rng.uniform(*ends))
        return rng.uniform(dimension.low, dimension.high)

    return [dimension.meaning(point()) for _ in range(count)]


def test_the_repository_s_sweep_is_a_grid_of_64_cells() -> None:
    found = read_sweep(ROOT / "sweep.yaml")
    cells = list(found.cells())
    assert found.num_cells == len(cells) == 64
    assert len({tuple(cell.values()) for cell in cells}) == 64
    assert {cell["data_aug"] for cell in cells} == {"y", "n"}
    assert found.metric.name == "best_val_acc" and found.metric.goal == "maximize"


def test_combinations_that_differ_in_ignored_fields_only_are_one_cell() -> None:
    rates = {"values": [0.1, 0.01, 0.001]}
    given = {"strategy": {"values": ["probe", "freeze"]}, "learning_rate": rates}
    found = sweep(parameters=given | {"data_aug": {"values": ["y", "n"]}})
    kept = [tuple(cell.values()) for cell in found.cells()]
    probe = [("probe", 0.1, "y"), ("probe", 0.1, "n")]
    freeze = [("freeze", rate, aug) for rate in rates["values"] for aug in ("y", "n")]
    assert kept == probe + freeze
    assert (found.num_combinations, found.num_cells) == (12, 8)
    (note,) = found.notes
    assert note.startswith("12 combinations, 8 of them different: ")
    optimizers = {"optimizer": {"values": ["sgd", "adamw"]}, "momentum": {"values": [0.5, 0.9]}}
    assert sweep(parameters=optimizers).num_cells == 3
    assert sweep(parameters=given | {"strategy": {"value": "probe"}}).num_cells == 1
    assert sweep(parameters={"learning_rate": rates}).notes == []


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_file_in_sweeps_is_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--check", str(path)]) == 0
    assert "is valid" in capsys.readouterr().out


def test_parameter_forms_have_the_meaning_of_wandb() -> None:
    assert read_parameter("x", {"value": 3}) == Constant(3)
    assert set(draws({"values": [1, "a", True]})) == {1, "a"}
    weighted = draws({"values": ["a", "b"], "probabilities": [0.8, 0.2]})
    assert 0.77 < weighted.count("a") / len(weighted) < 0.83
    assert set(draws({"min": 1, "max": 4})) == {1, 2, 3, 4}
    assert 0.45 < statistics.mean(draws({"min": 0.0, "max": 1.0})) < 0.55
    exponents = draws({"distribution": "log_uniform", "min": -4, "max": 0})
    assert math.exp(-4) <= min(exponents) and max(exponents) <= 1
    assert -2.2 < statistics.mean(map(math.log, exponents)) < -1.8
    values = draws({"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2})
    assert -3.1 < statistics.mean(math.log10(v) for v in values) < -2.9
    inverse = draws({"distribution": "inv_log_uniform", "min": 0, "max": 4})
    assert math.exp(-4) <= min(inverse) and max(inverse) <= 1
    normal = draws({"distribution": "normal", "mu": 3, "sigma": 2})
    assert 2.8 < statistics.mean(normal) < 3.2 and 1.8 < statistics.stdev(normal) < 2.2
    steps = draws({"distribution": "q_uniform", "min": 16.0, "max": 64.0, "q": 16})
    assert set(steps) == {16, 32, 48, 64}
    assert set(draws({"distribution": "q_log_uniform_values", "min": 1, "max": 9, "q": 4})) == {
        0, 4, 8,
    }  # fmt: skip
    assert all(v % 1 == 0 for v in draws({"distribution": "q_normal"}))
    assert min(draws({"distribution": "log_normal"})) > 0


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_optuna_can_draw_from_every_distribution(name: str) -> None:
    settings = {"value": 1, "values": [1, 2], "probabilities": [0.5, 0.5], "min": 1, "max": 2}
    entry = {key: settings[key] for key in DISTRIBUTIONS[name].needs}
    read = read_parameter("x", {"distribution": name, **entry})
    if isinstance(read, Dimension):
        assert sampling.draw(optuna.create_study().ask(), (read,)).keys() == {"x"}
    else:
        assert name == "constant"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"methd": "grid"}, "unknown key 'methd'; did you mean method"),
    ({"method": "gird"}, "method: got 'gird'; must be one of grid, random, bayes"),
    ({"parameters": None}, "parameters: missing; must be a mapping of fields to values"),
    ({"parameters": {"learning_rte": {"value": 1}}}, "unknown field 'learning_rte'; did you mean"),
    ({"parameters": {"seed": {"vales": [1]}}}, "seed: unknown key 'vales'; did you mean value"),
    ({"parameters": {"seed": 3}}, "seed: got 3; must be a mapping"),
    ({"parameters": {"learning_rate": {"values": [0.1, "1e-3"]}}}, "YAML reads 1e-3 as a string"),
    ({"parameters": {"name": {"values": [datetime.date(2001, 1, 1)]}}}, "must be a single value"),
    ({"parameters": {"learning_rate": {"min": "1e-3", "max": 0.1}}}, "write 0.001, without quotes"),
    ({"parameters": {"learning_rate": {"values": [0.1, -1]}}}, "learning_rate: got -1; must be"),
    ({"parameters": {"strategy": {"values": ["frieze"]}}}, "did you mean freeze?"),
    ({"parameters": {"seed": {"values": [1, 1]}}}, "seed: values: 1 is listed twice"),
    ({"parameters": {"seed": {"min": 1, "max": 2.5}}}, "one is an integer and the other isn't"),
    ({"parameters": {"seed": {"min": 2, "max": 1}}}, "min: got 2; must be less than max, 1"),
    (
        {"parameters": {"momentum": {"min": 0.1, "max": 0.9}}},
        "no finite list of values, which a grid needs",
    ),
    ({"parameters": {"seed": {"distribution": "beta"}}}, "distribution beta isn't supported"),
    ({"parameters": {"seed": {"distribution": "unifrm"}}}, "unknown distribution 'unifrm'; did"),
    ({"parameters": {"seed": {"parameters": {}}}}, "nested parameters aren't supported"),
    (
        {"parameters": {"seed": {"values": [1, 2], "probabilities": [0.5, 0.6]}}},
        "must be 2 numbers >= 0 that sum to 1",
    ),
    ({"parameters": {"resume": {"value": "runs/x"}}}, "'resume': it is a flag of agent.py"),
    (
        {"method": "hyperband"},
        "method: got 'hyperband', which ends runs early and doesn't choose values; write it beside "
        "a method:\n    method: random\n    early_terminate: {type: hyperband, min_iter: 4}",
    ),
    ({"method": "ASHA"}, "early_terminate: {type: hyperband, min_iter: 4}"),
    ({"method": "bohb"}, "early_terminate: {type: hyperband, min_iter: 4}"),
    ({"early_terminate": "hyperband"}, "such as {type: hyperband, min_iter: 4}"),
    (
        {
            "parameters": {
                "optimizer": {
                    "parameters": {
                        "lr": {"values": [0.1, 1e-5]},
                        "inner": {"parameters": {"momentum": {"value": 0.9}}},
                    }
                }
            }
        },
        "parameters: optimizer: nested parameters aren't supported, as a run's fields are flat; "
        "write instead:\n    parameters:\n        momentum: {value: 0.9}\n"
        "        learning_rate: {values: [0.1, 1.0e-05]}",
    ),
    (
        {"parameters": {"model": {"parameters": {"dropout": {"value": 0.1}}}}},
        "as a run's fields are flat; unknown field 'dropout': there is no such field",
    ),
    (
        {"parameters": {"seed": {"parameters": [1]}}},
        "seed: nested parameters aren't supported, as a run's fields are flat",
    ),
    (
        {
            "parameters": {"momentum": {"distribution": "log_uniform", "min": 0.1, "max": 0.9}},
            "method": "random",
        },
        "\n  warning: momentum: log_uniform draws 1.1052 to 2.4596, as its min and max are "
        "exponents of e; log_uniform_values takes the values themselves",
    ),
    (
        {
            "parameters": {
                "batch_size": {"distribution": "q_log_uniform", "min": 16, "max": 64, "q": 8}
            },
            "method": "random",
        },
        "warning: batch_size: q_log_uniform draws 8.8861e+06 to 6.2351e+27",
    ),
    (
        {"metric": {"name": "val_accuracy", "goal": "maximize"}},
        "metric.name: got 'val_accuracy'; must be one of epoch, train_loss",
    ),
    (
        {"metric": {"name": "val_loss"}},
        "metric.goal: missing; must be maximize or minimize (W&B would minimize)",
    ),
    ({"metric": {"name": "val_loss", "gaol": "minimize"}}, "metric: unknown key 'gaol'"),
    (
        {"metric": {"name": "best_val_acc", "goal": "minimize"}},
        "goal must be maximize for best_val_acc",
    ),
    (
        {"metric": {"name": "val_loss", "goal": "maximize"}},
        "goal must be minimize for val_loss",
    ),
    ({"method": "bayes", "metric": None}, "metric: missing"),
    ({"run_cap": 0}, "run_cap: got 0"),
    ({"run_cap": True}, "run_cap: got True; must be a number"),
    ({"early_terminate": "hyperband"}, "early_terminate: got 'hyperband'; must be"),
    ({"parameters": [1]}, "parameters: got [1]; must be"),
    (
        {"early_terminate": {"type": "median"}},
        "early_terminate.type: got 'median'; must be 'hyperband'",
    ),
    ({"early_terminate": {"type": "hyperband"}}, "must have either min_iter, or max_iter and s"),
    ({"early_terminate": {"type": "hyperband", "min_iter": 3, "eta": 2.5}}, "eta: got 2.5"),
    (
        {"early_terminate": {"type": "hyperband", "min_iter": 3, "strict": True}},
        "strict: got True; must be False",
    ),
    ({"controller": {"type": "local"}}, "controller: not supported"),
    ({"job": "x"}, "job: not supported: it belongs to W&B Launch"),
    ({"program": "train.py"}, "program: got 'train.py'; must be agent.py"),
    ({"command": ["bash", "x.sh"]}, "'bash' is not supported"),
    ({"command": ["python", "${program}", "--epcohs", "2"]}, "unknown field 'epcohs'"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=lambda x: str(x)[:40])
def test_an_invalid_file_is_refused_with_the_reason(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = {"program": "agent.py", "method": "grid", "metric": METRIC}
    content["parameters"] = {"seed": {"values": [1, 2]}}
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (content | changed).items() if v is not None}))
    for arguments in (["sweep", "--check", str(path)], ["sweep", str(path)]):
        with pytest.raises(ConfigError) as refused:
            main(arguments)
        assert message in str(refused.value)
    assert sorted(tmp_path.iterdir()) == [path], "files were written"


def test_fields_of_a_run_hold_for_all_trials(tmp_path: Path) -> None:
    file = {
        "program": "agent.py",
        "method": "grid",
        "parameters": {"learning_rate": {"values": [0.1, 0.01]}, "seed": {"values": [1, 2]}},
        "command": ["python", "${program}", "--epochs", "3", "${args}"],
    }
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump(file))
    given = {"learning_rate": "1e-3", "epochs": "7", "data_dir": "data/mine", "data_aug": "no"}
    sweep = read_sweep(path, given)
    assert sweep.varied == ("seed",)
    for values in sweep.cells():
        config = sweep.config(values)
        assert (config.learning_rate, config.epochs, config.data_aug) == (0.001, 7, "n")
        assert config.data_dir == Path("data/mine").absolute()
    assert sweep.source != read_sweep(path).source
    with pytest.raises(ConfigError, match="unknown field 'epcohs'"):
        main(["sweep", "--check", str(path), "--epcohs", "3"])
    with pytest.raises(ConfigError, match="resume: a sweep starts new runs"):
        main(["sweep", "--check", str(path), "--resume", "runs/x"])


def test_the_check_warns_of_what_is_missing_and_of_too_few_epochs(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {"strategy": {"values": ["freeze", "gradual"]}, "epochs": {"value": 1}}
    content = {"program": "agent.py", "method": "grid", "parameters": parameters}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    places = [f"--data_dir={tmp_path / 'none'}", f"--weights={tmp_path / 'none.pth'}"]
    assert not main(["sweep", "--check", str(path), *places])
    output = capsys.readouterr().out
    assert "is valid" in output
    assert "warning: strategy gradual: epochs=1 is too few to unfreeze every part" in output
    assert f"warning: data_dir: {tmp_path / 'none'} does not exist" in output
    assert f"warning: weights: {tmp_path / 'none.pth'} does not exist" in output
    assert not main(["sweep", "--check", str(path), f"--data_dir={digits}", "--epochs=5"])
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "error"), [("data_dir", DataError), ("weights", WeightsError)])
def test_missing_data_or_weights_end_a_sweep_before_its_first_trial(
    name: str, error: type[Exception], tmp_path: Path, digits: Path
) -> None:
    parameters = {"strategy": {"value": "freeze"}, "seed": {"values": [1, 2]}}
    content = {"program": "agent.py", "method": "grid", "parameters": parameters}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    given = {"data_dir": str(digits), name: str(tmp_path / "none")}
    flags = [f"--{field}={value}" for field, value in given.items()]
    with pytest.raises(error, match=f"{name}: .* does not exist"):
        main(["sweep", str(path), "--out", str(tmp_path / "runs"), *flags])
    assert list(tmp_path.iterdir()) == [path]


EXPONENTS: list[tuple[dict[str, Any], str]] = [
    (
        {"distribution": "log_uniform", "min": 0.0001, "max": 0.1},
        "warning: learning_rate: log_uniform draws 1.0001 to 1.1052, as its min and max are "
        "exponents of e; log_uniform_values takes the values themselves\n",
    ),
    (
        {"distribution": "log_uniform", "min": -9.2103, "max": -2.3026},
        "\nlearning_rate: log_uniform draws 0.0001 to 0.099999, as its min and max",
    ),
    (
        {"distribution": "inv_log_uniform", "min": 0.0001, "max": 0.1},
        "warning: learning_rate: inv_log_uniform draws 0.90484 to 0.9999, as its min and max are "
        "exponents of e; inv_log_uniform_values takes the values themselves\n",
    ),
    (
        {"distribution": "q_log_uniform", "min": 0.01, "max": 1.0, "q": 0.1},
        "warning: learning_rate: q_log_uniform draws 1 to 2.7, as its min and max are exponents "
        "of e; q_log_uniform_values takes",
    ),
    (
        {"distribution": "log_normal", "mu": 0.001, "sigma": 0.1},
        "warning: learning_rate: log_normal draws 0.7349 to 1.3635, as its mu and sigma are "
        "exponents of e; normal takes",
    ),
    (
        {"distribution": "q_log_normal", "mu": 0.001, "sigma": 0.1, "q": 0.01},
        "warning: learning_rate: q_log_normal draws 0.73 to 1.36, as its mu and sigma",
    ),
]


@pytest.mark.parametrize(("entry", "note"), EXPONENTS, ids=lambda x: str(x)[:40])
def test_distributions_of_exponents_say_what_they_draw(
    entry: dict[str, Any], note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"program": "agent.py", "method": "random", "parameters": {"learning_rate": entry}}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["sweep", "--check", str(path)]) == 0
    assert note in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--max_runs"):  # before the first trial
        main(["sweep", str(path)])
    assert note.lstrip() in capsys.readouterr().out


@pytest.mark.parametrize("name", ["log_uniform_values", "q_log_uniform_values", "uniform"])
def test_distributions_of_values_say_nothing(name: str) -> None:
    entry = {"distribution": name, "min": 0.0001, "max": 0.1}
    if name.startswith("q_"):
        entry["q"] = 0.0001
    assert sweep(method="random", parameters={"lr_decay": entry}).notes == []


def test_all_faults_are_listed_together() -> None:
    with pytest.raises(ConfigError) as refused:
        sweep(methd=1, run_cap=-1, parameters={"lerning_rate": {"value": 1}})
    assert str(refused.value).startswith("sweep: 3 faults:")


@pytest.mark.parametrize("read", [read_sweep, read_mapping, read_config_of_a_run])
@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n"
            for a, b in zip("abcdefg", "bcdefgh", strict=True)
        ),
        "[" * 5000,
        "!!python/object/apply:os.system ['touch owned']",
        "a: &a {k: 1}\n"
        + "".join(
            f"{b}: &{b} {{<<: [{','.join(['*' + a] * 9)}]}}\n"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "epochs: &a [*a]",
        "!!python/name:os.system",
        "epochs: !!int nonsense",
        "epochs: 2001-99-99",
        f"epochs: {'9' * 10_000}",
        f"epochs: 0x{'f' * 10_000}",
        f"method: 0x{'f' * 10_000}",
        "epochs: 1\n? [a, {b: c}]\n: 2",
        f"a: {'x' * 2_000_000}",
        "- a list",
        "\x00",
        "\ud800",
    ],
    ids=["alias bomb", "deep", "object", "merge bomb", "loop", "name", "tag", "date", "long number",
         "long hex", "long hex as method", "key", "long", "list", "binary", "no text"],
)  # fmt: skip
def test_a_hostile_or_broken_file_is_one_message(
    text: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FinetuneError) as refused:
        RunConfig.from_fields(read(path))
    assert len(str(refused.value)) < 2000
    assert not Path("owned").exists()


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read as a sweep file"):
        read_sweep(tmp_path / "none.yaml")


def test_a_search_without_a_limit_asks_for_max_runs() -> None:
    found = sweep(method="random")
    with pytest.raises(ConfigError, match="pass --max_runs N"):
        found.num_trials()
    assert found.num_trials(7) == found.num_trials(7, is_timed=True) == 7
    assert found.num_trials(is_timed=True) == UNLIMITED
    assert sweep(method="random", run_cap=5).num_trials(7) == 5
    assert sweep().num_trials() == 2 and sweep().num_trials(1) == 1


def test_flags_of_a_custom_command_set_fields() -> None:
    command = ["${env}", "python3", "-u", "${program}", "${args}", "--epochs=3", "--cache", "off"]
    assert sweep(command=command).config({"seed": 1}).epochs == 3


def test_a_config_file_among_the_parameters_is_read(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("epochs: 4\nmomentum: 0.5\n")
    found = sweep(
        parameters={
            "config": {"value": str(tmp_path / "base.yaml")},
            "momentum": {"value": 0.8},
            "seed": {"values": [1, 2]},
        }
    )
    config = found.config({"seed": 2})
    assert (config.epochs, config.momentum, config.seed) == (4, 0.8, 2)


def test_max_iter_and_s_give_wandb_s_first_bracket() -> None:
    early = {"type": "hyperband", "max_iter": 27, "s": 2}
    early_termination = sweep(early_terminate=early).early_termination
    assert early_termination is not None and (
        early_termination.min_iter,
        early_termination.eta,
    ) == (3, 3)


@pytest.mark.parametrize(
    ("min_iter", "what"),
    [
        (3, "judges after 3 of all epochs, before that; min_iter must be >= 4 for it"),
        (4, "counts all epochs"),
    ],
)
def test_a_note_says_where_wandb_judges_other_epochs(min_iter: int, what: str) -> None:
    early = {"type": "hyperband", "min_iter": min_iter}
    strategies = {"strategy": {"values": ["freeze", "gradual"]}}
    assert sweep(early_terminate=early, parameters=strategies).notes == [
        "early_terminate: with strategy gradual the last part starts to train at epoch 3, and "
        f"epochs count from there; W&B {what}"
    ]
    strategies = {"strategy": {"values": ["freeze", "partial", "scratch"]}}
    assert not sweep(early_terminate=early, parameters=strategies).notes
