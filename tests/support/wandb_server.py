"""W&B's server, on loopback: the network's far edge, and nothing else.

Turns the real client's requests into sweeps, runs, histories, files and artifacts that a test can
look at, and can be told to fail, to be silent, to stop a run, or to forget a sweep. It knows what
the client sends, not what the project does.

    with serve() as server:
        subprocess.run(["wandb", "sweep", "sweep.yaml"], env=os.environ | server.environment)
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlparse

import yaml

from tests.support.loopback import Handler, listening

ENTITY = "tester"
KEY = "k" * 20 + "0123456789" * 2


def _encoded(name: str) -> str:
    """An id as the server makes them."""
    return base64.b64encode(name.encode()).decode()


@dataclass
class Run:
    """What the server knows of a run."""

    name: str
    project: str = "uncategorized"
    sweep: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    """The sweep's parameters for it."""
    state: str = "pending"
    display_name: str = ""
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    exit_code: int | None = None
    should_stop: bool = False
    preempting: bool = False
    num_starts: int = 0
    agent: str | None = None

    @property
    def id(self) -> str:
        return _encoded(f"Run:v1:{self.name}")

    def values(self, key: str) -> list[Any]:
        """A metric's logged values."""
        return [row[key] for row in self.history if key in row]

    def artifact(self, kind: str) -> Artifact:
        return next(a for a in self.artifacts if a.kind == kind and a.state == "COMMITTED")


@dataclass
class Artifact:
    id: str
    name: str
    kind: str
    metadata: dict[str, Any]
    aliases: list[str]
    digest: str
    state: str = "PENDING"
    manifest: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Sweep:
    """A grid of runs, waiting, running and done."""

    name: str
    project: str
    config: dict[str, Any]
    waiting: list[str]
    state: str = "RUNNING"

    @property
    def id(self) -> str:
        return _encoded(f"Sweep:v1:{self.name}")


@dataclass
class View:
    """A saved view of a workspace, or a report."""

    project: str
    kind: str
    """`project-view` or `runs`, a report."""
    title: str
    spec: dict[str, Any]


@dataclass
class Fault:
    """What befalls the next `times` requests whose operation or path matches."""

    match: str
    kind: str
    """`status`, `drop`, or `delay`."""
    value: float = 500
    times: int = 1


class WandbServer:
    """The state behind the HTTP handler; every method holds the lock."""

    def __init__(self) -> None:
        self.url = ""
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.views: dict[str, View] = {}
        self.faults: list[Fault] = []
        self.silent_until = 0.0
        self.operations: list[str] = []
        self.bodies: list[bytes] = []
        """Everything that was sent, headers and uploads apart."""
        self.unknown: set[str] = set()
        self._agents: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()

    @property
    def environment(self) -> dict[str, str]:
        """What makes the client talk to this server, promptly."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_MODE": "online",
            "WANDB_ERROR_REPORTING": "false",
            "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.5",
        }

    def fail(self, match: str, status: int = 500, times: int = 1) -> None:
        self.faults.append(Fault(match, "status", status, times))

    def drop(self, match: str, times: int = 1) -> None:
        self.faults.append(Fault(match, "drop", 0, times))

    def delay(self, match: str, seconds: float, times: int = 1) -> None:
        self.faults.append(Fault(match, "delay", seconds, times))

    def be_silent(self, seconds: float) -> None:
        """Accept connections and answer nothing for a while."""
        self.silent_until = time.monotonic() + seconds

    def stop(self, run_name: str) -> None:
        """What early termination and the Stop button do."""
        self.runs[run_name].should_stop = True

    def sweep_runs(self, sweep: str) -> list[Run]:
        return [run for run in self.runs.values() if run.sweep == sweep]

    # What befalls a request

    def fault(self, what: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and re.search(fault.match, what):
                    fault.times -= 1
                    return fault
        return None

    # GraphQL

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        assert found, query
        name = found[1]
        with self._lock:
            self.operations.append(name)
            if types := re.findall(r"(\w+): *__type\(", query):  # clients up to 0.21 look first
                known = {"fields": [{"name": "createRunFiles"}], "inputFields": []}
                return {"data": dict.fromkeys(types, known)}
            answer: Callable[[dict[str, Any]], Any] | None = getattr(self, f"_on_{name}", None)
            if answer is None:
                self.unknown.add(name)
                return {"errors": [{"message": f"this server does not know {name}"}]}
            data = answer(variables)
            if data is None:
                return {"errors": [{"message": "not found"}], "status": 404}
            return {"data": data}

    def _on_Viewer(self, variables: dict[str, Any]) -> Any:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {
            "viewer": {
                "id": "VXNlcjox",
                "entity": ENTITY,
                "username": ENTITY,
                "name": ENTITY,
                "email": f"{ENTITY}@example.com",
                "admin": False,
                "flags": "{}",
                "teams": teams,
            }
        }

    _on_GetDefaultEntity = _on_Viewer

    def _on_ServerFeaturesQuery(self, variables: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def _on_OrganizationCoreWeaveOrganizationID(self, variables: dict[str, Any]) -> Any:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _on_XXHashDigestsEnabled(self, variables: dict[str, Any]) -> Any:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def _project(self, name: str) -> dict[str, Any]:
        return {"id": f"project-{name}", "name": name, "entity": {"id": "entity", "name": ENTITY}}

    # Runs

    def _on_RunResumeStatus(self, variables: dict[str, Any]) -> Any:
        run = self.runs.get(variables["name"])
        bucket = None
        if run is not None and run.num_starts:
            tail = [json.dumps(run.history[-1])] if run.history else []
            bucket = {
                "id": run.id,
                "name": run.name,
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.display_name,
                "logLineCount": len(run.console),
                "historyLineCount": len(run.history),
                "eventsLineCount": 0,
                "historyTail": json.dumps(tail),
                "eventsTail": "[]",
                "config": json.dumps(run.config),
                "tags": run.tags,
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"model": self._project(variables["project"]) | {"bucket": bucket}}

    def _on_UpsertBucket(self, variables: dict[str, Any]) -> Any:
        given = {k: v for k, v in variables.items() if v is not None}
        name = given.get("name") or self._name_of(given.get("id", ""))
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(name))
        if "project" in given:
            run.project = given["project"]
        if "config" in given:
            run.config = json.loads(given["config"])
        if "summaryMetrics" in given:
            run.summary = json.loads(given["summaryMetrics"])
        run.sweep = given.get("sweep", run.sweep)
        run.group = given.get("groupName", run.group)
        run.tags = given.get("tags", run.tags)
        run.display_name = given.get("displayName", run.display_name) or name
        if run.state != "running" and "host" in given:
            run.state, run.exit_code, run.preempting = "running", None, False
            run.num_starts += 1
        bucket = {
            "id": run.id,
            "name": run.name,
            "displayName": run.display_name,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": run.sweep,
            "project": self._project(run.project),
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _name_of(self, run_id: str) -> str:
        return base64.b64decode(run_id).decode().rpartition(":")[2]

    def _on_CreateRunFiles(self, variables: dict[str, Any]) -> Any:
        run = variables["run"]
        files = [{"name": f, "uploadUrl": f"{self.url}/upload/run/{run}/{f}"}
                 for f in variables["files"]]  # fmt: skip
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def _on_RunStoppedStatus(self, variables: dict[str, Any]) -> Any:
        run = self.runs.get(variables["runId"])
        return {"project": {"run": {"stopped": bool(run and run.should_stop)}}}

    def file_stream(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            run = self.runs[name]
            for file, chunk in (body.get("files") or {}).items():
                offset, lines = int(chunk["offset"]), chunk["content"]
                if file == "wandb-history.jsonl":
                    run.history[offset:] = map(json.loads, lines)
                elif file == "wandb-summary.json":
                    run.summary = json.loads(lines[-1])
                elif file == "output.log":
                    run.console[offset:] = lines
            run.preempting = run.preempting or bool(body.get("preempting"))
            if body.get("complete"):
                self._end(run, int(body.get("exitcode") or 0))
            return {"stopped": True} if run.should_stop and run.agent is None else {}

    def _end(self, run: Run, exit_code: int) -> None:
        run.exit_code = exit_code
        run.state = "finished" if exit_code == 0 else "failed"
        if exit_code and run.preempting:
            run.state = "preempted"
            if run.sweep:
                self.sweeps[run.sweep].waiting.insert(0, run.name)

    # Artifacts

    def _on_CreateArtifact(self, variables: dict[str, Any]) -> Any:
        given = variables.get("input", variables)
        number = next(self._numbers)
        collections = given.get("artifactCollectionNames") or []
        name = (collections or [given.get("artifactCollectionName")])[0]
        aliases = [a["alias"] for a in given.get("aliases") or []]
        artifact = Artifact(
            _encoded(f"Artifact:{number}"), str(name), given["artifactTypeName"],
            json.loads(given.get("metadata") or "{}"), aliases, given["digest"],
        )  # fmt: skip
        self.artifacts[artifact.id] = artifact
        self.runs[given["runName"]].artifacts.append(artifact)
        described = {
            "id": artifact.id,
            "state": "PENDING",
            "artifactSequence": {"id": f"sequence-{name}", "latestArtifact": None},
        }
        return {"createArtifact": {"artifact": described}}

    def _manifest_url(self, artifact: str) -> str:
        return f"{self.url}/upload/manifest/{artifact}/wandb_manifest.json"

    def _on_CreateArtifactManifest(self, variables: dict[str, Any]) -> Any:
        artifact = variables["artifactID"]
        file = {
            "id": f"manifest-{artifact}",
            "uploadUrl": self._manifest_url(artifact),
            "uploadHeaders": [],
        }
        return {"createArtifactManifest": {"artifactManifest": {"id": artifact, "file": file}}}

    def _on_UpdateArtifactManifest(self, variables: dict[str, Any]) -> Any:
        artifact = variables["artifactManifestID"]
        created = self._on_CreateArtifactManifest({"artifactID": artifact})
        return {"updateArtifactManifest": created["createArtifactManifest"]}

    def _on_CreateArtifactFiles(self, variables: dict[str, Any]) -> Any:
        edges = []
        for file in variables.get("input", variables)["artifactFiles"]:
            artifact, name = file["artifactID"], file["name"]
            edges.append({
                "node": {
                    "storagePath": f"{artifact}/{name}",
                    "displayName": name,
                    "uploadUrl": f"{self.url}/upload/artifact/{artifact}/{name}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": artifact},
                }
            })  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, variables: dict[str, Any]) -> Any:
        artifact = self.artifacts[variables["artifactID"]]
        artifact.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _on_ArtifactType(self, variables: dict[str, Any]) -> Any:
        return {"project": {"artifactType": None, "artifact": None}}

    def _on_ArtifactByIDShort(self, variables: dict[str, Any]) -> Any:  # up to 0.21
        artifact = self.artifacts[variables["id"]]
        project = {"entityName": ENTITY, "name": "finetune"}
        described = {
            "id": artifact.id,
            "artifactSequence": {"project": project, "name": artifact.name},
            "versionIndex": 0,
            "artifactType": {"name": artifact.kind},
            "description": None,
            "metadata": json.dumps(artifact.metadata),
            "aliases": [],
            "tags": [],
            "historyStep": None,
            "state": artifact.state,
            "currentManifest": {"file": {"directUrl": self._manifest_url(artifact.id)}},
            "commitHash": None,
            "fileCount": len(artifact.files),
            "createdAt": "2026-01-01T00:00:00",
            "updatedAt": None,
        }
        return {"artifact": described}

    def _on_ClientIDMapping(self, variables: dict[str, Any]) -> Any:
        return {"clientIDMapping": None}

    def _on_UseArtifact(self, variables: dict[str, Any]) -> Any:
        given = variables.get("input", variables)
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    def upload(self, kind: str, owner: str, name: str, content: bytes) -> None:
        with self._lock:
            if kind == "run":
                self.runs[owner].files[name] = content
            elif kind == "manifest":
                self.artifacts[owner].manifest = content
            else:
                self.artifacts[owner].files[name] = content

    # Views and reports

    def _on_GetProjects(self, variables: dict[str, Any]) -> Any:
        names = sorted({run.project for run in self.runs.values()})
        made = {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
        made["entityName"] = ENTITY
        edges = [{"node": self._project(name) | made, "cursor": name} for name in names]
        page = {"endCursor": None, "hasNextPage": False}
        return {"models": {"edges": edges, "pageInfo": page}}

    _on_Projects = _on_GetProjects  # up to 0.21

    def _on_ProjectInternalId(self, variables: dict[str, Any]) -> Any:
        known = any(run.project == variables["projectName"] for run in self.runs.values())
        return {"project": {"id": "project", "internalId": "1"} if known else None}

    def _on_UpsertView2(self, variables: dict[str, Any]) -> Any:
        assert (variables["entityName"], variables["type"]) == (ENTITY, "project-view")
        return self._saved_view(variables)

    def _on_upsertView(self, variables: dict[str, Any]) -> Any:
        assert (variables["entityName"], variables["type"]) == (ENTITY, "runs")
        return self._saved_view(variables)

    def _saved_view(self, variables: dict[str, Any]) -> Any:
        name = variables.get("id") or _encoded(f"View:{next(self._numbers)}")
        inserted = name not in self.views
        self.views[name] = view = View(
            variables["projectName"], variables["type"], variables["displayName"],
            json.loads(variables["spec"]),
        )  # fmt: skip
        described = {
            "id": name,
            "type": view.kind,
            "name": variables["name"],
            "displayName": view.title,
            "description": variables.get("description"),
            "project": {"id": "project", "name": view.project, "entityName": ENTITY},
            "spec": variables["spec"],
            "updatedAt": "2026-01-01T00:00:00",
        }
        return {"upsertView": {"view": described, "inserted": inserted}}

    # Sweeps and their agents

    def _on_UpsertSweep(self, variables: dict[str, Any]) -> Any:
        if variables.get("id"):
            sweep = next(s for s in self.sweeps.values() if s.id == variables["id"])
            self._set_state(sweep, variables["state"])
        else:
            sweep = self.add_sweep(
                yaml.safe_load(variables["config"]), variables.get("projectName") or "uncategorized"
            )
        described = {"name": sweep.name, "project": self._project(sweep.project)}
        return {"upsertSweep": {"sweep": described, "configValidationWarnings": []}}

    def add_sweep(self, config: dict[str, Any], project: str) -> Sweep:
        """Lay out a grid; its runs wait for agents."""
        name = f"sweep{next(self._numbers)}"
        choices = {
            key: given["values"] if "values" in given else [given["value"]]
            for key, given in config["parameters"].items()
        }
        sweep = Sweep(name, config.get("project") or project, config, [])
        for values in itertools.product(*choices.values()):
            run = Run(f"run{next(self._numbers)}", sweep.project, name)
            run.args = dict(zip(choices, values, strict=True))
            self.runs[run.name] = run
            sweep.waiting.append(run.name)
        self.sweeps[name] = sweep
        return sweep

    def _set_state(self, sweep: Sweep, state: str) -> None:
        sweep.state = state
        if state in ("CANCELED", "FINISHED"):
            sweep.waiting.clear()
        if state == "CANCELED":
            for run in self.sweep_runs(sweep.name):
                run.should_stop = run.should_stop or run.state == "running"

    def _on_UpsertSweepState(self, variables: dict[str, Any]) -> Any:
        return self._on_UpsertSweep(variables)

    def _on_SweepWithRuns(self, variables: dict[str, Any]) -> Any:
        sweep = self.sweeps.get(variables["sweep"])
        if sweep is None:
            return {"project": {"sweep": None}}
        return {
            "project": {
                "sweep": {
                    "id": sweep.id,
                    "name": sweep.name,
                    "method": sweep.config["method"],
                    "state": sweep.state,
                    "config": yaml.safe_dump(sweep.config),
                    "controller": None,
                    "scheduler": None,
                    "runs": {"edges": []},
                }
            }
        }

    def _on_GetSweep(self, variables: dict[str, Any]) -> Any:
        sweep = self.sweeps.get(variables["name"])
        described = sweep and {
            "id": sweep.id,
            "name": sweep.name,
            "displayName": sweep.config.get("name"),
            "method": sweep.config["method"],
            "state": sweep.state,
            "config": yaml.safe_dump(sweep.config),
            "runCount": len(self.sweep_runs(sweep.name)),
            "runCountExpected": None,
            "bestLoss": None,
        }
        return {"project": {"sweep": described}}

    _on_Sweep = _on_GetSweep  # up to 0.21

    def _on_Runs(self, variables: dict[str, Any]) -> Any:
        filters = json.loads(variables.get("filters") or "{}")
        (condition,) = filters.get("$and", [filters])
        runs = [
            run
            for run in self.runs.values()
            if run.project == variables["project"]
            and run.sweep == condition.get("sweep", run.sweep)
        ]
        first = int(variables.get("cursor") or 0)
        end = first + variables["perPage"]
        edges = [{"node": self._described(run), "cursor": str(i)}
                 for i, run in enumerate(runs[first:end], first + 1)]  # fmt: skip
        page = {"endCursor": str(end), "hasNextPage": end < len(runs)}
        found = {"edges": edges, "pageInfo": page}
        return {"project": {"internalId": "1", "runCount": len(runs), "readOnly": False,
                            "runs": found}}  # fmt: skip

    def _on_RunState(self, variables: dict[str, Any]) -> Any:
        return self._on_Run(variables)

    def _on_Run(self, variables: dict[str, Any]) -> Any:
        return {
            "project": {"internalId": "1", "run": self._described(self.runs[variables["name"]])}
        }

    def _described(self, run: Run) -> dict[str, Any]:
        return {
            "id": run.id,
            "projectId": "1",
            "tags": run.tags,
            "name": run.name,
            "displayName": run.display_name,
            "sweepName": run.sweep,
            "state": run.state,
            "config": json.dumps(run.config),
            "group": run.group,
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "systemMetrics": "{}",
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "historyKeys": None,
            "user": {"name": ENTITY, "username": ENTITY},
        }

    def _on_RunFiles(self, variables: dict[str, Any]) -> Any:
        run = self.runs[variables["name"]]
        names = variables["fileNames"] or run.files
        edges = []
        for name in names:
            if name in run.files:
                url = f"{self.url}/upload/run/{run.name}/{name}"
                size = len(run.files[name])
                node = {"id": name, "name": name, "url": url, "directUrl": url, "sizeBytes": size,
                        "mimetype": None, "updatedAt": None, "md5": None}  # fmt: skip
                edges.append({"node": node, "cursor": name})
        page = {"endCursor": None, "hasNextPage": False}
        files = {"edges": edges, "pageInfo": page}
        found = {"fileCount": len(edges), "files": files}
        return {"project": {"internalId": "1", "run": found}}

    def _on_GetSweepState(self, variables: dict[str, Any]) -> Any:
        return {"project": {"sweep": {"state": self.sweeps[variables["sweep"]].state}}}

    def _on_CreateAgent(self, variables: dict[str, Any]) -> Any:
        name = f"agent{next(self._numbers)}"
        self._agents[name] = variables["sweep"]
        return {"createAgent": {"agent": {"id": name}}}

    def _on_Heartbeat(self, variables: dict[str, Any]) -> Any:
        agent = variables["id"]
        sweep = self.sweeps.get(self._agents[agent])
        if sweep is None:
            return None
        running = json.loads(variables["runState"])
        commands: list[dict[str, Any]] = [
            {"type": "stop", "run_id": name} for name in running if self.runs[name].should_stop
        ]
        for run in self.sweep_runs(sweep.name):
            lost = run.agent == agent and run.name not in running
            if lost and run.state in ("running", "pending") and run.name not in sweep.waiting:
                run.state = "crashed"  # its process is gone, and it never said goodbye
        if not running:
            if sweep.waiting:
                commands.append(self._next_run(sweep, agent))
            elif not any(r.state in ("running", "pending") for r in self.sweep_runs(sweep.name)):
                commands.append({"type": "exit"})
        return {"agentHeartbeat": {"agent": {"id": agent}, "commands": json.dumps(commands)}}

    def _next_run(self, sweep: Sweep, agent: str) -> dict[str, Any]:
        run = self.runs[sweep.waiting.pop(0)]
        again = run.num_starts > 0
        run.agent, run.should_stop = agent, False
        run.state = "pending"
        args = {key: {"value": value} for key, value in run.args.items()}
        if again:
            args["_wandb"] = {"value": {"code_path": "code/agent.py"}}
        return {
            "type": "resume" if again else "run",
            "run_id": run.name,
            "args": args,
            "program": sweep.config.get("program"),
        }


class _Handler(Handler):
    server_state: WandbServer

    def do_POST(self) -> None:
        self._handle()

    do_PUT = do_GET = do_POST

    def _handle(self) -> None:
        state = self.server_state
        body = self._body()
        path = unquote(urlparse(self.path).path)
        what = path
        asked: dict[str, Any] = {}
        if path == "/graphql":
            asked = json.loads(body)
            what = asked["query"].partition("{")[0]
        if not path.startswith("/upload/"):
            state.bodies.append(body)
        if (left := state.silent_until - time.monotonic()) > 0:
            time.sleep(left)
            fault: Fault | None = Fault("", "drop")
        else:
            fault = state.fault(what)
        if fault and fault.kind == "drop":
            self._drop()
        elif fault and fault.kind == "status":
            self._answer(int(fault.value), {"error": "as the test asked"})
        else:
            time.sleep(fault.value if fault else 0)
            self._serve(path, asked, body)

    def _serve(self, path: str, asked: dict[str, Any], body: bytes) -> None:
        state = self.server_state
        if path == "/graphql":
            answer = state.graphql(asked["query"], asked.get("variables") or {})
            self._answer(answer.pop("status", 200), answer)
        elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            self._answer(200, state.file_stream(found[1], json.loads(body)))
        elif found := re.fullmatch(r"/upload/(\w+)/([^/]+)/(.*)", path):
            if self.command == "GET":
                is_manifest = found[1] == "manifest"
                content = (
                    state.artifacts[found[2]].manifest
                    if is_manifest
                    else state.runs[found[2]].files[found[3]]
                )
                self._send(200, "application/octet-stream", content)
            else:
                state.upload(found[1], found[2], found[3], body)
                self._answer(200, {})
        elif path.startswith("/sdk/otel/"):  # the client's telemetry, sent now and then
            self._answer(200, {})
        else:
            state.unknown.add(f"{self.command} {path}")
            self._answer(404, {"error": "not found"})

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)


@contextmanager
def serve() -> Iterator[WandbServer]:
    state = WandbServer()
    with listening(type("Serving", (_Handler,), {"server_state": state})) as address:
        state.url = address
        yield state
