"""The notebook of docs/, executed cell by cell as Jupyter would."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.tracking.conftest import Place, assert_history_is_complete

NOTEBOOK = ROOT / "docs" / "wandb_agent.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's libraries
def test_the_notebook_does_a_sweep_a_run_and_predictions(
    place: Place, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    config = place.path / "fields.yaml"
    given = {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}
    config.write_text(yaml.safe_dump(given | {"epochs": 2}))
    for name in os.environ.keys() - place.environment.keys():
        monkeypatch.delenv(name)
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FINETUNE_CONFIG", str(config))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()

    *swept, alone = place.server.runs.values()
    assert [run.args["strategy"] for run in swept] == ["freeze", "partial"]
    assert alone.sweep is None
    for run in (*swept, alone):
        assert (run.state, run.summary["state"]) == ("finished", "finished")
        assert_history_is_complete(run, place.run_dir(run))
        result = json.loads((place.run_dir(run) / "result.json").read_text())
        assert result["strategy"] == run.args.get("strategy", "freeze")
    printed = "".join(o.get("text", "") for o in notebook.cells[-1].outputs)
    assert printed.count(".png") == 15
