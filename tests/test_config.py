"""Configs: what bind, check and override refuse and how they say it; a saved config is the same config."""

import dataclasses
import functools
import math
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any, Literal

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a1jax import config
from a1jax.config import Binding, ConfigError, bind


def objective(
    logits: jax.Array, temperature: float = 1.0, *, kind: Literal["forward", "reverse"] = "forward", top: int | None = None
) -> float:
    return temperature


@dataclasses.dataclass(frozen=True)
class Stage:
    steps: int = 10
    rate: float = 1e-3
    loss: Binding = bind(objective, temperature=2.0)
    kind: Literal["a", "b"] = "a"
    stop: float | None = None

    def __post_init__(self):
        if self.steps < 0 or (self.stop is not None and self.stop > self.steps):
            raise ConfigError(f"steps = {self.steps}\nmust not be below 0 or stop")


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "try"
    stage: Stage = Stage()
    teachers: dict[str, Stage] = dataclasses.field(default_factory=lambda: {"search": Stage(steps=1), "tools": Stage(steps=2)})
    more: tuple[Stage, ...] = (Stage(), Stage(steps=5))
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "x")
    weights: dict[str, float] = dataclasses.field(default_factory=lambda: {"a": 1, "b": 0.5})
    names: list[str] = dataclasses.field(default_factory=list)
    flag: bool = False
    either: int | str = 3
    mode: Literal[0, 1] = 0
    schedule: Callable[[int], float] | None = None
    anything: Any = None
    label: str | None = None
    extra: Stage | None = None
    folder: pathlib.Path = pathlib.Path("data")
    total: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        object.__setattr__(self, "total", self.stage.steps)


# The saved files import these by name, so the test file needs one that can be imported.
module = types.ModuleType("a1jax_test_config_home")
sys.modules[module.__name__] = module
for thing in (objective, Stage, Config):
    thing.__module__ = module.__name__
    setattr(module, thing.__name__, thing)


def _error(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_binding_calls_its_function_with_what_is_bound():
    bound = bind(objective, temperature=0.5)
    assert bound(None) == 0.5 and bound(None, temperature=4.0) == 4.0
    assert bind(bound, kind="reverse") == bind(objective, kind="reverse", temperature=0.5) != bound
    assert bind(bound, temperature=3)(None) == 3
    assert hash(bound) == hash(bind(objective, temperature=0.5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        bound.fn = None
    bound.kwargs["temperature"] = 9  # a copy
    assert bound(None) == 0.5


def test_bind_refuses_unknown_names_when_built():
    message = _error(bind, objective, temprature=1.0)
    for part in ("objective", "'temprature'", "did you mean 'temperature'?", "logits, temperature, kind, top"):
        assert part in message
    assert "optax.adamw has no parameter 'lr'" in _error(bind, optax.adamw, lr=1.0)
    assert "has no parameter 'steps_'" in _error(bind, Stage, steps_=1)
    assert bind(lambda **anything: anything, x=1)() == {"x": 1}
    assert "cannot be called" in _error(bind, 3)


def test_bind_refuses_values_of_the_wrong_type():
    assert "objective(temperature=...): got 'hot' (str), expected float" in _error(bind, objective, temperature="hot")
    assert "expected one of 'forward', 'reverse'" in _error(bind, objective, kind="both")
    assert "expected int | None" in _error(bind, objective, top=1.5)
    assert "got True (bool), expected float" in _error(bind, objective, temperature=True)
    assert bind(objective, temperature=1, top=None).kwargs == {"temperature": 1, "top": None}
    assert bind(optax.adamw, learning_rate=optax.constant_schedule(1.0), b1=0.5).kwargs["b1"] == 0.5
    assert bind(Stage, steps=3)() == Stage(steps=3)


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("stage.steps=7", "stage.steps", 7),
        ("stage.rate=1", "stage.rate", 1.0),
        ("stage.rate = 1e-5", "stage.rate", 1e-5),
        ("stage.stop=3", "stage.stop", 3),
        ("stage.stop=None", "stage.stop", None),
        ("stage.kind=b", "stage.kind", "b"),
        ("stage.loss.temperature=5", "stage.loss.temperature", 5.0),
        ("stage.loss.top=4", "stage.loss.top", 4),
        ("stage.loss.kind='reverse'", "stage.loss.kind", "reverse"),
        ("teachers.search.steps=9", "teachers.search.steps", 9),
        ("more.1.rate=2.5", "more.1.rate", 2.5),
        ("more.0.loss.temperature=5", "more.0.loss.temperature", 5.0),
        ("sizes=[3, 4, 5]", "sizes", (3, 4, 5)),
        ("sizes.1=9", "sizes.1", 9),
        ("sizes=()", "sizes", ()),
        ("pair=(2, 'y')", "pair", (2, "y")),
        ("weights.a=0.25", "weights.a", 0.25),
        ("weights={'c': 3}", "weights", {"c": 3}),
        ("names=('u', 'v')", "names", ["u", "v"]),
        ("flag=True", "flag", True),
        ("either=five", "either", "five"),
        ("either=5", "either", 5),
        ("name=7", "name", "7"),
        ("name='quoted'", "name", "quoted"),
        ("name=a=b", "name", "a=b"),
        ("label=None", "label", None),
        ("label=12", "label", "12"),
        ("anything=[1, 'x']", "anything", [1, "x"]),
        ("anything=words here", "anything", "words here"),
        ("extra=None", "extra", None),
        ("folder=a/b", "folder", pathlib.Path("a/b")),
    ],
)
def test_override_reads_a_value_as_its_place_wants_it(assignment, path, value):
    got = config.override(Config(), [assignment])
    for part in path.split("."):
        if isinstance(got, Binding):
            got = got.kwargs[part]
        else:
            got = got[int(part)] if isinstance(got, (tuple, list)) else got[part] if isinstance(got, dict) else getattr(got, part)
    assert got == value and type(got) is type(value)
    config.check(config.override(Config(), [assignment]))


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("stage.stepz=7", ["stage.stepz", "did you mean 'steps'?", "it has: steps, rate, loss, kind, stop"]),
        ("stag.steps=7", ["stag: no such field in Config", "did you mean 'stage'?"]),
        ("stage.steps=1.5", ["stage.steps: got 1.5 (float), expected int"]),
        ("stage.steps=many", ["stage.steps: got 'many' (str), expected int"]),
        ("stage.rate=True", ["stage.rate: got True (bool), expected float"]),
        ("flag=1", ["flag: got 1 (int), expected bool"]),
        ("flag=true", ["flag: got 'true' (str), expected bool"]),
        ("stage.kind=c", ["stage.kind", "one of 'a', 'b'"]),
        ("stage.stop=x", ["stage.stop", "expected float | None"]),
        ("stage=3", ["stage: a Stage", "stage.steps, stage.rate"]),
        ("stage.loss=objective", ["stage.loss", "objective", "chosen in the experiment file", "stage.loss.temperature"]),
        ("stage.loss.temprature=1", ["stage.loss.temprature", "did you mean 'temperature'?", "kind"]),
        ("stage.loss.temperature=x", ["stage.loss.temperature: got 'x' (str), expected float"]),
        ("teachers.serch.steps=1", ["teachers.serch: no such key in dict", "did you mean 'search'?", "search, tools"]),
        ("teachers.search.rate=x", ["teachers.search.rate: got 'x'"]),
        ("more.2.steps=1", ["more.2: no such index in tuple", "it has: 0, 1"]),
        ("sizes=[1, 'x']", ["sizes.1: got 'x' (str), expected int"]),
        ("sizes=5", ["sizes: got 5 (int), expected tuple[int, ...]"]),
        ("pair=(1,)", ["pair", "expected tuple[int, str]"]),
        ("weights={'a': 'x'}", ["weights.a: got 'x' (str), expected float"]),
        ("weights={1: 1.0}", ["weights.1: got 1 (int), expected str"]),
        ("name.x=1", ["name: 'try' (str), so nothing inside it can be set"]),
        ("schedule=fast", ["schedule", "a function or binding"]),
        ("total=3", ["total: no such field"]),  # computed, not set
        ("stage.steps", ["stage.steps: write path.to.field=value"]),
        ("=3", ["write path.to.field=value"]),
        ("stage..steps=3", ["write path.to.field=value"]),
        ("stage.steps=-1", ["stage: steps = -1 must not be below 0"]),
        ("teachers.search.steps=-1", ["teachers.search: steps = -1"]),
    ],
)
def test_override_refuses_in_one_line_with_the_path(assignment, parts):
    message = _error(config.override, Config(), [assignment])
    for part in parts:
        assert part in message


def test_overrides_are_applied_together_and_leave_the_config_alone():
    cfg = Config()
    got = config.override(cfg, ["stage.stop=15", "stage.steps=20", "name=a", "name=b"])  # stop alone would be refused
    assert (got.stage.stop, got.stage.steps, got.name, got.total) == (15, 20, "b", 20)
    assert cfg == Config() and config.override(cfg, []) is cfg
    assert "keep one of the two" in _error(config.override, cfg, ["sizes=[1]", "sizes.0=1"])
    assert "keep one of the two" in _error(config.override, cfg, ["sizes.0=1", "sizes=[1]"])


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (Config(name=3), "name: got 3 (int), expected str"),
        (Config(stage=Stage(rate="fast")), "stage.rate: got 'fast' (str), expected float"),
        (Config(more=(Stage(), Stage(kind="z"))), "more.1.kind: got 'z' (str), expected one of 'a', 'b'"),
        (Config(teachers={"x": Stage(steps=True)}), "teachers.x.steps: got True (bool), expected int"),
        (Config(teachers={"x": 3}), "teachers.x: got 3 (int), expected Stage"),
        (Config(stage=Stage(loss=objective)), "stage.loss: got <function"),
        (Config(mode=True), "mode: got True (bool), expected one of 0, 1"),  # though True == 1
        (Config(sizes=[1, 2]), None),  # a list serves as a tuple
        (Config(schedule=bind(optax.constant_schedule, value=1.0)), None),
        (Config(), None),
    ],
)
def test_check_finds_a_wrong_type_by_its_path(cfg, message):
    if message is None:
        config.check(cfg)
    else:
        assert message in _error(config.check, cfg)


def test_annotations_that_cannot_be_resolved_do_not_spoil_the_others():
    @dataclasses.dataclass(frozen=True)
    class Loose:
        odd: "NotImportedHere" = None  # noqa: F821
        steps: "int" = 1

    config.check(Loose(odd=object()))
    assert "steps: got 'x'" in _error(config.check, Loose(steps="x"))


FULL = Config(
    name="quotes \" ' and \\ and é\n",
    stage=Stage(rate=math.inf, loss=bind(optax.adamw, learning_rate=bind(optax.constant_schedule, value=1.0), b1=0.1), stop=-1e-300),
    teachers={"a b": Stage(loss=bind(objective, kind="reverse")), "c": Stage(loss=bind(jax.nn.silu))},
    sizes=(1,),
    anything={"t": (), "u": [1, (2,)], 3: {None: b"x"}, "d": np.dtype("int8"), "f": jnp.bfloat16, "s": frozenset({2, 1}), "k": Stage},
    extra=Stage(),
    folder=pathlib.Path("a/b c"),
)


def test_a_saved_config_is_the_same_config(tmp_path):
    for name, cfg in (("full", FULL), ("plain", Config())):
        path = tmp_path / f"{name}.py"
        config.save(cfg, path)
        again = config.load(str(path))
        assert again == cfg and repr(again) == repr(cfg) and config.diff(again, cfg) == []
        config.save(again, tmp_path / "again.py")
        assert (tmp_path / "again.py").read_text() == path.read_text()
        assert max(map(len, path.read_text().splitlines())) <= 140
    text = (tmp_path / "full.py").read_text()
    assert "optax.adamw(" not in text and "bind(optax.adamw, learning_rate=bind(optax.constant_schedule, value=1.0), b1=0.1)" in text
    assert "import optax\n" in text and "_src" not in text
    assert "takes no argument" in _error(config.load, f"{path}:smoke")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.py", "full.py", "plain.py"]  # no temporary files, no byte code


_values = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=5)),
        st.sampled_from([optax.sgd, Stage, jnp.int8]),
    ),
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.tuples(inside, inside)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inside, max_size=3)
        | inside.map(lambda value: bind(dict, value=value))
    ),
    max_leaves=8,
)


@hypothesis.given(_values)
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_plain_value_survives_saving(tmp_path_factory, value):
    cfg = Config(anything=value)
    path = tmp_path_factory.mktemp("saved") / "config.py"
    config.save(cfg, path)
    assert repr(config.load(str(path))) == repr(cfg)
    assert config.diff(config.load(str(path)), cfg) == []


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (lambda x: x, ["anything", "cannot be imported by name"]),
        (bind(lambda x: x), ["anything", "cannot be imported by name"]),
        (np.zeros(2), ["anything: ndarray cannot be written"]),
        ([1, object()], ["anything.1: object cannot be written"]),
        ({"k": functools.partial(objective)}, ["anything.k"]),
    ],
)
def test_what_cannot_be_named_is_not_saved(tmp_path, value, parts):
    message = _error(config.save, Config(anything=value), tmp_path / "folder" / "config.py")
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_diff_names_every_change():
    new = dataclasses.replace(
        Config(),
        name="other",
        stage=Stage(steps=11, loss=bind(objective, temperature=3.0, top=2)),
        sizes=(1, 2, 3),
        teachers={"search": Stage(steps=1)},
        anything=1.0,
    )
    assert config.diff(Config(), new) == [
        "name: 'try' -> 'other'",
        "stage.steps: 10 -> 11",
        "stage.loss.temperature: 2.0 -> 3.0",
        "stage.loss.top: (not set) -> 2",
        f"teachers.tools: {Stage(steps=2)!r} -> (not set)",
        "sizes.2: (not set) -> 3",
        "anything: None -> 1.0",
        "total: 10 -> 11",
    ]
    other = dataclasses.replace(Config(), stage=Stage(loss=bind(optax.sgd, learning_rate=2.0)))
    assert config.diff(Config(), other)[0] == "stage.loss: a1jax_test_config_home.objective -> optax.sgd"
    assert config.diff(Config(anything=math.nan), Config(anything=math.nan)) == []
    assert config.diff(Config(anything=1), Config(anything=True)) == ["anything: 1 -> True"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("def get_config(arg=''):\n    return (\n", ["exp.py:2: syntax error"]),
        ("x = 1\n", ["exp.py: has no function get_config(arg)"]),
        ("import nowhere_at_all\n", ["exp.py:1: ModuleNotFoundError: No module named 'nowhere_at_all'"]),
        ("def get_config(arg=''):\n    return missing\n", ["exp.py:2: NameError"]),
        ("def get_config(arg=''):\n    return 3\n", ["returned int, not a config dataclass"]),
        (
            "from a1jax.config import ConfigError\ndef get_config(arg=''):\n    raise ConfigError(f'unknown arg {arg!r}: smoke, full')\n",
            ["exp.py:3: unknown arg 'big': smoke, full"],
        ),
        (
            "from a1jax_test_config_home import Stage\ndef get_config(arg=''):\n    return Stage(\n        stepz=1)\n",
            ["exp.py:3: TypeError", "'stepz'"],
        ),
    ],
)
def test_load_says_in_one_line_what_is_wrong_with_a_file(tmp_path, text, parts):
    (tmp_path / "exp.py").write_text(text)
    message = _error(config.load, f"{tmp_path / 'exp.py'}:big")
    for part in parts:
        assert part in message


def test_load_finds_files_and_passes_the_arg(tmp_path):
    (tmp_path / "exp.py").write_text("from a1jax_test_config_home import Stage\ndef get_config(arg=''):\n    return Stage(loss=arg)\n")
    assert config.load(str(tmp_path / "exp.py")).loss == ""
    assert config.load(f"{tmp_path / 'exp.py'}:a:b,c=3").loss == "a:b,c=3"
    assert "no such file, did you mean 'exp.py'?" in _error(config.load, f"{tmp_path / 'exq.py'}")
    assert "no such file" in _error(config.load, str(tmp_path / "no" / "folder.py"))
    assert "expected FILE.py or FILE.py:arg" in _error(config.load, "smoke")
