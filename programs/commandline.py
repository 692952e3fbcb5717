"""Programs' options: a dataclass or function of arguments, from the command line and YAML recipes."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import os
import re
import shlex
import shutil
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

import minilm_duet
from backends.files import InputError
from programs.console import say
from programs.ends import Preempted, TrainingFailed, end, rank

set_parsing_settings(docstring_parse_attribute_docstrings=True)

T = TypeVar("T")
CALLED = {"cuda": "gpu", "pytorch": "torch", "paddlepaddle": "paddle", "lr": "learning_rate"}
"""Options and values as others call them -> as they are called here."""


class Parser(ArgumentParser):
    """Errors are `_ParserError`, not usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise _ParserError(" ".join(message.split())) from ex


class _ParserError(Exception):
    """What jsonargparse says is wrong, in its own words."""


class _Option(typing.NamedTuple):
    hint: Any
    """Its type."""
    help: str
    default: Any
    required: bool

    @property
    def kinds(self) -> list[Any]:
        """The types that a value may have, None aside."""
        union = typing.get_origin(self.hint) in (typing.Union, types.UnionType)
        return [kind for kind in (typing.get_args(self.hint) if union else [self.hint]) if kind is not type(None)]

    @property
    def items(self) -> Any:
        """The type of an item, if several values may be given; else None."""
        return next((typing.get_args(kind)[0] for kind in self.kinds if typing.get_origin(kind) is list), None)

    def takes_alone(self, value: str) -> bool:
        """Whether a value need not be an item of a list."""
        others = [kind for kind in self.kinds if typing.get_origin(kind) is not list]
        return any(value in typing.get_args(kind) if typing.get_origin(kind) is Literal else True for kind in others)


def parse(
    arguments: Callable[..., T],
    argv: Sequence[str],
    program: str,
    description: str,
    recipes: Path | None = None,
    positional: Sequence[str] = (),
) -> T:
    """Calls a dataclass or function with the arguments of a command line and the recipes it names.

    A recipe's values are as if they stood in the command line, so relative paths are where the user is; in a recipe
    that comes with the project, where the project is.

    Args:
        arguments: its attributes' or arguments' docstrings are the options' help. If what it returns has a method
            ``without_effect``, that is given the options on the command line and returns those that others keep from
            having an effect, each with the reason.
        recipes: the folder with the program's own recipes, which may be named without it.
        positional: options that may stand first, without their names.

    Raises:
        InputError: an unknown option or recipe key, a value of the wrong type, a recipe that cannot be read, or an
            option that has no effect beside the others.
    """
    parser = Parser(prog=f"python -m {program}", description=description, print_config=None, add_help=False)
    parser.add_argument("--config", action="config")
    if dataclasses.is_dataclass(arguments):
        parser.add_class_arguments(arguments, as_group=False)
    else:
        parser.add_function_arguments(arguments, as_group=False)
    options = _options(parser, arguments)
    if "-h" in argv or "--help" in argv:
        print(_help(program, description, options, recipes, positional))
        raise SystemExit(0)
    if "--version" in argv:
        _say_version()
    on_command_line, recipes_given, words = _read(argv, program, options, recipes, positional)
    contents = {path: _read_recipe(path, options, recipes) for path in recipes_given}
    line = []
    for path, content in contents.items():
        line.append(f"--config={path}")
        if recipes is not None and path.resolve().parent == recipes.resolve():
            line += [f"--{key}={recipes.parents[1] / content[key]}" for key in content if key.endswith("_dir")]
    try:
        parsed = parser.parse_args(line + words)
        for name, texts in on_command_line.items():
            if name in options and options[name].kinds == [str]:  # or "#x" and "~" would be None, as in YAML
                parsed[name] = texts[0]
        values = vars(parser.instantiate_classes(parsed))
    except _ParserError as error:
        raise InputError(_explained(str(error), on_command_line, contents, options, program)) from error
    values.pop("config")
    if values.get("resume") and values.get("overwrite"):
        raise InputError("--resume and --overwrite: one goes on with what is there, the other deletes it; give one")
    made = arguments(**values)
    idle: Mapping[str, str] = made.without_effect(on_command_line) if hasattr(made, "without_effect") else {}
    for name in on_command_line:
        if name in idle and _value(values, name) != options[name].default:
            raise InputError(f"--{name} {' '.join(on_command_line[name])}: has no effect {idle[name]}")
    return made


def choose(argv: Sequence[str], program: str, what: str, commands: Mapping[str, str]) -> tuple[str, list[str]]:
    """The command that a command line begins with, and what follows.

    Args:
        what: what commands are called, in the plural.
        commands: each with its line of help.

    Raises:
        InputError: no such command, or none.
    """
    if argv and argv[0] in ("-h", "--help"):
        width = max(map(len, commands)) + 2
        lines = [f"  {name:{width}}{text.replace('``', '')}" for name, text in commands.items()]
        print(f"usage: python -m {program} {what[:-1].upper()} [options]\n\n{what}, each with a --help of its own:")
        print("\n".join(lines))
        raise SystemExit(0)
    if argv and argv[0] == "--version":
        _say_version()
    if not argv or argv[0] not in commands:
        wrong = f"{argv[0]}: no such {what[:-1]}{_hint(argv[0], commands)}" if argv else f"no {what[:-1]} given"
        raise InputError(f"python -m {program}: {wrong}; there are {', '.join(commands)}")
    return argv[0], list(argv[1:])


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


def say_next(what: str, *commands: str) -> None:
    """Tells the user what comes next, with the commands for it."""
    for line in (what, *(f"    {shown}" for shown in commands)):
        say(line)


def command(program: str, *words: object) -> str:
    """A command as it is pasted into the user's shell, with the Python that runs this one."""
    python = sys.executable
    if os.path.abspath(shutil.which("python") or "") == python:
        python = "python"
    elif Path(python).is_relative_to(Path.cwd()):
        python = str(Path(python).relative_to(Path.cwd()))
    package = Path(re.split(r"[. ]", program)[0])
    own = any(path.exists() for path in (package, package.with_suffix(".py"))) and Path.cwd() != Path(minilm_duet.ROOT)
    return shlex.join([python, "-m", *(["minilm_duet"] if own else []), *program.split(), *map(str, words)])


def _say_version() -> None:
    print(f"MiniLM Duet {minilm_duet.VERSION}")
    raise SystemExit(0)


def _options(parser: ArgumentParser, arguments: Callable[..., Any]) -> dict[str, _Option]:
    """Options by name, those of nested dataclasses too."""
    hints = typing.get_type_hints(arguments)
    hints.pop("return", None)
    for name, hint in list(hints.items()):
        if dataclasses.is_dataclass(hint):
            del hints[name]
            hints |= {f"{name}.{inner}": kind for inner, kind in typing.get_type_hints(hint).items()}
    actions = {action.dest: action for action in parser._actions}
    helps = {name: " ".join(str(actions[name].help or "").split()).replace("``", "").rstrip(".") for name in hints}
    parameters = inspect.signature(arguments).parameters
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    return {
        name: _Option(hints[name], helps[name], actions[name].default, name in required)
        for name in sorted((name for name in actions if name in hints), key=lambda name: name not in required)
    }


def _read(
    argv: Sequence[str], program: str, options: Mapping[str, _Option], recipes: Path | None, positional: Sequence[str]
) -> tuple[dict[str, list[str]], list[Path], list[str]]:
    """The options of a command line with their values, its recipes, and the line as jsonargparse takes it.

    Recipes count as if they stood first, which leaves the last word to the options.
    """
    leading = list(takewhile(lambda argument: not argument.startswith("-"), argv))
    if len(leading) > len(positional):
        taken = " ".join([*map(str.upper, positional), "and options"] if positional else ["options"])
        raise InputError(f"{leading[len(positional)]}: unexpected; python -m {program} takes {taken}; see --help")
    groups = [[f"--{name}", value] for name, value in zip(positional, leading)]
    for argument in argv[len(leading) :]:
        if re.match(r"--|-[A-Za-z]", argument):
            groups.append(argument.split("=", 1))
        else:
            groups[-1].append(argument)
    on_command_line: dict[str, list[str]] = {}
    named: list[Path] = []
    words: list[str] = []
    for dashed, *values in groups:
        name = dashed.lstrip("-").rstrip("+")
        if name in ("config", "recipe"):
            if len(values) != 1:
                raise InputError(f"{dashed}: must be followed by one recipe, {_recipes(recipes)}")
            named.append(_find_recipe(values[0], recipes))
            continue
        _check_known(name, options, "--", dashed if dashed.startswith("--") else f"-{name}")
        option = options.get(name) or _Option(dict, "", None, False)  # a nested group
        if option.kinds == [bool] and (not values or (name, values) == ("resume", ["auto"])):
            values = ["true"]  # --resume is --resume true
        if not values:
            raise InputError(f"--{name}: its value is missing; must be {_wanted(name, option)}")
        on_command_line[name] = values
        if option.items is not None and (len(values) > 1 or not option.takes_alone(values[0])):
            if not (values[0].startswith("[") and values[-1].endswith("]")):  # --seeds 1 2 is --seeds=[1, 2]
                quoted = values if option.items in (int, float) else map(_quoted, values)
                values = [f"[{', '.join(quoted)}]"]
        elif len(values) > 1:
            hint = "; what has no name stands before the options" if positional else ""
            raise InputError(f"--{name} {' '.join(values)}: must be {_wanted(name, option)}, one value{hint}")
        words.append("=".join([dashed, *values]))
    return on_command_line, named, words


def _quoted(text: str) -> str:
    """A text as YAML, of any characters."""
    return '"' + "".join(f"\\U{ord(character):08x}" for character in text) + '"'


def _help(
    program: str, description: str, options: Mapping[str, _Option], recipes: Path | None, positional: Sequence[str]
) -> str:
    required = [name for name in options if options[name].required and name not in positional]
    usage = [f"python -m {program}"]
    usage += [name.upper() if options[name].required else f"[{name.upper()}]" for name in positional]
    usage += [f"--{name} {_form(name, options[name])}" for name in required] + ["[options]"]
    shown = argparse.ArgumentParser(usage=" ".join(usage), description=description.replace("``", ""), add_help=False)
    shown.add_argument("-h", "--help", action="store_true", help="show this help")
    shown.add_argument("--version", action="store_true", help="show the version")
    shown.add_argument("--config", "--recipe", metavar="RECIPE", help=f"{_recipes(recipes)}; options win over it")
    for name, option in options.items():
        text = option.help
        if option.required:
            text += " (required)"
        elif option.default not in (None, "") and option.default is not False:
            text += f" (default: {_shown(option.default)})"
        form = "[true|false]" if option.kinds == [bool] else _form(name, option)
        shown.add_argument(f"--{name}", metavar=form, help=text.replace("%", "%%"))
    return shown.format_help().rstrip()


def _recipes(recipes: Path | None) -> str:
    names = sorted(path.stem for path in recipes.glob("*.yaml")) if recipes is not None else []
    return "a YAML file of options" + (f", or one of {', '.join(names)}" if names else "")


def _form(name: str, option: _Option) -> str:
    """What stands for an option's value in its help."""
    kind = option.items or option.kinds[0]
    if typing.get_origin(kind) is Literal:
        form = "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    elif kind in (int, float):
        form = "N" if kind is int else "NUMBER"
    else:
        form = (
            "{NAME: NUMBER}" if typing.get_origin(kind) is dict else name.rpartition("_")[2].rpartition(".")[2].upper()
        )
    return form if option.items is None else f"{form} [{form} ...]"


def _wanted(name: str, option: _Option) -> str:
    """What an option's value must be, in words."""
    kind = option.items or option.kinds[0]
    if typing.get_origin(kind) is Literal:
        choices = f"one of {', '.join(map(str, typing.get_args(kind)))}"
        return choices if option.items is None else f"{choices}, or several"
    if kind is dict:
        return f"given option by option, as in --{name}.NAME VALUE"
    if typing.get_origin(kind) is dict:
        return f"names, each with a number, as in '{_shown(option.default)}'"
    word, example = {
        int: ("whole number", "1 2"),
        float: ("number", "1e-4 2e-4"),
        bool: ("true or false", ""),
    }.get(kind, ("text", "A B"))
    if option.items is not None:
        names = [str(choice) for kind in option.kinds for choice in typing.get_args(kind) if isinstance(choice, str)]
        return f"{', '.join([*names, ''])}{word}{'' if word == 'text' else 's'}, as in --{name} {example}"
    return word if kind in (bool, str) else f"a {word}"


def _shown(value: Any) -> str:
    """A default value as it is given."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {number:g}" for key, number in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _explained(
    message: str,
    on_command_line: Mapping[str, list[str]],
    recipes: Mapping[Path, dict[str, Any]],
    options: Mapping[str, _Option],
    program: str,
) -> str:
    """What jsonargparse says is wrong, in words of the command line."""
    if match := re.search(r"arguments are required: (.*)", message):
        missing = [name.removeprefix("--") for name in re.split(r",\s*", match.group(1))]
        missing_named = "; ".join(f"--{name} is missing ({options[name].help})" for name in missing)
        return f"{missing_named}; python -m {program} --help lists all options"
    if not (match := re.search(r'key "([\w.]+)"', message)):
        return message
    name = match.group(1)
    option = options.get(name) or _Option(dict, "", None, False)
    where = f"--{name} {' '.join(on_command_line.get(name, []))}"
    value = " ".join(on_command_line.get(name, []))
    if name not in on_command_line:
        path, content = next((item for item in recipes.items() if _value(item[1], name) is not None), (None, {}))
        value = str(_value(content, name))
        where = f"{path}: {name}: {value}"
    right = [str(choice) for kind in option.kinds for choice in typing.get_args(option.items or kind)]
    hint = _hint(value, right) if right else ""
    return f"{where}: must be {_wanted(name, option)}{hint}"


def _value(values: Mapping[str, Any], name: str) -> Any:
    """Of an option, also of a nested one."""
    outer, _, inner = name.partition(".")
    value = values.get(outer)
    return value if not inner else value.get(inner) if isinstance(value, dict) else getattr(value, inner, None)


def _hint(word: str, words: Collection[str], prefix: str = "") -> str:
    """The one of some words that another may have meant."""
    near = [CALLED[word.lower()]] if CALLED.get(word.lower()) in words else difflib.get_close_matches(word, words, n=1)
    near = near or [known for known in words if len(word) > 2 and word in known]
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _check_known(name: str, options: Mapping[str, _Option], prefix: str, shown: str) -> None:
    known = {*options, *(name.partition(".")[0] for name in options)}
    if name not in known:
        ordered = sorted(known, key=lambda option: ("." in option, option))  # a group's options are the rarer ones
        hint = _hint(name, ordered, prefix) or "; --help lists all options"
        raise InputError(f"{shown}: unknown{hint}")


def _find_recipe(name: str, recipes: Path | None) -> Path:
    own = recipes / f"{name}.yaml" if recipes is not None else None
    return own if own is not None and own.is_file() else Path(name)


def _read_recipe(path: Path, options: Mapping[str, _Option], recipes: Path | None) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror}); expected {_recipes(recipes)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise InputError(f"--config {path}: expected lines of 'option: value'")
    for key, value in recipe.items():
        group = isinstance(value, dict) and any(name.startswith(f"{key}.") for name in options)
        for name in [f"{key}.{inner}" for inner in value] if group else [str(key)]:
            _check_known(name, options, "", f"{path}: {name}")
    return recipe
