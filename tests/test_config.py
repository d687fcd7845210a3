import dataclasses

import pytest
from absl import flags

from mgjax import config as cfg
from mgjax.config import ConfigError, key


@dataclasses.dataclass(frozen=True)
class Optim:
    learning_rate: float = key(0.1, "peak")
    steps: int = key(10, "how long")


@dataclasses.dataclass(frozen=True)
class Experiment:
    name: str = key("a", "of it")
    flip: bool = key(True, "mirror")
    sizes: tuple[int, ...] = key((1, 2), "of layers")
    shares: tuple[float, ...] = key((), "of time")
    optim: Optim = Optim()


def parse(*arguments):
    values = flags.FlagValues()
    cfg.define(Experiment(), values)
    values(["program", *arguments])
    return cfg.override(Experiment(), cfg.given(Experiment(), values)), values


def test_defaults_and_overrides_of_every_type():
    assert parse()[0] == Experiment()
    got, _ = parse(
        "--config.name=b", "--noconfig.flip", "--config.sizes=3,4,5", "--config.shares=0.5",
        "--config.optim.learning_rate=3e-4", "--config.optim.steps=7",
    )  # fmt: skip
    assert got == Experiment("b", False, (3, 4, 5), (0.5,), Optim(3e-4, 7))
    assert parse("--config.sizes=")[0].sizes == ()


def test_only_what_was_given_counts_as_given():
    _, values = parse("--config.name=a")
    assert cfg.given(Experiment(), values) == {"name": "a"}


def test_help_lists_every_key_with_default_and_meaning():
    text = parse()[1].get_help()
    for dotted, leaf in cfg.leaves(Experiment()).items():
        assert f"config.{dotted}" in text and leaf.help in text
    assert "(default: '0.1')" in text


@pytest.mark.parametrize("argument", ["--config.optim.steps=many", "--config.sizes=1,x", "--config.flip=perhaps"])
def test_values_of_the_wrong_type_are_refused(argument):
    with pytest.raises(flags.IllegalFlagValueError, match="config"):
        parse(argument)


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("optim.lr", "optim.learning_rate"),
        ("learning_rate", "optim.learning_rate"),
        ("optim.stpes", "optim.steps"),
        ("nmae", "name"),
    ],
)
def test_an_unknown_key_names_the_nearest(wrong, near):
    with pytest.raises(ConfigError, match=f"unknown key --config.{wrong}; the nearest is --config.{near} "):
        cfg.override(Experiment(), {wrong: 1})


def test_configs_are_frozen_and_flat_both_ways():
    assert cfg.to_dict(Experiment())["optim.learning_rate"] == 0.1
    assert cfg.override(Experiment(), cfg.to_dict(Experiment(name="c"))) == Experiment(name="c")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Experiment().name = "d"


def test_a_type_that_no_flag_has():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        value: dict = key(None, "odd")

    with pytest.raises(ConfigError, match="value: a config key cannot be of type"):
        cfg.define(Odd(), flags.FlagValues())
