"""`localmotion watch`: the page shows how running runs are, serves nothing else, reads only what is new, and survives damage."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localmotion.cli import main
from localmotion.errors import ConfigError
from localmotion.files import LOCK
from localmotion.report import watch
from localmotion.report.alive import Watched, find_runs, progress, seconds_left
from localmotion.report.memory import Memory, digest, recall
from localmotion.report.watch import Server, Watcher
from localmotion.runs import read
from report_runs import base, online_run, pretrain_run


def add(run: Path, *lines: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def small(path: Path, state: str = "running", updates: int = 1000) -> Path:
    """A pre-training run that has written two lines."""
    base(path, {"method": "drp", "stage": "pretrain", "pretrain": {"updates": updates}}, state)
    add(path, *({"kind": "pretrain", "update": n, "wall": n / 10, "loss/a": 1.0} for n in (100, 200)))
    return path


def held_by(run: Path, host: str, pid: int) -> None:
    (run / LOCK).write_text(f"{host} {pid}\n")


def gone() -> int:
    """A process id that no process has."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


# -- runs -----------------------------------------------------------------------------------------------------------------


def test_runs_are_found_in_folders_and_by_patterns_each_once(tmp_path: Path) -> None:
    for name in ("study/runs/a", "study/runs/b", "one"):
        small(tmp_path / name)
    (tmp_path / "study/console").mkdir()
    os.symlink(tmp_path, tmp_path / "study/loop")
    found = find_runs([str(tmp_path / "study"), str(tmp_path / "o*"), str(tmp_path / "study/runs/a"), str(tmp_path / "later")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["study/runs/a", "study/runs/b", "one"]


def test_the_state_says_whether_a_run_lives(tmp_path: Path) -> None:
    here = socket.gethostname()
    for name, holder, state in (
        ("a", (here, os.getpid()), "running"),
        ("b", (here, gone()), "killed"),
        ("c", ("far", 1), "running"),
    ):
        held_by(small(tmp_path / name), *holder)
        run = Watched(tmp_path / name)
        assert (run.look(), run.read(), run.state) == (True, None, state)
        assert bool(run.cause) == (name != "a")
    killed = Watched(tmp_path / "b")
    killed.read()
    assert "begins again: it has no checkpoint yet" in killed.cause
    (tmp_path / "b/checkpoints/0000000100").mkdir(parents=True)
    (tmp_path / "b/checkpoints/0000000100/COMPLETE").touch()
    assert "goes on from its last checkpoint" in killed.cause
    (tmp_path / "a/status.json").write_text('{"state": "failed", "error": "the disk\\nis full"}')
    run = Watched(tmp_path / "a")
    run.read()
    assert (run.state, run.cause) == ("failed", "a failed: the disk is full.")
    (tmp_path / "a/metrics.jsonl").unlink()
    os.symlink("/etc/passwd", tmp_path / "a/metrics.jsonl")
    run.read()
    assert run.state == "damaged"
    assert "is a link to a place outside" in run.cause


def test_progress_and_time_to_go_are_those_of_this_session(tmp_path: Path) -> None:
    run = small(tmp_path / "a")
    assert progress(read.read_run(run)) == (200, 1000, "updates")
    assert seconds_left(read.read_run(run)) == pytest.approx(80)
    add(run, {"kind": "pretrain", "update": 250, "wall": 5.0})  # resumed: its clock begins again
    assert seconds_left(read.read_run(run)) is None
    add(run, {"kind": "pretrain", "update": 350, "wall": 25.0})
    assert seconds_left(read.read_run(run)) == pytest.approx(650 / 5)
    online = online_run(tmp_path / "b", env_steps=1000, media=False)
    assert progress(read.read_run(online)) == (1000, 1000, "env steps")


def test_only_new_lines_are_read_until_a_session_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    inner = read._parsed
    monkeypatch.setattr(read, "_parsed", lambda raw: parsed.append(raw) or inner(raw))
    path = small(tmp_path / "a")
    run = Watched(path)
    run.look()
    run.read()
    assert (len(parsed), run.look()) == (2, False)
    add(path, {"kind": "pretrain", "update": 300})
    assert run.look()
    run.read()
    assert len(parsed) == 3
    assert run.data is not None
    assert [line["update"] for line in run.data.lines["pretrain"]] == [100, 200, 300]
    with (path / "command.txt").open("a") as file:  # the run is resumed, cuts the file and writes more than before
        file.write("localmotion pretrain\n")
    (path / "metrics.jsonl").write_text("")
    add(path, *({"kind": "pretrain", "update": n} for n in (100, 210, 220, 230, 240, 250)))
    run.read()
    assert run.data is not None
    assert [line["update"] for line in run.data.lines["pretrain"]] == [100, 210, 220, 230, 240, 250]


def test_a_memory_keeps_what_the_last_page_asked_for() -> None:
    made: list[int] = []

    def square(x: int) -> int:
        made.append(x)
        return x * x

    memory = Memory()
    for asked in ((2, 3), (2,), (2, 3)):
        with memory.used():
            assert [recall(square, x) for x in asked] == [x * x for x in asked]
    assert made == [2, 3, 3]
    recall(square, 2)  # not inside a page
    assert made == [2, 3, 3, 2]
    assert len({digest(x) for x in ([1, 2], [12], (1, 2), {"1": 2}, [1.0, 2], "12")}) == 6


# -- the page -------------------------------------------------------------------------------------------------------------


def test_the_page_is_built_again_only_if_something_changed(tmp_path: Path) -> None:
    path = small(tmp_path / "runs/a")
    watcher = Watcher([str(tmp_path / "runs")])
    assert watcher.changed()
    first = watcher.build()
    assert not watcher.changed()
    time.sleep(1.1)  # ages count on, which is no news
    assert watcher.build().version == first.version
    add(path, {"kind": "pretrain", "update": 300, "wall": 30, "loss/a": 1.0})
    assert watcher.changed()
    second = watcher.build()
    assert second.version != first.version
    small(tmp_path / "runs/later", state="failed")
    assert watcher.changed()
    assert b"<td>later</td><td>failed</td>" in watcher.build().page


def test_a_damaged_run_is_shown_as_such_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(tmp_path / "good", state="finished")
    bad = small(tmp_path / "<b>bad")
    os.symlink("/etc", bad / "media/x")
    watcher = Watcher([str(tmp_path)])
    watcher.changed()
    page = watcher.build().page.decode()
    assert "<td>&lt;b&gt;bad</td><td>damaged</td>" in page
    assert "is a link to a place outside" in page
    assert "Losses of pre-training." in page
    monkeypatch.setattr(watch, "sections_of", lambda _: 1 / 0)
    assert "The report cannot be drawn: division by zero." in watcher.build().page.decode()


def test_only_the_script_of_the_page_may_run_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    import base64
    import hashlib

    small(tmp_path / "</script><script>alert(1)</script>")
    watcher = Watcher([str(tmp_path)])
    watcher.changed()
    built = watcher.build()
    page = built.page.decode()
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    digest_of = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest_of}';" in built.policy
    assert built.policy.startswith("default-src 'none'; img-src 'self'; media-src 'self'; connect-src 'self';")
    assert f'content="{built.policy}"' in page
    assert f'let version = "{built.version}"' in script
    assert not re.findall(r"(?:src|href|srcset)=\"(?!#|media/[0-9a-f]{64}\")", page)


# -- the server -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    folder = tmp_path_factory.mktemp("served")
    online_run(folder / "a", env_steps=2000)
    pretrain_run(folder / "b", updates=500, media=False)
    (folder / "secret.txt").write_text("secret")
    server = Server(Watcher([str(folder)]), "127.0.0.1", 0)
    server.start()
    yield server, folder
    server.close()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.http.server_address[1], timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_the_server_gives_the_page_its_version_and_its_media(served: tuple[Server, Path]) -> None:
    server, folder = served
    answer, page = ask(server, "/")
    assert (answer.status, answer.headers["Content-Security-Policy"][:18]) == (200, "default-src 'none'")
    version = json.loads(ask(server, "/version")[1])
    assert answer.headers["X-Version"] == version["version"]
    assert abs(version["now"] - time.time()) < 60
    named = re.findall(rb"media/[0-9a-f]{64}", page)
    assert named
    kinds = {ask(server, f"/{name.decode()}", "HEAD")[0].headers["Content-Type"] for name in named}
    assert kinds == {"image/svg+xml", "image/png", "video/mp4"}
    film = re.search(rb'<video[^>]* src="(media/[0-9a-f]{64})"', page)
    assert film
    whole = (folder / "a/media/eval_000000000.mp4").read_bytes()
    place = f"/{film[1].decode()}"
    assert ask(server, place)[1] == whole
    part, body = ask(server, place, Range="bytes=3-9")
    assert (part.status, body, part.headers["Content-Range"]) == (206, whole[3:10], f"bytes 3-9/{len(whole)}")
    assert ask(server, place, Range="bytes=99999999-")[0].status == 200


def test_no_address_leads_to_a_file(served: tuple[Server, Path]) -> None:
    server, folder = served
    ask(server, "/")
    paths = [
        "/../secret.txt",
        "/media/../secret.txt",
        "/media/..%2fsecret.txt",
        f"/{folder}/secret.txt",
        "//etc/passwd",
        "/media/",
    ]
    paths += ["/a/config.json", "/media/eval_000000000.mp4", "/media/%00", "/version/x", "/media"]
    assert {ask(server, path)[0].status for path in paths} == {404}
    assert ask(server, "/", "POST")[0].status == 501


def test_a_page_of_another_host_cannot_read_it(served: tuple[Server, Path]) -> None:
    """Its name may be made to lead to this machine."""
    server, _ = served
    assert ask(server, "/", Host="evil.example")[0].status == 403
    assert ask(server, "/version", Host="evil.example:8600")[0].status == 403
    assert {ask(server, "/version", Host=name)[0].status for name in ("localhost:1", "127.0.0.1", "[::1]:8600")} == {200}


def test_a_port_in_use_is_an_error_or_the_next_one_is_taken(
    served: tuple[Server, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = served[0].http.server_address[1]
    with pytest.raises(SystemExit):
        main(["watch", str(tmp_path), "--port", str(used)])
    assert f"error: port {used} is in use; choose another --port" in capsys.readouterr().err
    monkeypatch.setattr(watch, "PORT", used)
    other = Server(Watcher([str(tmp_path)]), "127.0.0.1", None)
    assert used < other.http.server_address[1] < used + watch.TRIES
    other.close()
    with pytest.raises(ConfigError, match="is not in 0"):
        Server(Watcher([]), "127.0.0.1", 70000)
    with pytest.raises(ConfigError, match="cannot be served"):
        Server(Watcher([]), "203.0.113.7", 0)
    with pytest.raises(ConfigError, match="seconds in"):
        watch.watch([], every=0.0)


def test_ctrl_c_ends_it_also_while_it_draws(tmp_path: Path) -> None:
    online_run(tmp_path / "a", env_steps=2000, media=False)
    command = [sys.executable, "-m", "localmotion", "watch", str(tmp_path), "--port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("1 runs at http://127.0.0.1:")
            with socket.create_connection(("127.0.0.1", int(re.findall(r":(\d+)/", line)[0]))) as asking:
                asking.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                time.sleep(0.05)
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 0
            assert "the runs go on" in process.stdout.read()
        finally:
            process.kill()  # or the test would wait for one that does not end
