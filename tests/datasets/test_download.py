from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.config.backbones import BACKBONES
from finetune.datasets import download as module
from finetune.datasets import fetch as fetch_module
from finetune.datasets.archive import ExpectedDataset
from finetune.datasets.download import checkpoints_dir, download, fetch_data, fetch_weights
from finetune.datasets.fetch import PartialDownload, fetch
from finetune.system.errors import ConfigError, DataError, WeightsError
from tests.conftest import ROOT
from tests.support.file_server import FileServer, serve
from tests.support.loopback import Handler, listening
from tests.support.picture_trees import tree, zipped

FILES = tree()
EXPECTED = ExpectedDataset(frozenset({"Aves", "Fungi"}), {"train": 6, "val": 4})


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve(zipped(FILES)) as served:
        yield served


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "data" / "inaturalist_12K"


@pytest.fixture(autouse=True)
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "RETRY_WAITS_SECONDS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(fetch_module, "TIMEOUT_SECONDS", 0.3)


def read_files(folder: Path) -> dict[str, bytes]:
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "manifest.json"}


def get(server: FileServer, target: Path) -> None:
    fetch_data(target, server.url, EXPECTED)


def test_a_download_leaves_only_the_data_and_its_manifest(server: FileServer, target: Path) -> None:
    get(server, target)
    assert read_files(target) == FILES
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["archive_sha256"] == hashlib.sha256(server.content).hexdigest()
    assert manifest["files"].keys() == FILES.keys()
    for name, (size, sha256) in manifest["files"].items():
        assert (size, sha256) == (len(FILES[name]), hashlib.sha256(FILES[name]).hexdigest())


@pytest.mark.parametrize("seed", range(3))
def test_a_download_interrupted_ten_times_is_complete(
    server: FileServer, target: Path, seed: int
) -> None:
    chance = random.Random(seed)
    server.cuts = [chance.randrange(1, len(server.content) // 11) for _ in range(10)]
    get(server, target)
    assert read_files(target) == FILES
    assert len(server.requests) == 11
    assert server.num_sent == len(server.content), "bytes were sent twice"


def test_each_call_resumes_where_the_last_was_interrupted(server: FileServer, target: Path) -> None:
    for _ in range(10):
        server.cuts = [300, 0, 0, 0]
        with pytest.raises(
            DataError, match=r"cut off at \d+ of \d+ bytes.*kept in .*data.zip.part"
        ):
            get(server, target)
    server.cuts = []
    get(server, target)
    assert read_files(target) == FILES
    assert server.num_sent == len(server.content)


def test_a_server_that_ignores_ranges_is_supported(server: FileServer, target: Path) -> None:
    server.ranges = False
    size = len(server.content)
    server.cuts = [size // 2, size // 3, size * 3 // 4]
    get(server, target)
    assert read_files(target) == FILES
    assert server.requests[1] == f"bytes={size // 2}-"


def test_a_chunked_response_without_a_length_is_supported(server: FileServer, target: Path) -> None:
    server.chunked = True
    get(server, target)
    assert read_files(target) == FILES


def test_a_download_from_a_server_without_etags_resumes(server: FileServer, target: Path) -> None:
    server.etag = None
    server.cuts = [500, 700]
    get(server, target)
    assert read_files(target) == FILES
    assert server.num_sent == len(server.content)


def test_a_file_replaced_on_the_server_is_downloaded_from_the_start(
    server: FileServer, target: Path
) -> None:
    server.cuts = [700, 0, 0, 0]
    with pytest.raises(DataError, match="kept"):
        get(server, target)
    part = target.parent / "data.zip.part"
    part.write_bytes(b"?" * part.stat().st_size)  # as if of another file
    server.etag = '"two"'
    get(server, target)
    assert read_files(target) == FILES


def test_a_stalled_connection_is_retried(
    server: FileServer, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.stalls_seconds = [1.0]
    get(server, target)
    assert read_files(target) == FILES
    assert "retrying in" in capsys.readouterr().out


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_error_is_retried(server: FileServer, target: Path, status: int) -> None:
    server.statuses = [status, status]
    get(server, target)
    assert read_files(target) == FILES


def test_it_gives_up_after_the_last_retry(server: FileServer, target: Path) -> None:
    server.statuses = [500] * 100
    with pytest.raises(DataError, match=r"answered 500.*all 3 retries failed"):
        get(server, target)
    assert len(server.requests) == 4


def test_a_missing_file_is_not_retried(server: FileServer, target: Path) -> None:
    server.statuses = [404]
    with pytest.raises(DataError, match="404"):
        get(server, target)
    assert len(server.requests) == 1


def test_a_length_longer_than_the_file_is_refused_and_the_bytes_are_kept(
    server: FileServer, target: Path
) -> None:
    server.length_lie = 100
    with pytest.raises(DataError, match=rf"{len(server.content)}, but") as caught:
        get(server, target)
    part = target.parent / "data.zip.part"
    assert str(part) in str(caught.value)
    assert part.read_bytes() == server.content
    assert not target.exists()


def test_a_length_shorter_than_the_file_is_refused_as_damaged(
    server: FileServer, target: Path
) -> None:
    server.length_lie = -100
    with pytest.raises(DataError, match=r"damaged.* it was removed"):
        get(server, target)
    assert list(target.parent.iterdir()) == []


def test_a_damaged_archive_is_removed_and_the_next_call_downloads_it_again(
    server: FileServer, target: Path
) -> None:
    server.damage = [server.content.index(b"train/Fungi/001.jpg") + 100]
    words = r"damaged in '.*train/Fungi/001.jpg'.*it was removed: run the same command again"
    with pytest.raises(DataError, match=words):
        get(server, target)
    assert list(target.parent.iterdir()) == []
    get(server, target)
    assert read_files(target) == FILES
    assert server.requests == [None, None]


@pytest.mark.parametrize("from_end", [5, 20])
def test_a_damaged_list_of_files_is_refused_and_removed(
    server: FileServer, target: Path, from_end: int
) -> None:
    server.damage = [len(server.content) - from_end]
    with pytest.raises(DataError, match="it was removed"):
        get(server, target)
    assert list(target.parent.iterdir()) == []


def test_an_unsafe_archive_is_refused_and_removed(target: Path) -> None:
    words = "leads out of its folder; it was removed"
    with (
        serve(zipped(FILES | {"../../outside.jpg": b"x"})) as server,
        pytest.raises(DataError, match=words),
    ):
        get(server, target)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("page", [b"<html>please log in</html>", b""])
def test_a_page_instead_of_an_archive_is_refused_and_removed(
    server: FileServer, target: Path, page: bytes
) -> None:
    archive, server.content = server.content, page
    words = "not a zip file.*starts with b'<html>please" if page else "sent an empty file"
    with pytest.raises(DataError, match=words):
        get(server, target)
    assert list(target.parent.iterdir()) == []
    server.content = archive
    get(server, target)
    assert read_files(target) == FILES


def test_a_page_in_the_middle_of_a_download_leaves_the_received_bytes(
    server: FileServer, target: Path
) -> None:
    server.cuts = [4000, 0, 0, 0]
    with pytest.raises(DataError, match="kept"):
        get(server, target)
    archive, server.content = server.content, b"<html>please log in</html>"
    server.ranges, server.etag, server.chunked = False, None, True
    with pytest.raises(DataError, match=r"reports no size.* 4000 bytes are kept"):
        get(server, target)
    server.content, server.ranges, server.etag, server.chunked = archive, True, '"one"', False
    get(server, target)
    assert read_files(target) == FILES
    assert server.requests[-1] == "bytes=4000-"


def test_a_part_longer_than_the_servers_file_is_removed(server: FileServer, target: Path) -> None:
    target.parent.mkdir()
    part = target.parent / "data.zip.part"
    part.write_bytes(bytes(len(server.content) + 1))
    with pytest.raises(DataError, match="it was removed"):
        get(server, target)
    assert not part.exists()
    get(server, target)
    assert read_files(target) == FILES


@pytest.mark.parametrize("length", ["-5", "many", ""])
def test_a_length_that_is_not_a_number_is_ignored(target: Path, length: str) -> None:
    content = zipped(FILES)

    class Odd(Handler):
        def do_GET(self) -> None:
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(content)

    with listening(Odd) as address:
        fetch_data(target, f"{address}/data.zip", EXPECTED)
    assert read_files(target) == FILES


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({n: c for n, c in FILES.items() if n != "train/Aves/000.jpg"}, "6 pictures, but has 5"),
        (FILES | {"train/Aliens/1.jpg": b"x"}, "Aliens"),
        ({n.replace("val/", "test/"): c for n, c in FILES.items()}, "no pictures in val/"),
        ({n.replace("val/", "other/"): c for n, c in FILES.items()}, "one folder with train/CLASS"),
    ],
)
def test_another_data_set_under_the_official_url_is_refused(
    files: dict[str, bytes], words: str, target: Path
) -> None:
    part = target.parent / "data.zip.part"
    with serve(zipped(files)) as server, pytest.raises(DataError, match=words) as caught:
        get(server, target)
    assert f"{part} is kept: remove it" in str(caught.value)
    assert not target.exists()
    assert part.read_bytes() == server.content


def test_the_part_is_removed_as_soon_as_the_folder_exists(
    server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later call would remove it, as the folder is complete."""

    def stop(data_dir: Path, counts: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_print_summary", stop)
    with pytest.raises(KeyboardInterrupt):
        get(server, target)
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_a_second_call_sends_no_request_and_changes_no_file(
    server: FileServer, target: Path
) -> None:
    get(server, target)
    before = {p: p.stat().st_mtime_ns for p in target.rglob("*")}
    server.requests.clear()
    get(server, target)
    assert server.requests == []
    assert {p: p.stat().st_mtime_ns for p in target.rglob("*")} == before


def test_a_missing_file_is_reported(server: FileServer, target: Path) -> None:
    get(server, target)
    (target / "val/Aves/001.jpg").unlink()
    with pytest.raises(DataError, match=r"incomplete.*1 files.*val/Aves/001.jpg"):
        get(server, target)


def test_other_files_are_never_overwritten(server: FileServer, target: Path) -> None:
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="did not make"):
        get(server, target)
    assert (target / "thesis.txt").read_text() == "mine"
    assert server.requests == []


def test_an_archive_of_the_same_name_is_not_taken_for_the_official_one(
    server: FileServer, target: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "data.zip"
    archive.write_bytes(zipped(tree(train=1)))
    module.unpack_archive(target, archive)
    with pytest.raises(DataError, match=r"6 pictures, but has 2\); pass another --data_dir"):
        get(server, target)


def test_a_file_a_link_loop_and_a_mount_point_are_refused(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda place: place == tmp_path / "disk")
    refused = {"thesis.txt": "Not a directory", "loop": "Too many levels", "disk": "mount point"}
    for place, words in refused.items():
        with pytest.raises(DataError, match=words):
            get(server, tmp_path / place)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert server.requests == []


def test_a_link_to_another_disk_is_followed(server: FileServer, target: Path) -> None:
    elsewhere = target.parent / "elsewhere/data"
    target.parent.mkdir()
    target.symlink_to(elsewhere)
    get(server, target)
    assert read_files(elsewhere) == FILES
    assert target.is_symlink()


def test_a_data_set_that_this_command_did_not_make_is_left_alone(
    server: FileServer, target: Path
) -> None:
    get(server, target)
    (target / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"did not make.*needs no download"):
        get(server, target)
    assert read_files(target) == FILES
    assert len(server.requests) == 1


def test_too_little_space_is_reported_before_anything_is_received(
    server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nearly_full(path: Path) -> Any:
        return shutil._ntuple_diskusage(10**12, 10**12, 1000)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    with pytest.raises(DataError, match="free"):
        get(server, target)
    assert list(target.parent.iterdir()) == []
    assert server.num_sent < 1 << 17, "more than the first block was requested"


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://host/x.zip", "x.zip", "", "http://", "http:///x.zip"),
        *("http://[host/x.zip", "http://host:port/x.zip", "http://my host/x.zip"),
    ],
)
def test_an_invalid_url_is_refused_at_once(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="url: got"):
        fetch_data(tmp_path / "data", url, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["my data.zip", "donn\u00e9es.zip", "my%20data.zip", "data.zip?a=b c"]
)
def test_spaces_and_non_ascii_letters_in_a_url_are_supported(
    server: FileServer, target: Path, name: str
) -> None:
    server.cuts = [400]
    fetch_data(target, server.url.replace("data.zip", name), EXPECTED)
    assert read_files(target) == FILES
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_a_token_in_the_url_is_never_stored(server: FileServer, target: Path) -> None:
    url = f"{server.url}?signature=5ecret"
    server.cuts = [400, 0, 0, 0]
    with pytest.raises(DataError) as caught:
        fetch_data(target, url, EXPECTED)
    assert "5ecret" not in str(caught.value)
    assert "5ecret" not in (target.parent / "data.zip.part.json").read_text()
    for _ in range(2):  # the second time, the data exists
        fetch_data(target, url, EXPECTED)
    assert json.loads((target / "manifest.json").read_text())["source"] == server.url
    assert b"5ecret" not in b"".join(p.read_bytes() for p in target.rglob("*.json"))


def test_a_new_token_resumes_an_interrupted_download(server: FileServer, target: Path) -> None:
    server.cuts = [400, 0, 0, 0]
    with pytest.raises(DataError, match="400 bytes are kept"):
        fetch_data(target, f"{server.url}?signature=1", EXPECTED)
    fetch_data(target, f"{server.url}?signature=2", EXPECTED)
    assert read_files(target) == FILES
    assert server.num_sent == len(server.content)


def test_a_user_name_and_password_in_the_url_are_sent_but_not_stored(
    server: FileServer, target: Path
) -> None:
    fetch_data(target, server.url.replace("//", "//me:5ecret@"), EXPECTED)
    assert server.authorization == "Basic bWU6NWVjcmV0"
    assert json.loads((target / "manifest.json").read_text())["source"] == server.url


def test_a_second_process_is_refused(server: FileServer, target: Path) -> None:
    other = target.with_name("other")  # would write to the same NAME.zip.part
    with module._locked(target.parent):
        for folder in (target, other):
            with pytest.raises(DataError, match="another process"):
                get(server, folder)
    assert server.requests == []
    get(server, target)
    assert read_files(target) == FILES


def test_each_retry_waits_longer_until_bytes_arrive(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("finetune.datasets.fetch.time", SimpleNamespace(sleep=waits.append))
    server.statuses = [500, 500, 200, 500, 500, 200]
    server.cuts = [100]
    monkeypatch.setattr(fetch_module, "RETRY_WAITS_SECONDS", (1, 2, 4))
    fetch(PartialDownload(server.url, tmp_path))
    assert waits == [1, 2, 1, 2, 4], "the waits must start again after bytes have arrived"


def test_a_write_error_keeps_the_received_bytes(server: FileServer, target: Path) -> None:
    command = f"{sys.executable} -m finetune download --data_dir {target} --url {server.url}"
    ended = subprocess.run(
        ["bash", "-c", f"ulimit -f 4; exec {command}"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    assert ended.returncode == 1
    assert "cannot be written: File too large. 4096 bytes are kept" in ended.stderr
    get(server, target)
    assert read_files(target) == FILES
    assert server.requests[1:] == ["bytes=4096-"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_download_stopped_by_a_signal_keeps_its_bytes(
    server: FileServer, target: Path, signum: signal.Signals
) -> None:
    server.content = zipped(tree(train=60))
    server.slow_block = (1 << 14, 0.2)
    command = [sys.executable, "-m", "finetune", "download", "--data_dir", str(target)]
    process = subprocess.Popen([*command, "--url", server.url], cwd=ROOT, stderr=subprocess.PIPE)
    part = target.parent / "data.zip.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > 600) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signum
    assert b"Traceback" not in errors
    size = part.stat().st_size
    assert 600 < size < len(server.content)
    assert part.read_bytes() == server.content[:size]
    server.slow_block = None
    fetch_data(target, server.url, None)
    assert len(read_files(target)) == 124
    # `num_sent` may lag: the thread of the broken connection may still be counting.
    assert server.requests[1:] == [f"bytes={size}-"]


@pytest.fixture
def weights_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    content = bytes(random.Random(0).randbytes(5000))
    promised = hashlib.sha256(content).hexdigest()[:8]
    name = f"resnet18-{promised}.pth"
    with serve(content, name) as served:
        monkeypatch.setattr(module, "WEIGHTS_SERVER", served.url.removesuffix(name))
        entry = replace(BACKBONES["resnet18"], weights_file=name)
        monkeypatch.setitem(BACKBONES, "resnet18", entry)
        yield served


def test_weights_are_saved_where_torch_hub_looks(
    weights_server: FileServer, torch_home: Path
) -> None:
    import torch

    weights_server.cuts = [1000, 2000]
    fetch_weights(weights_server.url)
    place = Path(torch.hub.get_dir()) / "checkpoints"
    (file,) = place.iterdir()
    assert file.read_bytes() == weights_server.content
    assert place.is_relative_to(torch_home)
    fetch_weights(weights_server.url)
    assert len(weights_server.requests) == 3, "the second call sent a request"


@pytest.mark.parametrize(
    "environment",
    [{}, {"TORCH_HOME": "/a/b"}, {"XDG_CACHE_HOME": "/c"}, {"TORCH_HOME": "~/x"}],
)
def test_the_weights_folder_is_that_of_torch_hub(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert checkpoints_dir() == Path(torch.hub.get_dir()) / "checkpoints"


@pytest.mark.parametrize("model", BACKBONES)
def test_the_urls_of_the_weights_are_those_of_torchvision(model: str) -> None:
    from torchvision.models import get_model_weights

    known = get_model_weights(BACKBONES[model].function)["IMAGENET1K_V1"].url
    assert known == module.WEIGHTS_SERVER + module.weights_name(model)


def test_the_weights_of_several_networks_are_downloaded(
    weights_server: FileServer, target: Path, torch_home: Path
) -> None:
    with pytest.raises(ConfigError, match="no ImageNet weights of tiny are known; of resnet18"):
        download(target, weights_only=["resnet18", "tiny"])
    assert weights_server.requests == []
    download(target, weights_only=["resnet18", "resnet18"])
    assert len(list((torch_home / "hub/checkpoints").iterdir())) == 1


def test_weights_with_a_wrong_hash_are_refused_and_removed(
    weights_server: FileServer, torch_home: Path
) -> None:
    weights_server.damage = [77]
    with pytest.raises(WeightsError, match="its name promises"):
        fetch_weights(weights_server.url)
    assert [p for p in torch_home.rglob("*") if p.is_file()] == []
    fetch_weights(weights_server.url)


def test_damaged_weights_are_downloaded_again(weights_server: FileServer) -> None:
    fetch_weights(weights_server.url)
    (file,) = checkpoints_dir().iterdir()
    file.write_bytes(b"damaged")
    fetch_weights(weights_server.url)
    assert file.read_bytes() == weights_server.content


def test_weights_are_downloaded_alone_and_with_the_data(
    server: FileServer, weights_server: FileServer, target: Path, torch_home: Path
) -> None:
    download(target, weights_only=[])
    assert not target.exists()
    shutil.rmtree(torch_home)
    download(target, url=server.url)
    assert read_files(target) == FILES
    assert len(list((torch_home / "hub/checkpoints").iterdir())) == 1


def test_a_local_archive_is_unpacked_and_kept(
    weights_server: FileServer, target: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "mine.zip"
    archive.write_bytes(zipped(FILES, root=""))
    download(target, archive=archive)
    assert read_files(target) == FILES
    assert archive.exists()


@pytest.mark.parametrize(
    "given",
    [{"url": "http://x", "archive": Path("x")}, {"weights_only": [], "url": "http://x"}],
)
def test_contradicting_options_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        download(Path("nowhere"), **given)


def test_the_downloader_imports_no_torch() -> None:
    code = "import sys, finetune.datasets.download; sys.exit('torch' in sys.modules)"
    environment = dict(os.environ)
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0
    )
