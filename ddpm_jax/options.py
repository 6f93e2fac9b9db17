"""Options as dataclasses: each field has a default, a help text and rules; values are read from text and checked.

Values from the command line, JSON and Python pass the same checks. ConfigError gives the name, the value and the rule.
"""

import argparse
import dataclasses
import difflib
import itertools
import math
import sys
import types
import typing

from ddpm_jax.errors import ConfigError


def option(default, help, *rules):
    """A dataclass field with its help text and its rules, each a pair (text, predicate)."""
    return dataclasses.field(default=default, metadata={"help": help, "rules": rules})


def same_as(cls, name):
    """A copy of the field `name` of the dataclass `cls`: its default, help text and rules."""
    field = cls.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


def at_least(low):
    return f"at least {low}", lambda value: value >= low


def above(low):
    return f"a number above {low}", lambda value: value > low


def below(high):
    return f"below {high}", lambda value: value < high


def all_of(rule):
    return f"a list, each {rule[0]}", lambda values: all(rule[1](value) for value in values)


def one_of(*choices):
    return "one of " + ", ".join(map(str, choices)), lambda value: value in choices


finite = ("finite", math.isfinite)

# Options that several scripts have, declared as in `step: int = option(*STEP)`.
STEP = 0, "step of the checkpoint; 0 for the newest", at_least(0)
WEIGHTS = (
    "ema",
    "ema (averaged), raw (plain parameters), or the length (sigma_rel) of a post-hoc average",
    ("ema, raw or a number", lambda value: value in ("ema", "raw") or parses(float, value)),
)
MEMBER = 0, "index of the run in an ensemble", at_least(0)
PLATFORM = "auto", "what to run on", one_of("auto", "cpu", "gpu", "tpu")
CPU_DEVICES = 0, "number of devices that a CPU is split into; 0 for at most one per core", at_least(0)
DEBUG = False, "show tracebacks"


class Section:
    """A group of options. Creating one checks the types and rules of its fields."""

    def __post_init__(self):
        for field, kind in fields(type(self)):
            value, name = getattr(self, field.name), self._name_of(field)
            text = to_text(value)
            text = f"{name}={text if len(text) <= 80 else text[:77] + '...'}"
            if not _is_a(kind, value):
                raise ConfigError(f"{text} is not {_describe(kind)}")
            for rule, is_valid in field.metadata.get("rules", ()):
                if not is_valid(value):
                    raise ConfigError(f"{text} must be {rule}")

    def _name_of(self, field):
        return f"{type(self).__name__.lower()}.{field.name}"


class Arguments(Section):
    """The options of a command."""

    def _name_of(self, field):
        return _normalized("--" + field.name)


def fields(cls):
    """The fields of a dataclass with their resolved types."""
    kinds = typing.get_type_hints(cls)
    return [(field, kinds[field.name]) for field in dataclasses.fields(cls)]


def _is_a(kind, value):
    if isinstance(kind, types.UnionType):
        return any(_is_a(part, value) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(typing.get_args(kind)[0], part) for part in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float and isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def _describe(kind):
    if isinstance(kind, types.UnionType):
        return " or ".join(_describe(part) for part in typing.get_args(kind) if part is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return "a list like 16,8"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def to_text(value):
    """A value in the notation of the command line."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(to_text, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def from_text(kind, text, name):
    """`text` as a value of type `kind`. Raises ConfigError with the option's `name` when it is not one."""
    if isinstance(kind, types.UnionType):
        for part in typing.get_args(kind):
            if part is not types.NoneType and (part is str or parses(part, text)):
                return from_text(part, text, name)
    elif typing.get_origin(kind) is tuple:
        part, pieces = typing.get_args(kind)[0], [piece for piece in text.split(",") if piece]
        if all(parses(part, piece) for piece in pieces):
            return tuple(from_text(part, piece, name) for piece in pieces)
    elif kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif kind is str:
        return text
    elif kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise ConfigError(f"{name}={text} is not {_describe(kind)}")


def parses(kind, text):
    """Whether `text` can be read as a value of type `kind`."""
    try:
        from_text(kind, text, "")
    except ConfigError:
        return False
    return True


def leaves(cls, value, prefix=""):
    """(dotted name, field, type, value) of every leaf field of the nested dataclass instance `value`."""
    for field, kind in fields(cls):
        name, part = prefix + field.name, getattr(value, field.name)
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, part, name + ".")
        else:
            yield name, field, kind, part


def replace(value, changes):
    """A copy of the nested dataclass `value` with `changes`, a dict from dotted names to new values."""
    own = {name: new for name, new in changes.items() if "." not in name}
    for section in {name.split(".")[0] for name in changes if "." in name}:
        nested = {name[len(section) + 1 :]: new for name, new in changes.items() if name.startswith(section + ".")}
        own[section] = replace(getattr(value, section), nested)
    return dataclasses.replace(value, **own)


def closest(name, known):
    """A list of the one name in `known` that resembles `name`, or an empty list.

    Compared are the last parts of dotted names and their initials (lr). Names in the same section have priority.
    """
    section, _, last = name.replace("-", "_").rpartition(".")
    for candidates in ([full for full in known if full.rpartition(".")[0] == section], known):
        by_last = {full.split(".")[-1]: full for full in candidates}
        longest_first = sorted((part for part in by_last if part[0] == last[:1]), key=len, reverse=True)
        by_initials = {"".join(word[:1] for word in part.split("_")): by_last[part] for part in longest_first}
        for table in (by_last, by_initials):
            if found := difflib.get_close_matches(last, table, 1, 0.75):
                return [table[found[0]]]
    return []


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(f"{message}; see python {self.prog} --help")


def command_line(argv=None):
    """The arguments of a command as a list of strings; those in sys.argv when `argv` is None."""
    if isinstance(argv, str):
        raise ConfigError(f"options must be a list, such as ['--num=3', '--seed=1'], not the string {argv!r}")
    return list(map(str, sys.argv[1:] if argv is None else argv))


def _positional_to_options(words, names):
    """`words` with the leading ones that are not options as values of the options `names`: --workdir=RUN."""
    first = list(itertools.takewhile(lambda word: word[:1] != "-", words))[: len(names)]
    return [f"--{name}={word}" for name, word in zip(names, first, strict=False)] + words[len(first) :]


def parse(cls, argv, prog, description, load=None, positional=()):
    """The command line `argv`, see `command_line`, as an instance of the dataclass `cls`.

    With `load`, the field `config` is what `load` makes of the file named by `--config=FILE` (the field `config_file`),
    then changed by `--config.a.b=value`. `positional` names the options whose values may come first without a name.
    `_` and `-` are the same in an option's name. Every fault is a `ConfigError`.
    """
    argv = [_normalized(word) for word in _positional_to_options(command_line(argv), positional)]
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog, description=description, allow_abbrev=False, formatter_class=formatter)
    default = cls()
    if load:
        file_parser = _Parser(prog, add_help=False, allow_abbrev=False)
        file_parser.add_argument("--config", default=cls.config_file)
        file = _text(file_parser.parse_known_args(argv)[0].config)
        parser.add_argument("--config", metavar="FILE", help=f"the experiment (default: {cls.config_file})")
        default = dataclasses.replace(default, config=load(file), config_file=file)
    known = _add_options(parser, cls, default)
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.split("=")[0]
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; options are written --name=value")
        hint = "".join(f"; did you mean {_normalized('--' + near)}?" for near in closest(name.lstrip("-"), known))
        raise ConfigError(f"unknown option {name}{hint}")
    texts = {name: _text(text) for name, text in vars(given).items() if name != "config"}
    return replace(default, {name: from_text(known[name], text, "--" + name) for name, text in texts.items()})


def _add_options(parser, cls, default):
    """Add an option for every field with a help text; return {dotted name: type}."""
    kinds = {}
    for name, field, kind, value in leaves(cls, default):
        if "help" in field.metadata:
            kinds[name], text = kind, to_text(value)
            parser.add_argument(
                _normalized("--" + name),
                dest=name,
                metavar=_metavar(kind),
                nargs="?" if kind is bool else None,
                const="true" if kind is bool else None,
                default=argparse.SUPPRESS,
                help=field.metadata["help"].replace("%", "%%") + (f" (default: {text})" if text else ""),
            )
    return kinds


def _text(value):
    return "--" if value == [] else value  # before Python 3.13, argparse parses the value "--" as []


def _normalized(word):
    """An option as --top-level-name or --config.section.field_name, with - and _ where they belong."""
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    name = name[2:].replace("-", "_") if "." in name else name[2:].replace("_", "-")
    return "--" + name + equals + value


def _metavar(kind):
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        return ",".join([_metavar(typing.get_args(kind)[0])] * 2)
    return {int: "N", float: "X", bool: "true|false", str: "TEXT"}[kind]
