"""The installed command: experiments by name from any folder, what it says of itself, and optional packages."""

import re
import shlex
import sys
import tomllib

import pytest
from absl import flags

import rear_jax
from rear_jax import jobs, main
from rear_jax.config import default, files
from rear_jax.config.ranges import leaves
from rear_jax.errors import RearError
from rear_jax.runtime import command_line
from rear_jax.runtime.extras import needed
from tests.toy import ROOT

SCREEN = 32, 100  # lines and characters


def printed(monkeypatch, capsys, *arguments: str) -> str:
    """What a command prints that runs no job."""
    with pytest.raises(SystemExit) as ended:
        main._parse(["rear-jax", *arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_an_experiment_is_found_by_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("rear_l", "configs/rear_l.py", str(ROOT / "configs" / "rear_l.py")):
        assert files.find(given) == ROOT / "configs" / "rear_l.py"
    (tmp_path / "rear_l").touch()  # no file of the user's takes the place of a name
    assert files.find("rear_l") == ROOT / "configs" / "rear_l.py"
    (tmp_path / "mine.py").touch()
    assert files.find("mine.py").samefile(tmp_path / "mine.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "rear_l.py").touch()
    assert files.find("configs/rear_l.py").samefile(tmp_path / "configs" / "rear_l.py")


@pytest.mark.parametrize("given", ["rear_ll", "configs/rear_ll.py", "rear_ll.py"])
def test_an_experiment_that_is_not_there(given):
    with pytest.raises(RearError, match=f"^--config={given} does not exist.*Did you mean rear_l\\?"):
        files.find(given)


def test_installed_experiments_come_before_those_beside_the_package(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "rear_jax"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "mine.py").write_text('"""One line.\n\nTwo."""\n')
    monkeypatch.setattr(files, "PACKAGE", package)
    assert files.names() == ["mine"]
    assert files.summary("mine") == "One line."


@pytest.mark.parametrize("words", [["--config=tokenizer_titok_b64:2"], ["--config", "tokenizer_titok_b64:2"]])
def test_a_name_with_an_option(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["rear-jax", *words, "--workdir=x"]
    monkeypatch.setattr(sys, "argv", arguments)
    sys.modules.pop("config_config", None)
    try:
        main._parse(arguments)
        config = main._config()
    finally:
        flags.FLAGS.unparse_flags()
    assert config.tokenizer_training.trained == "decoder"  # of stage 2


def test_every_experiment_has_a_summary(monkeypatch, capsys):
    lines = printed(monkeypatch, capsys, "configs").splitlines()
    assert [line.split()[0] for line in lines] == files.names()
    assert all(re.fullmatch(r"\w+ {2,}\S.*[.?:;]", line) or line.split(maxsplit=1)[1] for line in lines)


def test_the_version(monkeypatch, capsys):
    assert printed(monkeypatch, capsys, "--version").startswith(f"rear_jax {rear_jax.__version__} (Python 3.")


def test_the_help_is_one_screen_with_every_flag_and_job(monkeypatch, capsys):
    text = printed(monkeypatch, capsys, "--help")
    assert printed(monkeypatch, capsys) == text  # no words, no jobs
    assert len(text.splitlines()) <= SCREEN[0]
    assert max(map(len, text.splitlines())) <= SCREEN[1]
    own = {flag.name for flag in flags.FLAGS.flags_by_module_dict()[main.__name__]}
    assert own <= set(re.findall(r"--(\w+)", text))
    assert set(jobs.JOBS) <= set(re.findall(r"\w+", text))


def test_the_full_help_has_every_setting_with_its_comment(monkeypatch, capsys):
    text = printed(monkeypatch, capsys, "--helpfull")
    for key, (section, name) in leaves(default()):
        assert f"--config.{key}={section[name]!r}\n" in text
    assert "--config.train.loop.log_every=100\n    steps between two entries of metrics\n" in text
    assert "    probability that noise replaces a code" in text.replace("ξ, ", "")


def test_a_package_that_is_not_installed():
    with (
        pytest.raises(
            RearError, match=r"^the package 'nothing_there' is not installed: pip install 'rear-jax\[text\]'"
        ),
        needed("text"),
    ):
        import nothing_there  # noqa: F401


def test_the_extras_that_messages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        one for file in (ROOT / "rear_jax").rglob("*.py") for one in re.findall(r'needed\("(\w+)"', file.read_text())
    }
    assert {"text"} <= named <= set(extras)


@pytest.mark.parametrize(
    ("given", "program"), [("/a/bin/rear-jax", "rear-jax"), ("/a/rear_jax/main.py", "python -m rear_jax")]
)
def test_the_command_that_was_typed(given, program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [given, "--config=a b", "--job", "train", "--job=sample", "--seed=1"])
    assert shlex.split(command_line.typed()) == [*program.split(), *sys.argv[1:]]
    assert command_line.typed("evaluate") == f"{program} '--config=a b' --seed=1 --job=evaluate"
