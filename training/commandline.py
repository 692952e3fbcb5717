"""Programs' options: a dataclass of arguments, from the command line and YAML recipes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from backends.interface import InputError
from training.launch import end, rank
from training.loop import Preempted, TrainingFailed

set_parsing_settings(docstring_parse_attribute_docstrings=True)

A = TypeVar("A")


class Parser(ArgumentParser):
    """Errors are InputError, not usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise InputError(" ".join(message.split())) from ex


def build_parser(arguments: type, program: str, description: str) -> ArgumentParser:
    parser = Parser(prog=f"python -m {program}", description=description)
    parser.add_argument("--config", action="config", help="YAML recipe; options on the command line win over it")
    parser.add_class_arguments(arguments, as_group=False)
    return parser


def parse(
    arguments: type[A],
    argv: Sequence[str],
    program: str,
    description: str,
    recipes: Path,
    positional: Sequence[str] = (),
) -> A:
    """The arguments of a command line and the recipes it names.

    Args:
        arguments: a dataclass; its attributes' docstrings are the options' help.
        recipes: the folder with the program's own recipes, which may be named without it.
        positional: options that may stand first, without their names.

    Raises:
        InputError: an unknown option or recipe key, a value of the wrong type,
            or a recipe that cannot be read.
    """
    parser = build_parser(arguments, program, description)
    known = {action.dest for action in parser._actions}
    kinds = {f"--{item.name}": str(item.type) for item in fields(arguments)}  # type: ignore[arg-type]
    leading = list(takewhile(lambda argument: positional and not argument.startswith("-"), argv))
    if len(leading) > len(positional):
        taken = " ".join(name.upper() for name in positional)
        raise InputError(f"{leading[len(positional)]}: unexpected; python -m {program} takes {taken} and options")
    argv = [f"--{name}={value}" for name, value in zip(positional, leading)] + list(argv[len(leading) :])
    groups: list[list[str]] = []
    for argument in argv:
        if argument.startswith("--") or not groups:
            groups.append(argument.split("=", 1))
        else:
            groups[-1].append(argument)
    # A recipe counts where it stands in the line; put first, it leaves the last word to the options.
    given: list[Path] = []
    options: list[str] = []
    for name, *values in groups:
        if name in ("--config", "--recipe"):
            given.append(_find_recipe("".join(values[:1]), recipes))
            options += values[1:]
            continue
        if name.startswith("--"):
            _check_known(name[2:].rstrip("+"), known, "--")
        kind = kinds.get(name, "")
        if kind == "bool" and (not values or (name, values) == ("--resume", ["auto"])):  # --resume is --resume true
            values = ["true"]
        several = len(values) > 1 or (kind.startswith("list[") and values)
        if "list[" in kind and several and not values[0].startswith("["):  # --seeds 1 2 is --seeds=[1, 2]
            values = [f"[{', '.join(values)}]"]
        options += ["=".join([name, *values[:1]]), *values[1:]]
    for recipe in given:
        _check_recipe(recipe, known, recipes)
    parsed = parser.parse_args([f"--config={recipe}" for recipe in given] + options)
    values = vars(parser.instantiate_classes(parsed))
    values.pop("config")
    return arguments(**values)


def run(program: Callable[[], int | None], again: str = "--resume") -> int:
    """Runs a program; returns its exit code, what went wrong said in one line on standard error.

    Args:
        again: what goes on with a program that was stopped.
    """
    try:
        return program() or 0
    except Preempted as stop:
        end(0, f"{stop}, {again} goes on from it")
        return 0
    except (InputError, TrainingFailed) as error:
        code, message = (2 if isinstance(error, InputError) else 1), f"error: {error}"
    except OSError as error:
        code, message = 1, f"error: {error}; what was saved before is intact, {again} goes on from it"
    except KeyboardInterrupt:
        code, message = 130, f"stopped; {again} goes on from what was saved"
    except Exception as error:
        if rank() is not None:
            end(1, f"error: {error!r}")
        raise
    end(code, message)
    return code


def _check_known(name: str, known: set[str], prefix: str, where: str = "") -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {prefix}{near[0]}?" if near else "see --help for what there is"
        raise InputError(f"{where}{prefix}{name}: unknown; {hint}")


def _find_recipe(name: str, recipes: Path) -> Path:
    return recipes / f"{name}.yaml" if (recipes / f"{name}.yaml").is_file() else Path(name)


def _check_recipe(path: Path, known: set[str], recipes: Path) -> None:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        there = ", ".join(sorted(str(recipe) for recipe in recipes.glob("*.yaml")))
        raise InputError(f"--config {path}: cannot be read ({error.strerror}); recipes are {there}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise InputError(f"--config {path}: expected lines of 'option: value'")
    for key, value in recipe.items():
        group = isinstance(value, dict) and any(name.startswith(f"{key}.") for name in known)
        for name in [f"{key}.{inner}" for inner in value] if group else [str(key)]:
            _check_known(name, known, "", f"{path}: ")
