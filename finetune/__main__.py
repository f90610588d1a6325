"""Commands around runs: `python -m finetune COMMAND`.

Each command is one entry of `COMMANDS`. Its module is imported when the command is called, so that
`--help` imports no torch.
"""

import argparse
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from finetune.config.backbones import DEFAULT_MODEL
from finetune.config.flags import Parser, given_fields
from finetune.system.errors import RunDirError
from finetune.system.files import run_directory
from finetune.system.progress import close_bars
from finetune.system.shutdown import run_cli
from finetune.system.text import listed

Argument = tuple[str, dict[str, Any]]
Command = tuple[str, str, *tuple[Argument, ...]]
"""(summary, "module:function", *arguments). The function gets the arguments as keywords and returns
the exit code."""


def argument(name: str, help: str, **options: Any) -> Argument:
    """One argument of a command, with the options of `ArgumentParser.add_argument`."""
    return name, {"help": help, **options}


def positive_integer(text: str) -> int:
    """The number in `text`. Raises argparse's error if it isn't an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; must be an integer >= 1")
    return int(text)


_RUN_FIELDS: Argument = ("fields", {})
"""Of a command that takes the fields of a run as agent.py does, in the argument `fields`.

The command's own positional arguments come before them, and its own options take precedence.
"""
_FIELDS_HELP = "--FIELD VALUE for any field of a run, and --config FILE: see agent.py --help."

_path = partial(argument, type=Path)
_count = partial(argument, type=positive_integer)
_switch = partial(argument, action="store_true")
_storage = partial(argument, "--storage", metavar="URL")
_runs_dir = partial(_path, "runs_dir", metavar="RUNS_DIR")

_DATA_DIR = Path("data/inaturalist_12K")
_RUN_DIR = argument(
    "run_dir", "the directory of a finished run", metavar="RUN_DIR", type=run_directory
)
_WORKERS = _count(
    "--workers",
    "runs at the same time (default: one per visible GPU, two per GPU of 40 GB or more, else 1)",
)

COMMANDS: dict[str, Command] = {
    "demo": (
        "compare the strategies on handwritten digits; needs no account and no download",
        "finetune.demo:demo",
        _path("--out", "output directory (default: demo)", default=Path("demo")),
        argument("--seed", "of every run (default: 42)", type=int, default=42),
        _switch("--photos", "on photographs, with ImageNet's weights (a download of 45 MB)"),
        argument("--weights", "a file of weights for --photos instead", metavar="FILE"),
    ),
    "download": (
        "download iNaturalist-12K and the ImageNet weights; resumes, verifies, unpacks and checks",
        "finetune.datasets.download:download",
        _path("--data_dir", f"where to unpack the data (default: {_DATA_DIR})", default=_DATA_DIR),
        argument("--url", "another zip file that contains train/CLASS/* and val/CLASS/*"),
        _path("--archive", "a local zip file; it is kept"),
        argument(
            "--weights_only",
            f"no data, only the ImageNet weights of these networks (default: {DEFAULT_MODEL})",
            nargs="*",
            metavar="MODEL",
        ),
    ),
    "check": (
        "read every picture once: counts, unreadable files, the same picture in two splits",
        "finetune.datasets.check:check",
        _path("--data_dir", f"the data set to read (default: {_DATA_DIR})", default=_DATA_DIR),
        _path("--labels", "a CSV or metadata.jsonl with the pictures' labels"),
        _switch("--json", "print one JSON object", dest="as_json"),
    ),
    "sweep": (
        "run a W&B sweep file on this machine, without an account; the same command resumes it",
        "finetune.sweep.runner:sweep_command",
        _path("sweep", "a W&B sweep file", metavar="SWEEP.yaml"),
        argument(
            "--check",
            "only check the file; the result is valid for W&B's agents too",
            dest="function",
            action="store_const",
            const="finetune.sweep.checks:check_command",
        ),
        _WORKERS,
        _storage("database URL or journal:PATH, for several processes (default: OUT/NAME.db)"),
        argument(
            "--minutes", "start no trial that can't end within N minutes", type=float, metavar="N"
        ),
        argument("--max_runs", "maximum number of trials, like run_cap in the file", type=int),
        argument("--name", "name of the sweep (default: name in the file, or the file's name)"),
        _path("--out", "for run directories (default: out in the file, or runs)"),
        _switch("--retry_failed", "run failed trials again"),
        _count(
            "--keep_best",
            "keep the checkpoints of the N best trials and of each strategy's best (default: all)",
            metavar="N",
        ),
        _RUN_FIELDS,
    ),
    "best": (
        "the best model of a folder of pictures within a time, confirmed and tested",
        "finetune.best:best",
        _path("data_dir", "holds train/CLASS/* or CLASS/*", metavar="DATA_DIR"),
        argument("--minutes", "the time that it may take", type=float, required=True, metavar="N"),
        argument(
            "--models",
            f"networks to try (default: {DEFAULT_MODEL})",
            nargs="+",
            metavar="MODEL",
            default=(DEFAULT_MODEL,),
        ),
        _RUN_FIELDS,
    ),
    "lr_find": (
        "learning-rate range test of a run's config: prints a curve and a suggestion",
        "finetune.training.lr_find:lr_find",
        _RUN_FIELDS,
    ),
    "show": (
        "write a picture of the first training batches, as the network sees them",
        "finetune.training.show:show",
        _path("--file", "the picture (default: show.png)", default=Path("show.png")),
        _count("--num_pictures", "of them (default: 32)", default=32),
        _RUN_FIELDS,
    ),
    "gpus": (
        "start one W&B agent on each visible GPU, or a single agent without a GPU",
        "finetune.tracking.gpus:gpus",
        argument("sweep_id", "as printed by `wandb sweep`", metavar="SWEEP_ID"),
        _count("--count", "maximum number of runs per agent"),
    ),
    "report": (
        "compare the strategies: which one is best, and is the difference significant",
        "finetune.analysis.report.report:report",
        _runs_dir("holds runs, at any depth (default: runs)", nargs="?", default=Path("runs")),
        _path("--out", "for report.html and runs.csv (default: RUNS_DIR)", metavar="DIR"),
        argument("--wandb", "report on this W&B sweep instead", metavar="ENTITY/PROJECT/SWEEP"),
    ),
    "workspace": (
        "save a view and a report in W&B: accuracies, what varied, curves, mistakes",
        "finetune.tracking.workspace:workspace",
        argument("address", "the runs to show", metavar="ENTITY/PROJECT[/SWEEP]"),
    ),
    "refit": (
        "train a run's setting once more, on its training and validation pictures together",
        "finetune.training.refit:refit",
        _RUN_DIR,
    ),
    "predict": (
        "predict the classes of pictures with a run's best model",
        "finetune.inference.predict:predict",
        _RUN_DIR,
        _path("given", "folders are searched recursively", metavar="IMAGE_OR_FOLDER", nargs="+"),
        _count("--top", "number of classes per picture (default: 3)", metavar="K", default=3),
        _switch("--json", "one JSON array; an unreadable picture has an error", dest="as_json"),
    ),
    "evaluate": (
        "evaluate a run's best model on its test set or on a labelled folder; recorded once",
        "finetune.inference.evaluate:evaluate",
        _RUN_DIR,
        _path("folder", "holds CLASS/* (default: the run's test set)", metavar="FOLDER", nargs="?"),
        _switch("--json", "print the record as JSON", dest="as_json"),
    ),
    "export": (
        "export a run's best model as one file, with preprocessing and class names",
        "finetune.inference.export:export",
        _RUN_DIR,
        argument(
            "--format", "of it", dest="format_name", required=True, choices=("onnx", "state_dict")
        ),
        _path("--out", "default: RUN_DIR/model.onnx or RUN_DIR/model.pth", metavar="FILE"),
        _count(
            "--opset",
            "ONNX's operator set, read by more runtimes the older it is (default: 18)",
            metavar="N",
        ),
    ),
    "confirm": (
        "repeat each strategy's best setting (per network) with fresh seeds, equally often",
        "finetune.sweep.confirmation:confirm",
        _runs_dir("contains finished runs"),
        _count("--seeds", "fresh seeds per setting (default: 5)", dest="num_seeds", default=5),
        _count("--folds", "instead, one run per setting on each of K folds of train/", metavar="K"),
        _WORKERS,
        _storage("as for sweep (default: RUNS_DIR/confirm/NAME.db)"),
    ),
}


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands. A parsed command has the `function` to call."""
    parser = Parser(prog="python -m finetune", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, (summary, function, *arguments) in COMMANDS.items():
        takes_fields = _RUN_FIELDS in arguments
        subparser = commands.add_parser(
            command,
            help=summary,
            description=summary,
            epilog=_FIELDS_HELP if takes_fields else None,
            allow_abbrev=not takes_fields,
        )
        for name, options in arguments:
            if (name, options) != _RUN_FIELDS:
                subparser.add_argument(name, **options)
        subparser.set_defaults(function=function, takes_fields=takes_fields)
    return parser


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    """The `function` of a command line, and its keyword arguments. Raises `ConfigError`."""
    parser = command_line()
    known, rest = parser.parse_known_args(arguments)
    given = vars(known)
    if given.pop("takes_fields"):
        return given | {"fields": given_fields(rest)}
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return given


def _require_run_dir(path: Path) -> None:
    """Raises `RunDirError` if there is no such folder, before PyTorch is loaded."""
    if not path.is_dir():
        finished = [found.parent.name for found in sorted(path.parent.glob("*/result.json"))]
        others = f"; finished runs in {path.parent}: {listed(finished, 5)}" if finished else ""
        raise RunDirError(f"{path} is not a run directory: it does not exist{others}")


@close_bars()
def main(arguments: list[str] | None = None) -> int | None:
    """Call a command's function with its arguments; returns the exit code."""
    given = parse(arguments)
    if "run_dir" in given:
        _require_run_dir(given["run_dir"])
    module, _, name = given.pop("function").partition(":")
    if sys.stderr.isatty() and module.split(".")[1] in ("inference", "training"):
        print("loading PyTorch", file=sys.stderr)
    code: int | None = getattr(import_module(module), name)(**given)
    return code


if __name__ == "__main__":
    run_cli(main)
