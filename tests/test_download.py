"""Downloads against a local server that breaks off, refuses, and lies."""

import hashlib
import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import finetuning.download as module
from finetuning.download import ARCHIVES, Archive, main
from text.data import read_split
from text.tasks import TASKS

TRAIN = '{"sentence": "甲", "label": 100}\n' * 3000


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(files, links=()):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            item = tarfile.TarInfo(name)
            item.size = len(content.encode())
            archive.addfile(item, io.BytesIO(content.encode()))
        for name, target in links:
            item = tarfile.TarInfo(name)
            item.type, item.linkname = tarfile.SYMTYPE, target
            archive.addfile(item)
    return out.getvalue()


class Server:
    """Serves `files`; of those in `breaks`, so many bytes an answer. Records the requests."""

    def __init__(self):
        self.files, self.breaks, self.ranges, self.requests, self.busy = {}, {}, True, [], 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append((self.path, self.headers.get("Range")))
                name = self.path.lstrip("/")
                if server.busy:
                    server.busy -= 1
                    self.send_error(503)
                    return
                if name not in server.files:
                    self.send_error(404)
                    return
                content, start = server.files[name], 0
                if server.ranges and (wanted := self.headers.get("Range")):
                    start = int(wanted.removeprefix("bytes=").rstrip("-"))
                    if start >= len(content):
                        self.send_error(416)
                        return
                    self.send_response(206)
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start:][: server.breaks.get(name, len(content))])

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = Server()
    yield served
    served.http.shutdown()
    served.http.server_close()


@pytest.fixture
def tnews(server, monkeypatch):
    """TNEWS on the server, and its digest as the published one."""
    content = zipped({"train.json": TRAIN, "sub/dev.json": TRAIN[:100], "__MACOSX/._train.json": "x"})
    server.files["tnews_public.zip"] = content
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    monkeypatch.setitem(ARCHIVES, "tnews", Archive(ARCHIVES["tnews"].url, digest))
    return content


def fetch(server, folder, *options):
    return main(["--data_dir", str(folder), "--mirror", server.address, *options])


def test_a_task_is_fetched_and_read(server, tnews, tmp_path):
    assert fetch(server, tmp_path, "--tasks", '["TNEWS"]') == 0
    assert sorted(path.name for path in (tmp_path / "tnews").iterdir()) == ["dev.json", "train.json"]
    assert len(read_split(TASKS["tnews"], tmp_path, "train").examples) == 3000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tnews"]
    # What is there needs no network
    before = len(server.requests)
    assert fetch(server, tmp_path, "--tasks", '["tnews"]') == 0
    assert len(server.requests) == before
    assert fetch(server, tmp_path, "--overwrite", "--tasks", "tnews") == 0
    assert len(server.requests) == before + 1


@pytest.mark.parametrize("ranges", [True, False])
def test_what_broke_off_goes_on(server, tnews, tmp_path, capsys, ranges):
    """With a server that serves ranges, each attempt adds to the last; another starts anew."""
    server.ranges = ranges
    server.breaks["tnews_public.zip"] = len(tnews) // 20
    assert fetch(server, tmp_path, "--tasks", '["tnews"]') == 2
    partial = tmp_path / ".tnews_public.zip.partial"
    assert f"{server.address}/tnews_public.zip: broke off after" in capsys.readouterr().err
    assert partial.stat().st_size == (6 if ranges else 1) * (len(tnews) // 20)
    assert not (tmp_path / "tnews").exists()
    if ranges:
        assert server.requests[-1][1] == f"bytes={5 * (len(tnews) // 20)}-"
    server.breaks.clear()
    assert fetch(server, tmp_path, "--tasks", '["tnews"]') == 0
    assert (tmp_path / "tnews" / "train.json").read_text(encoding="utf-8") == TRAIN
    assert not partial.exists()


def test_a_busy_server_is_asked_again(server, tnews, tmp_path):
    server.busy = 3
    assert fetch(server, tmp_path, "--tasks", '["tnews"]') == 0
    assert len(server.requests) == 4


def test_other_tasks_go_on_where_one_is_missing(server, tnews, tmp_path, capsys):
    assert fetch(server, tmp_path, "--tasks", "csl", "tnews") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: 1 of 2 tasks could not be fetched")
    assert "csl_public.zip: the server says 404" in error
    assert (tmp_path / "tnews").is_dir()
    assert len([path for path, _ in server.requests if "csl" in path]) == 1  # no use asking again


def test_a_wrong_file_is_not_unpacked(server, tnews, tmp_path, capsys):
    server.files["tnews_public.zip"] = zipped({"train.json": "other"})
    assert fetch(server, tmp_path, "--tasks", '["tnews"]') == 2
    assert "published was" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


WHOLE = zipped({"train.json": TRAIN})
DAMAGED = [b"<html>busy</html>", WHOLE[:-300], WHOLE[:60] + b"xxxxxxxxxxxxxxxx" + WHOLE[76:]]


@pytest.mark.parametrize("content", DAMAGED, ids=["page", "cut short", "bytes changed"])
def test_what_is_no_archive_is_not_unpacked(server, tmp_path, capsys, content):
    server.files["drcd_public.zip"] = content
    assert fetch(server, tmp_path, "--tasks", "drcd") == 2
    assert "not a whole archive" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../escaped.json", "/escaped.json", "a/../../escaped.json", "C:/escaped.json"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_out_of_the_folder_are_refused(server, tmp_path, capsys, kind, name):
    folder = tmp_path / "deep" / "data"
    task, file = ("afqmc", "afqmc_public.zip") if kind == "zip" else ("plain", "plain.tar.gz")
    files = {"train.json": "{}", name: "x"}
    server.files[file] = zipped(files) if kind == "zip" else tarred(files)
    archive = Archive(f"http://somewhere/{file}")
    target = folder / task
    with pytest.raises(module.DownloadFailed, match="leads out of its folder"):
        module.fetch_task(task, archive, target, server.address)
    assert not target.exists()
    assert not list(tmp_path.rglob("escaped.json"))


def test_links_are_not_followed(server, tmp_path):
    """A link and a file behind it: the oldest way out of an archive's folder."""
    server.files["plain.tar.gz"] = tarred({"train.json": TRAIN, "out/x.json": "x"}, links=[("dev.json", "/etc/passwd")])
    module.fetch_task("plain", Archive("http://somewhere/plain.tar.gz"), tmp_path / "plain", server.address)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["train.json", "x.json"]
    assert not any(path.is_symlink() for path in (tmp_path / "plain").iterdir())


def test_a_small_file_cannot_fill_the_disk(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 20)
    server.files["bomb.zip"] = zipped({"train.json": "0" * (2 << 20)})
    with pytest.raises(module.DownloadFailed, match="holds more than"):
        module.fetch_task("bomb", Archive("http://somewhere/bomb.zip"), tmp_path / "bomb", server.address)
    assert list(tmp_path.iterdir()) == []


def test_a_proxy_that_is_set_is_used(server, tnews, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.address)
    monkeypatch.delenv("no_proxy")
    server.files["http://published.example/tnews_public.zip"] = tnews
    assert main(["--data_dir", str(tmp_path), "--mirror", "http://published.example", "--tasks", '["tnews"]']) == 0
    assert server.requests[0][0] == "http://published.example/tnews_public.zip"


def test_every_archive_is_of_a_task_and_every_split_is_found(server, tmp_path):
    """The layouts as published: CLUE's flat zip files, paddlenlp's folders of parts."""
    assert ARCHIVES.keys() == TASKS.keys()  # of which absent data is said to come
    server.files["data-chnsenticorp.tar.gz"] = tarred(
        {f"chnsenticorp/{split}/part.0": "label\ttext_a\n1\t好\n" for split in ("train", "dev", "test")}
    )
    archive = Archive(ARCHIVES["chnsenticorp"].url, None, ARCHIVES["chnsenticorp"].names)
    module.fetch_task("chnsenticorp", archive, tmp_path / "chnsenticorp", server.address)
    assert len(read_split(TASKS["chnsenticorp"], tmp_path, "dev").examples) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tasks", "tnew"], "--tasks tnew: no such task; did you mean tnews?"),
        (["--tasks", "reading"], "--tasks reading: not published as an archive; there are afqmc,"),
        (["--tasks", "tnews", "--mirror", "somewhere/files"], "--mirror somewhere/files: expected an address, http://"),
        (["--task", '["tnews"]'], "task"),
        ([], "tasks"),
    ],
)
def test_bad_arguments(tmp_path, capsys, options, says):
    assert main(["--data_dir", str(tmp_path), *options]) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]
