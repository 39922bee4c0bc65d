"""One job at a time in a workdir: who holds the lock, how it is let go, and what becomes of one that is left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rear_jax import jobs
from rear_jax.errors import RearError
from rear_jax.runtime import lock
from tests import toy

HOLD = """
import signal, sys, time
from pathlib import Path
from rear_jax.runtime import lock
signal.signal(signal.SIGINT, signal.default_int_handler)  # which what a shell starts in the background does not have
lock.BEAT, lock.STALE = float(sys.argv[2]), float(sys.argv[3])
try:
    with lock.held(Path(sys.argv[1])):
        print("held", flush=True)
        until = time.monotonic() + float(sys.argv[4])
        while time.monotonic() < until:
            time.sleep(0.05)  # a signal just before a sleep is heard after it
except lock.RearError as error:
    print(error, flush=True)
"""


def start(workdir, *, beat=15.0, stale=120.0, seconds=60.0) -> subprocess.Popen:
    """A process that holds the lock for some seconds."""
    command = [sys.executable, "-c", HOLD, str(workdir), str(beat), str(stale), str(seconds)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=toy.environment(), stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def leave(workdir: Path, **changes) -> None:
    """A lock as another process has left it."""
    with lock.held(workdir):
        said = json.loads((workdir / lock.NAME).read_text())
    (workdir / lock.NAME).write_text(json.dumps(said | changes))


def test_the_second_is_told_who_works_there(tmp_path):
    process = start(tmp_path)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RearError, match=rf"^process {process.pid} on \S+, since .* works in") as refused:
        jobs.run_all(("evaluate",), toy.config(), tmp_path)
    assert "\n" not in str(refused.value)
    assert process.poll() is None
    process.kill()
    process.wait()
    with lock.held(tmp_path):  # its process is gone
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_go(tmp_path, number):
    process = start(tmp_path)
    assert process.stdout.readline() == "held\n"
    process.send_signal(number)
    assert process.wait(timeout=30) in (-number, 1)
    assert not list(tmp_path.iterdir())


def test_an_error_lets_go(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_number_that_is_used_again_is_no_holder(tmp_path):
    leave(tmp_path, started="1")  # this process's number, of another one
    with lock.held(tmp_path):
        pass
    leave(tmp_path)
    with pytest.raises(RearError, match=f"^process {os.getpid()} on "), lock.held(tmp_path):
        pass


@pytest.mark.parametrize("content", [{"host": "elsewhere"}, {"place": "another boot"}, None])
def test_a_lock_of_another_host_is_stale_when_nobody_touches_it(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "STALE", 0.3)
    leave(tmp_path, **content or {})
    if content is None:
        (tmp_path / lock.NAME).write_bytes(b"")  # cut off while it was made
    os.utime(tmp_path / lock.NAME, (time.time() + 10**6,) * 2)  # whatever the clocks say
    since = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - since > 0.3


def test_a_lock_of_another_host_is_held_when_somebody_touches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE", 20.0)
    leave(tmp_path, host="elsewhere")
    threading.Timer(0.3, lambda: os.utime(tmp_path / lock.NAME, (1, 1))).start()
    with pytest.raises(RearError, match=r"on elsewhere, since .* works in"), lock.held(tmp_path):
        pass
    assert json.loads((tmp_path / lock.NAME).read_text())["host"] == "elsewhere"


def test_the_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with lock.held(tmp_path):
        os.utime(tmp_path / lock.NAME, (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / lock.NAME).stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_who_has_lost_the_lock_ends(tmp_path):
    process = start(tmp_path, beat=0.1)
    assert process.stdout.readline() == "held\n"
    (tmp_path / lock.NAME).write_text("{}")
    assert process.wait(timeout=30) == 1
    assert (tmp_path / lock.NAME).read_text() == "{}"


@pytest.mark.slow
def test_one_of_several_that_replace_a_stale_lock_gets_it(tmp_path):
    leave(tmp_path, started="1")
    processes = [start(tmp_path, seconds=3.0) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert said.count("held\n") == 1, said
    assert sum("works in" in one for one in said) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", '"a"', "[" * 9_000, '{"host": 1}', "null", "1e999"])
def test_a_damaged_lock_names_nobody(tmp_path, content):
    (tmp_path / lock.NAME).write_text(content)
    assert lock._holder(lock._look(tmp_path / lock.NAME)) is None


def test_a_folder_in_the_place_of_the_lock(tmp_path):
    (tmp_path / lock.NAME).mkdir()
    with pytest.raises(RearError, match="remove it"), lock.held(tmp_path):
        pass


def test_a_plan_and_a_dry_run_need_no_lock(tmp_path, monkeypatch):
    leave(tmp_path)
    jobs.check_all(("tokenizer",), toy.config(), tmp_path)
    planned = []
    job = jobs.Job(lambda config, workdir: planned.append(workdir), lambda *_: None, locks=False)
    monkeypatch.setitem(jobs.JOBS, "plan", job)
    jobs.run_all(("plan",), toy.config(), tmp_path)
    assert planned == [tmp_path]
