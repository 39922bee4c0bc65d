"""What docs/security.md promises of code, network and places: in the source, and of a run that is watched."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import toy
from tests.test_architecture import FILES, PACKAGE, name_of

FORBIDDEN = re.compile(  # calls, by their dotted names
    r"eval|exec|compile|__import__|(pickle|marshal|shelve|dill|cloudpickle)\.(load|loads|Unpickler|open)|torch\.load"
    r"|os\.(system|popen|exec\w*|spawn\w*)|subprocess\.\w+|urllib\.request\.\w+|urlopen|requests\.\w+|http\.\w+"
    r"|socket\.(socket|create_connection|create_server|getaddrinfo)|huggingface_hub\.\w+|np\.load"
)
OURS = {
    ("rear_jax.data.fashion_mnist", "np.load"),  # of a file of the package itself
    ("rear_jax.demo.page", "socket.getaddrinfo"),  # of the host that the page is served at
    ("rear_jax.demo.page", "socket.socket"),  # which finds a free port there
}
WATCH = """
import json, os, sys
events = open(sys.argv.pop(1), "w")

def note(event, arguments):
    writes = event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.symlink", "os.truncate"):
        path = arguments[1] if event == "os.rename" else arguments[0]
        if event == "os.remove" and arguments[1] >= 0:  # a name in a folder that is open
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), os.fsdecode(path))
        print(json.dumps(["write", os.path.abspath(os.fsdecode(path))]), file=events, flush=True)
    elif event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "os.system",
                   "os.exec", "os.posix_spawn", "subprocess.Popen", "urllib.Request", "http.client.connect"):
        print(json.dumps([event, repr(arguments)]), file=events, flush=True)

import rear_jax.main
sys.addaudithook(note)
rear_jax.main.command()
"""


def calls_in(file: Path) -> list[str]:
    """Dotted names of all that a module calls."""
    return [ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_runs_files_or_asks_the_network(file):
    found = {(name_of(file), call) for call in calls_in(file) if FORBIDDEN.fullmatch(call)}
    assert found <= OURS


def test_forbidden_calls_are_found(tmp_path):
    calls = ("eval('1')", "pickle.loads(x)", "np.load(x)", "subprocess.run([])", "socket.create_connection(x)")
    for call in calls:
        (tmp_path / "a.py").write_text(f"y = [{call}]\n")
        assert any(map(FORBIDDEN.fullmatch, calls_in(tmp_path / "a.py"))), call


@pytest.mark.slow
def test_a_run_asks_no_network_and_writes_in_its_workdir_alone(tmp_path):
    """All jobs of the toy experiment, under a hook that hears of every file and every connection."""
    (tmp_path / "watch.py").write_text(WATCH)
    workdir, cache = tmp_path / "run", tmp_path / "cache"
    command = [sys.executable, str(tmp_path / "watch.py"), str(tmp_path / "events"), f"--config={toy.CONFIG}"]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = toy.environment() | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {
        "TMPDIR": str(temporary),
        "MPLCONFIGDIR": str(temporary),
    }  # matplotlib lists the system's fonts once
    done = subprocess.run(
        [*command, f"--workdir={workdir}"], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    places = (str(workdir), str(cache), str(temporary), os.devnull, "/proc/self/comm")  # the last names a thread
    written = [place for event, place in events if event == "write"]
    others = [told for event, told in events if event != "write"]
    assert [told for told in others if "fc-list" not in told] == []  # by which matplotlib lists the system's fonts
    assert any(place.startswith(str(workdir)) for place in written)
    assert [place for place in written if not place.startswith(places)] == []
