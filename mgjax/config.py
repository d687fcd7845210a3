"""Typed configs on the command line: presets first, overrides second, then frozen dataclasses.

Every leaf of a nested frozen dataclass becomes one absl flag, `--config.optim.learning_rate`,
so that `--help` lists each key with its default and meaning, and absl checks the types.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from absl import app, flags

from mgjax.errors import InputError

Config = TypeVar("Config")
PREFIX = "config."


class ConfigError(InputError):
    """A key or a value that the config does not have."""


def key(default: Any, help: str, *, low: float | None = None, high: float | None = None, choices: Sequence[str] = ()) -> Any:
    """A field of a config dataclass.

    Args:
        default: value where nothing else is given.
        help: meaning, for `--help`.
        low, high: smallest and largest value; of a tuple, of each of its items.
        choices: the only values.
    """
    if choices:
        help = f"{help} ({', '.join(choices)})"
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


class Leaf(NamedTuple):
    """Type, meaning and bounds of one key."""

    type: Any
    help: str = ""
    low: float | None = None
    high: float | None = None
    choices: Sequence[str] = ()

    def check(self, dotted: str, value: Any) -> None:
        """Raises ConfigError for a value that is not allowed."""
        for item in value if isinstance(value, tuple) else (value,):
            if self.choices and item not in self.choices:
                near = difflib.get_close_matches(str(item), self.choices, 1, 0.0)[0]
                raise ConfigError(f"--{PREFIX}{dotted} is '{item}'; it is one of {', '.join(self.choices)} (nearest: {near})")
            if (self.low is not None and not item >= self.low) or (self.high is not None and not item <= self.high):
                bounds = " and ".join(
                    f"{word} {b:g}" for word, b in (("at least", self.low), ("at most", self.high)) if b is not None
                )
                raise ConfigError(f"--{PREFIX}{dotted} is {item}; it is {bounds}")


def leaves(config: Any, prefix: str = "") -> dict[str, Leaf]:
    """Dotted key → type and meaning, of all leaves of a (nested) config or config class."""
    cls = config if isinstance(config, type) else type(config)
    result = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            result |= leaves(field.default, f"{prefix}{field.name}.")
        else:
            # Annotations are strings where the module of the class that declares them postpones them.
            owner = next(c for c in cls.__mro__ if field.name in vars(c).get("__annotations__", {}))
            kind = field.type if not isinstance(field.type, str) else eval(field.type, vars(sys.modules[owner.__module__]))
            result[prefix + field.name] = Leaf(kind, **field.metadata)
    return result


def get(config: Any, dotted: str) -> Any:
    """The value at a dotted key."""
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of `config` with the values at dotted keys replaced.

    Raises:
        ConfigError: an unknown key, with the nearest known one; a value out of its bounds.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Optim:
        ...     learning_rate: float = key(0.1, "peak")
        >>> @dataclasses.dataclass(frozen=True)
        ... class Experiment:
        ...     optim: Optim = Optim()
        >>> override(Experiment(), {"optim.learning_rate": 0.3}).optim.learning_rate
        0.3
    """
    known = leaves(config)
    for dotted, value in values.items():
        if dotted not in known:
            raise ConfigError(unknown_key(dotted, known))
        known[dotted].check(dotted, value)
        config = _replace(config, dotted.split("."), value)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Dotted key → value, of all leaves."""
    return {dotted: get(config, dotted) for dotted in leaves(config)}


def unknown_key(dotted: str, known) -> str:
    """Message for a key that does not exist: names the nearest."""
    alike = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
    last = lambda k: k.rsplit(".", 1)[-1]
    initials = lambda k: "".join(word[:1] for word in last(k).split("_"))
    # The last part counts for itself too: people forget the path, mistype the name, or write "lr".
    likeness = lambda k: alike(dotted, k) + max(alike(last(dotted), last(k)), float(last(dotted) == initials(k)))
    return f"unknown key --{PREFIX}{dotted}; the nearest is --{PREFIX}{max(sorted(known), key=likeness)} (--help lists all)"


def define(config: Any, values: flags.FlagValues = flags.FLAGS, notes: Mapping[str, str] | None = None) -> None:
    """Defines one flag per leaf of the config; `given` reads them.

    Args:
        notes: dotted key → what `--help` adds to its meaning.
    """
    for dotted, field in leaves(config).items():
        define_one = _DEFINE.get(typing.get_origin(field.type) or field.type)
        if define_one is None:
            raise ConfigError(f"{dotted}: a config key cannot be of type {field.type}")
        define_one(PREFIX + dotted, get(config, dotted), field.help + (notes or {}).get(dotted, ""), field.type, values)
        # Absl lists the flags of the main module only; these belong to it.
        values.register_key_flag_for_module(sys.argv[0], values[PREFIX + dotted])


def _tuple_flag(name, default, help, kind, values):
    item = (typing.get_args(kind) or (str,))[0]
    parser = _TupleParser(item)
    flags.DEFINE(parser, name, default, help, values, serializer=flags.CsvListSerializer(","))


class _TupleParser(flags.ArgumentParser):
    """Comma-separated values of one type: `a,b` or `0.5,1`; empty for none."""

    def __init__(self, item: type):
        self.item = item
        self.syntactic_help = f"comma-separated values of type {item.__name__}"

    def parse(self, argument):
        if isinstance(argument, (tuple, list)):
            return tuple(argument)
        return tuple(self.item(part.strip()) for part in argument.split(",")) if argument else ()

    def flag_type(self) -> str:
        return f"comma-separated {self.item.__name__}s"


_DEFINE = {
    bool: lambda n, d, h, k, v: flags.DEFINE_boolean(n, d, h, flag_values=v),
    int: lambda n, d, h, k, v: flags.DEFINE_integer(n, d, h, flag_values=v),
    float: lambda n, d, h, k, v: flags.DEFINE_float(n, d, h, flag_values=v),
    str: lambda n, d, h, k, v: flags.DEFINE_string(n, d, h, flag_values=v),
    tuple: _tuple_flag,
}


def given(config: Any, values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Dotted key → value, of the keys that stand on the command line."""
    return {k: values[PREFIX + k].value for k in leaves(config) if values[PREFIX + k].present}


def run(
    main: Callable[[dict[str, Any]], None], config: Any, notes: Mapping[str, str] | None = None, operands: str = ""
) -> None:
    """Runs an experiment under `absl.app`: `main` receives the keys that the user set.

    Bad input ends in one clear line and exit status 2, not in a traceback.

    Args:
        operands: a flag of several values that, once it is given, takes further arguments too.
    """
    define(config, notes=notes)
    known = set(leaves(config))

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(list(argv))
        except flags.UnrecognizedFlagError as error:
            if error.flagname.startswith(PREFIX):
                raise SystemExit(_fatal(unknown_key(error.flagname[len(PREFIX) :], known))) from None
            if error.flagname in {k.rpartition(".")[2] for k in known} | known:
                raise SystemExit(_fatal(unknown_key(error.flagname, known).replace(PREFIX, "", 1))) from None
            raise SystemExit(_fatal(str(error))) from None
        except flags.Error as error:
            raise SystemExit(_fatal(str(error))) from None
        if operands and flags.FLAGS[operands].present:
            flags.FLAGS[operands].value += rest[1:]
            rest = rest[:1]
        if len(rest) > 1:
            raise SystemExit(_fatal(f"unexpected argument '{rest[1]}': keys are given as --{PREFIX}KEY=VALUE"))
        return rest

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(given(config))
        except InputError as error:
            raise SystemExit(_fatal(str(error))) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            raise SystemExit(_fatal(f"{error}: make room, then repeat the command")) from None

    app.run(guarded, flags_parser=parse)


def _fatal(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _replace(config, names, value):
    if len(names) == 1:
        return dataclasses.replace(config, **{names[0]: value})
    return dataclasses.replace(config, **{names[0]: _replace(getattr(config, names[0]), names[1:], value)})
