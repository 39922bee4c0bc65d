"""The door: config files, flags and workdirs that are wrong are one line, and so are damaged files that a run left."""

import os
import sys

import pytest
from absl import flags

from rear_jax import jobs, main
from rear_jax.errors import RearError, printable
from rear_jax.runtime import distributed
from rear_jax.runtime.atomic import read_json
from rear_jax.runtime.identity import is_done
from rear_jax.runtime.writer import MetricWriter, read_metrics
from tests import toy

TOY = "from tests.toy_config import get_config as toy\ndef get_config():\n    c = toy()\n"


def said(*given: str) -> str:
    """What a command says before it ends with 1; it does not come to any job."""
    arguments = ["rear_jax", *given]
    sys.modules.pop("config_config", None)  # a file is loaded into the module of the one before
    try:
        with pytest.raises(SystemExit) as ended:
            main.main(main._parse(arguments))
    finally:
        flags.FLAGS.unparse_flags()
    line = ended.value.code
    assert line.startswith("error: ")
    assert line.isprintable()
    return line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "fails in line 1 (SyntaxError: invalid syntax"),
        ("x = 1\nimport nothing_there\n", "fails in line 2 (ModuleNotFoundError: No module named 'nothing_there"),
        ("def get_config():\n    return 1 / 0\n", "fails in line 2 (ZeroDivisionError: division by zero)"),
        (
            "def get_config():\n    raise ValueError('a\\x1b[31m\\nb')\n",
            r" config file: ValueError: a\x1b[31m",
        ),
        ("x = 1\n", "has no function get_config()"),
        ("def get_config():\n    return {'a': 1}\n", "get_config() returns a dict: it must return"),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'a': 1})\n",
            "config lacks jobs",
        ),
        ("\0", "source code string cannot contain null bytes"),
        (
            TOY + "    c.sedd = 1\n    return c\n",
            'Did you mean "seed"',
        ),
        (
            TOY + "    c.seed = 'a'\n    return c\n",
            "Could not override field 'seed'",
        ),
        (
            TOY + "    c.seed = -1\n    return c\n",
            "config.seed = -1: give a whole number of 0 to 4294967295",
        ),
    ],
)
def test_a_config_file_that_is_wrong(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    assert message in said(f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_config_file_is_named_however_the_flag_is_written(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import nothing_there")
    assert f"--config={file} fails" in said("--config", str(file), f"--workdir={tmp_path}")
    assert f"--config={tmp_path}/none.py does not exist" in said(f"--config={tmp_path}/none.py", "--workdir=a")
    assert "Did you mean rear_l?" in said("--config", "rear_ll", "--workdir=a")


def workdirs(tmp_path):
    """Workdir -> what is said of it."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file" / "sub")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "": "is none",
        "a\0b": "is none",
        "~nobody_at_all/a": "is none",
        "a" * 300: "is none",
        f"{tmp_path}/file": "no folder can be there (File exists",
        f"{tmp_path}/file/sub": "no folder can be there (Not a directory",
        f"{tmp_path}/link": "no folder can be there (Not a directory",
        f"{tmp_path}/loop": "",
        "/proc/nothing": "no folder can be there",
    }


def test_a_workdir_that_cannot_be(tmp_path):
    for workdir, message in workdirs(tmp_path).items():
        try:
            main._open(main._local(workdir))
            line = ""
        except RearError as error:
            line = printable(str(error))
        assert line.startswith("--workdir="), workdir
        assert message in line


def test_the_workdir_expands_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main._local("~/runs/a") == tmp_path.resolve() / "runs" / "a"


def test_no_jobs(tmp_path):
    with pytest.raises(RearError, match="no job to run: name some of tokenizer, tokenize"):
        jobs.run_all((), toy.config(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["localhost", "", ":1", "a:b", "a:99999", "a b:1", "http://a:1", "a:-1"])
def test_an_address_without_a_port(address):
    with pytest.raises(RearError, match=r"^--coordinator_address=.*give host:port"):
        distributed.start(address, 1, 0)


@pytest.mark.parametrize(("count", "index"), [(0, 0), (2, 2), (2, -1), (-1, 0), (10**12, 0)])
def test_a_process_that_cannot_be(count, index):
    with pytest.raises(RearError, match="ids go from 0 to"):
        distributed.start("localhost:1234", count, index)


def test_a_sweep_of_one_value_is_one_point():
    (point,) = jobs.sweep._points(toy.config(sweep__guidance_scale=(3.0,)))
    assert (point.sample.guidance_scale, point.sample.guidance_power) == (3.0, 1.0)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_an_export_into_a_folder_that_is_not_there(trained, tmp_path, name):
    export = f"{tmp_path}/none/{name}"
    config = toy.config(convert__source=str(trained / "generator"), convert__export=export)
    with pytest.raises(RearError, match=f"^config.convert.export = '{export}': make the folder {tmp_path}/none first"):
        jobs.check_all(("convert",), config, tmp_path)


def test_control_characters_are_written_as_escapes():
    assert printable("a\x1b[31m\n\tb\0\u202e\udcffé 猫") == r"a\x1b[31m\n\tb\x00\u202e\udcffé 猫"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"a": "\xc3'])
def test_a_mark_that_cannot_be_read_marks_nothing(tmp_path, content):
    (tmp_path / "mark.json").write_bytes(content)
    assert read_json(tmp_path / "mark.json") == {}
    assert not is_done(tmp_path / "mark.json", {"a": 1})
    assert not is_done(tmp_path / "mark.json", {})


def test_a_pipe_or_a_folder_is_no_mark(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(RearError, match="is not a file: remove it"):
            is_done(tmp_path / name, {"a": 1})
    assert not is_done(tmp_path / "none", {"a": 1})


def test_a_line_that_was_torn_inside_a_character_is_cut_off(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with MetricWriter(tmp_path, "a", start_step=0) as writer:
        writer.write(1, {"loss": 1.0})
    strange = b'{"x": 1}\n[]\nnull\n{"job": 1, "step": 1}\n{"job": "a", "step": "1"}\n' + b"[" * 100_000 + b"\n\n"
    with file.open("ab") as opened:
        opened.write(strange + '{"job": "a", "step": 2, "name": "é'.encode()[:-1])
    assert [record["step"] for record in read_metrics(tmp_path, "a")] == [1]
    with MetricWriter(tmp_path, "a", start_step=1) as writer:
        writer.write(2, {"loss": 2.0})
    assert [record["step"] for record in read_metrics(tmp_path, "a")] == [1, 2]
    assert len(file.read_bytes().splitlines()) == 2


def test_a_folder_in_the_place_of_the_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RearError, match="is not a file: remove it"):
        MetricWriter(tmp_path, "a", start_step=0)
