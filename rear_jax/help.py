"""What the command line says of itself: one screen for `--help`, all settings for `--helpfull`, configs, versions."""

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from absl import flags

from rear_jax import jobs
from rear_jax.config import default, files
from rear_jax.config.ranges import ALLOWED, leaves
from rear_jax.runtime import command_line

WIDTH, COLUMN = 100, 23  # characters of a line, and before what is said of a flag
EXAMPLES = {
    "rear-jax --config=quickstart --workdir=DIR": "everything once, in minutes on a laptop",
    "rear-jax configs": "the experiments that there are",
    "rear-jax --config=rear_l --workdir=DIR --job=show": "settings, what is done, what to type next",
}
# Functions of rear_jax/config that make the sections of other names.
MADE_BY = {"loop": "loop_settings", "optimizer": "optimizer_settings", "": "default"}


def answer(arguments: Sequence[str], shown: Iterable[flags.Flag]) -> str | None:
    """What to print instead of running jobs, or None where jobs are wanted.

    Args:
      arguments: the words after the program's name.
      shown: the flags that `--help` explains.
    """
    words = {word.lstrip("-") for word in arguments if word.startswith("-")}
    if "helpfull" in words:
        return f"{usage(shown)}\nSettings, with their defaults:\n\n{settings()}"
    if not arguments or words & {"help", "helpshort", "h", "?"}:
        return usage(shown)
    if "version" in words:
        return command_line.version()
    if list(arguments) == ["configs"]:
        return configs()
    return None


def configs() -> str:
    """The name of each experiment that comes with the package, and the first line of its docstring."""
    width = max(map(len, files.names()))
    return "\n".join(f"{name:{width}}  {files.summary(name)}" for name in files.names())


def usage(shown: Iterable[flags.Flag]) -> str:
    """One screen: examples, flags, jobs."""
    width = max(map(len, EXAMPLES))
    lines = ["rear-jax trains, samples and scores visual autoregressive image models.", ""]
    lines += [f"  {command:{width}}  {what}" for command, what in EXAMPLES.items()] + [""]
    for flag in shown:
        lines += _entry(f"--{flag.name}{'' if flag.boolean else '='}", flag.help)
    lines += _entry("--config.KEY=", "Another value for one setting; --helpfull lists all settings.")
    lines += _entry("--version", "Versions of this package, Python, JAX.")
    return "\n".join([*lines, *_entry("jobs:", ", ".join(jobs.JOBS))])


def settings() -> str:
    """Every setting of the default experiment: name, value, and what its comment or its range says."""
    said = dict(_comments())
    lines = []
    for key, (section, name) in leaves(default()):
        *parents, _ = key.split(".")
        made_by = parents[-1] if parents else ""
        text = said.get((MADE_BY.get(made_by, made_by), name)) or (ALLOWED[key].words if key in ALLOWED else "")
        lines += [f"--config.{key}={section[name]!r}", *textwrap.wrap(text, WIDTH, **_indented(4))]
    return "\n".join(lines)


def _entry(name: str, text: str) -> list[str]:
    """The lines of a flag."""
    first, *others = textwrap.wrap(text, WIDTH - COLUMN - 2) or [""]
    return [f"  {name:{COLUMN - 1}} {first}", *(f"  {'':{COLUMN}}{other}" for other in others)]


def _indented(blanks: int) -> dict[str, str]:
    return {"initial_indent": " " * blanks, "subsequent_indent": " " * blanks}


def _comments() -> Iterator[tuple[tuple[str, str], str]]:
    """((function that makes a section, setting), the comment on it), of all files of `rear_jax/config`."""
    for file in sorted(Path(files.__file__).parent.glob("*.py")):
        text = file.read_text()
        lines = text.splitlines()
        for function in (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)):
            above: list[str] = []
            for line in lines[function.lineno : function.end_lineno]:
                found = re.fullmatch(r"    \w+\.(\w+) = .*?(?:  # (.*))?", line)
                if found and (found[2] or above):
                    yield (function.name, found[1]), found[2] or " ".join(above)
                comment = re.fullmatch(r"    # (.*)", line)
                above = [*above, comment[1]] if comment else []
