"""Everything around runs: `python -m finetune COMMAND`.

Turns a command line into one call. Knows nothing that a room knows: a command's room is imported
when it is called, so that `--help` stays quick.

    python -m finetune --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.flags import Parser
from finetune.system.progress import close_bars
from finetune.system.shutdown import run_cli

Arguments = Callable[[argparse.ArgumentParser], None]
DATA_DIR = Path("data/inaturalist_12K")


@dataclass(frozen=True)
class Command:
    """One command: what it does, its arguments, and the call that it is."""

    summary: str
    add_arguments: Arguments
    call: Callable[[argparse.Namespace], int | None]


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where everything goes")
    parser.add_argument("--seed", type=int, default=42)


def _demo(given: argparse.Namespace) -> int | None:
    from finetune.demo import demo

    return demo(given.out, given.seed)


def _download_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", type=Path, default=DATA_DIR, help="where the data goes")
    parser.add_argument("--url", help="another zip with train/CLASS/* and val/CLASS/* in it")
    parser.add_argument("--archive", type=Path, help="a zip that is here already; it stays")
    parser.add_argument("--weights_only", action="store_true", help="ImageNet's weights, no data")


def _download(given: argparse.Namespace) -> int | None:
    from finetune.datasets.download import download

    download(given.data_dir, given.url, given.archive, given.weights_only)
    return None


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", type=Path, default=DATA_DIR, help="what to read")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")


def _check(given: argparse.Namespace) -> int | None:
    from finetune.datasets.check import check

    return check(given.data_dir, given.json)


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sweep", type=Path, metavar="SWEEP.yaml", help="a W&B sweep file")
    add("--check", action="store_true", help="only check the file, for W&B's agents too")
    add("--workers", type=int, help="trials at a time; default: one a visible GPU, else one")
    add("--storage", metavar="URL", help="shared by several processes: a database's URL, or "
        "journal:PATH; default: OUT/NAME.db")  # fmt: skip
    add("--max_runs", type=int, help="at most so many trials in all, as run_cap in the file")
    add("--name", help="the sweep's name; default: the file's name: entry, else its own name")
    add("--out", type=Path, help="where run directories go; default: the file's out, else runs")
    add("--retry_failed", action="store_true", help="run failed trials again")


def _sweep(given: argparse.Namespace) -> int | None:
    options = {k: v for k, v in vars(given).items() if k not in ("call", "sweep", "check")}
    if given.check:
        from finetune.sweep.sweep_file import read_sweep

        print(f"{given.sweep} is fine. {read_sweep(given.sweep).summary()}")
        return 0
    from finetune.sweep.runner import sweep_command

    return sweep_command(given.sweep, **options)


def _gpus_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep_id", metavar="SWEEP_ID", help="what `wandb sweep` has printed")
    parser.add_argument("--count", type=_count, help="at most so many runs for each agent")


def _gpus(given: argparse.Namespace) -> int | None:
    from finetune.tracking.gpus import gpus

    return gpus(given.sweep_id, given.count)


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument(
        "images", metavar="IMAGE_OR_FOLDER", type=Path, nargs="+", help="folders are searched"
    )
    parser.add_argument(
        "--top", type=_count, default=3, metavar="K", help="classes a picture (default: 3)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON array; a picture that can't be read has a class of null, and an error",
    )


def _predict(given: argparse.Namespace) -> int | None:
    from finetune.inference.predict import predict

    return predict(given.run_dir, given.images, given.top, given.json)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        type=Path,
        nargs="?",
        help="holds CLASS/*, the run's own classes (default: the test set that the run kept)",
    )
    parser.add_argument("--json", action="store_true", help="the whole record as JSON")


def _evaluate(given: argparse.Namespace) -> int | None:
    from finetune.inference.evaluate import evaluate

    return evaluate(given.run_dir, given.folder, given.json)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument(
        "--format", required=True, choices=("onnx", "state_dict"), help="of the file"
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="default: RUN_DIR/model.onnx or model.pth"
    )


def _export(given: argparse.Namespace) -> int | None:
    from finetune.inference.export import export

    return export(given.run_dir, given.format, given.out)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs_dir", metavar="RUNS_DIR", type=Path, nargs="?", default=Path("runs"),
        help="holds run directories, at any depth (default: runs)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where report.html and runs.csv go (default: RUNS_DIR)"  # noqa: E501
    )  # fmt: skip
    parser.add_argument(
        "--wandb", metavar="ENTITY/PROJECT/SWEEP", help="report on this W&B sweep instead"
    )


def _report(given: argparse.Namespace) -> int | None:
    from finetune.analysis.report.report import report

    return report(given.runs_dir, given.out, given.wandb)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; must be 1 or more")
    return value


def _confirm_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs_dir", type=Path, metavar="RUNS_DIR", help="a folder of finished runs")
    add("--seeds", type=int, default=5, help="fresh seeds for each strategy (default: 5)")
    add("--workers", type=int, help="runs at a time; default: one a visible GPU, else one")
    add("--storage", metavar="URL", help="as for sweep; default: RUNS_DIR/confirm/NAME.db")


def _confirm(given: argparse.Namespace) -> int | None:
    from finetune.sweep.confirmation import confirm

    return confirm(given.runs_dir, given.seeds, given.workers, given.storage)


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "the four strategies compared on handwritten digits: nothing to sign up for or download",
        _demo_arguments,
        _demo,
    ),
    "download": Command(
        "fetch iNaturalist-12K and ImageNet's weights: resumed, verified, unpacked, checked",
        _download_arguments,
        _download,
    ),
    "check": Command(
        "read every picture once: counts, unreadable ones, the same picture in two splits",
        _check_arguments,
        _check,
    ),
    "sweep": Command(
        "run a W&B sweep file here, without an account; start it again to go on",
        _sweep_arguments,
        _sweep,
    ),
    "gpus": Command(
        "one W&B agent on each visible GPU, or one in all on a CPU", _gpus_arguments, _gpus
    ),
    "report": Command(
        "which strategy wins, and can it be trusted: a page, a table, and the answer here",
        _report_arguments,
        _report,
    ),
    "predict": Command(
        "class and probability of pictures, by a run's best model", _predict_arguments, _predict
    ),
    "evaluate": Command(
        "a run's best model on its test set, or on any labelled folder; recorded once",
        _evaluate_arguments,
        _evaluate,
    ),
    "export": Command(
        "a run's best model as one file, with its preprocessing and class names",
        _export_arguments,
        _export,
    ),
    "confirm": Command(
        "repeat each strategy's best setting with fresh seeds, equally often",
        _confirm_arguments,
        _confirm,
    ),
}


def command_line() -> argparse.ArgumentParser:
    """The parser of every command; what it returns has the command's `call`."""
    parser: Any = Parser(prog="python -m finetune", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.summary, description=command.summary)
        command.add_arguments(subparser)
        subparser.set_defaults(call=command.call)
    made: argparse.ArgumentParser = parser
    return made


@close_bars()
def main(arguments: list[str] | None = None) -> int | None:
    given = command_line().parse_args(sys.argv[1:] if arguments is None else arguments)
    call: Callable[[argparse.Namespace], int | None] = given.call
    return call(given)


if __name__ == "__main__":
    run_cli(main)
