"""Proves that command line, YAML and defaults meet in one validated config; each refusal is one useful line."""

import dataclasses
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sppo import config
from megatron_sppo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """How the weights move."""

    lr: float = 5e-7
    """Peak learning rate."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Which optimizer."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """Decay rates."""

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ConfigError(f"lr ({self.lr}) is negative. Use --lr 5e-7.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run."""

    load: Path
    """Checkpoint to start from."""
    optimization: OptimizerSection = field(default_factory=lambda: OptimizerSection(lr=1e-6))
    packing: bool = True
    """Pack sequences."""
    bias: bool | None = None
    """Three states."""
    fp8: str | None = None
    """FP8 format."""
    seed: int | None = 1234
    """Seed."""
    host: tuple[str, ...] = ()
    """Further KEY=VALUE settings."""

    def __post_init__(self) -> None:
        if self.seed == 13:
            raise ConfigError("seed 13 is  unlucky. Use --seed 14.")


def parse(*argv: str) -> Run:
    return config.parse(Run, name="run.py", description="Run it.", argv=argv)


def from_yaml(tmp_path: Path, text: str, *argv: str) -> Run:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return parse("--config", str(path), *argv)


def test_defaults_hold_where_nothing_is_said():
    assert parse("--load", "a") == Run(load=Path("a"))


def test_no_source_is_read_where_nobody_asks_for_help(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    source_of = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda of: read.append(of) or source_of(of))
    parse("--load", "a", "--lr", "1")
    assert read == []
    with pytest.raises(SystemExit):
        parse("--help")
    assert read


def test_flags_are_flat_and_kebab_case_and_the_later_one_wins():
    run = parse("--load=a b", "--lr", "1", "--lr", "2e-6", "--no-packing", "--betas", "0.5", "--fp8", "hybrid")
    section = OptimizerSection(lr=2e-6, betas=(0.5,))
    assert run == Run(load=Path("a b"), optimization=section, packing=False, fp8="hybrid")


def test_underscores_are_taken_for_hyphens():
    @dataclass(frozen=True, kw_only=True)
    class Batch:
        micro_batch_size: int = 1

    assert config.parse(Batch, name="x", description="", argv=["--micro_batch_size", "4"]) == Batch(micro_batch_size=4)


@pytest.mark.parametrize(
    "text",
    [
        "load: a\noptimization:\n  lr: 1e-7\n  optimizer: rmsprop\npacking: false\nseed: null\n",
        "load: a\nlr: 1e-7\noptimizer: rmsprop\npacking: no\nseed: ~\n",
        "{load: a, optimizer: rmsprop, optimization: {lr: '1e-7'}, packing: False, seed: None}",
    ],
)
def test_yaml_is_read_grouped_or_flat(tmp_path, text):
    expected = Run(
        load=Path("a"), optimization=OptimizerSection(lr=1e-7, optimizer="rmsprop"), packing=False, seed=None
    )
    assert from_yaml(tmp_path, text) == expected


def test_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    run = from_yaml(
        tmp_path, "load: a\nlr: 1e-7\nbetas: [0.1, 0.2]\nhost: {x: 1, y: z}\npacking: false", "--lr=3", "--packing"
    )
    section = OptimizerSection(lr=3.0, betas=(0.1, 0.2))
    assert run == Run(load=Path("a"), optimization=section, packing=True, host=("x=1", "y=z"))


def test_yaml_values_may_look_like_flags_or_numbers_or_booleans(tmp_path):
    run = from_yaml(tmp_path, "load: --weird\nfp8: '007'\nlr: -0.0\nbias: yes\nbetas: []")
    assert (run.load, run.fp8, run.bias, run.optimization.betas) == (Path("--weird"), "007", True, ())


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--load", "missing"]),
        (["--load", "a", "--lrr", "3"], ["--lrr", "Did you mean --lr?"]),
        (["--load", "a", "--optimizer", "sgd"], ["--optimizer", "sgd", "rmsprop"]),
        (["--load", "a", "--lr", "fast"], ["--lr", "fast"]),
        (["--load", "a", "stray"], ["stray"]),
        (["--load"], ["--load"]),
        (["--load", "a", "--packing=true"], ["--packing", "--no-packing"]),
        (["--load", "a", "--no-lr"], ["--no-lr"]),
        (["--config", "missing.yaml"], ["missing.yaml", "does not exist"]),
        (["--config"], ["--config FILE.yaml"]),
        (["--config=a", "--config", "b"], ["2 times"]),
        (["--config", "."], ["cannot be read"]),
    ],
)
def test_bad_command_lines_are_refused_in_one_line(argv, words):
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lrr: 3", ["'lrr'", "Did you mean lr?"]),
        ("optimization: {lrr: 3}", ["'lrr'", "section optimization", "Did you mean lr?"]),
        ("optimisation: {lr: 3}", ["'optimisation'", "Did you mean optimization?"]),
        ("lr: fast", ["--lr", "fast"]),
        ("lr: 1\noptimization: {lr: 2}", ["'lr'", "given twice"]),
        ("lr: 1\nlr: 2", ["'lr'", "given twice", "line 2"]),
        ("optimization: {packing: true}", ["'packing'", "belongs to no section"]),
        ("optimization: 3", ["optimization is a section"]),
        ("optimizer: sgd", ["--optimizer", "sgd"]),
        ("packing: maybe", ["'packing'", "true or false"]),
        ("lr:", ["'lr'", "empty"]),
        ("lr: [1, 2]", ["'lr'"]),
        ("betas: [[1], 2]", ["'betas'"]),
        ("lr: {a: 1}", ["'lr'", "mapping"]),
        ("lr: [1", ["line"]),
        ("- a\n- b", ["list"]),
        ("lr: \x07", ["YAML"]),
        ("seed: 3\nconfig: other.yaml", ["'config'"]),
    ],
)
def test_bad_yaml_is_refused_in_one_line_that_names_the_file(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        from_yaml(tmp_path, text, "--load", "a")
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in ["run.yaml", *words]), str(caught.value)


def test_a_fault_on_the_command_line_is_not_blamed_on_the_file(tmp_path):
    with pytest.raises(ConfigError) as caught:
        from_yaml(tmp_path, "load: a\nlr: 1", "--lr", "fast")
    assert "run.yaml" not in str(caught.value)


def test_yaml_tags_build_no_objects(tmp_path):
    marker = tmp_path / "executed"
    with pytest.raises(ConfigError):
        from_yaml(tmp_path, f"load: !!python/object/apply:os.system ['touch {marker}']")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--load", "a", "--lr=-1"], "lr (-1.0) is negative. Use --lr 5e-7."),
        (["--load", "a", "--seed", "13"], "seed 13 is  unlucky. Use --seed 14."),
    ],
)
def test_the_dataclass_own_refusals_come_out_unchanged(argv, message):
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert str(caught.value) == message


def test_a_section_may_hold_a_setting_of_its_own_name(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Objective:
        objective: str = "sppo"

    @dataclass(frozen=True, kw_only=True)
    class Job:
        objective: Objective = Objective()

    for text in ("objective: {objective: dpo}", "objective: dpo"):
        path = tmp_path / "job.yaml"
        path.write_text(text)
        job = config.parse(Job, name="x", description="", argv=["--config", str(path)])
        assert job == Job(objective=Objective(objective="dpo"))


def test_help_is_grouped_by_section_with_defaults_and_exits_0(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = capsys.readouterr().out
    assert caught.value.code in (0, None)
    for words in (
        "Run it.",
        "optimization options",
        "How the weights move.",
        "--lr FLOAT",
        "1e-06",
        "--no-packing",
        "--debug",
    ):
        assert words in text


def test_a_written_config_reads_back_equal(tmp_path):
    run = Run(
        load=Path("x y"), optimization=OptimizerSection(lr=1e-300, betas=()), bias=False, host=("a=1",), seed=None
    )
    config.write_yaml(run, tmp_path / "resolved.yaml")
    assert parse("--config", str(tmp_path / "resolved.yaml")) == run
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text()) == config.to_dict(run)


# Not "None", which a command line cannot tell from None, and no line breaks or control characters.
_TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1).filter(lambda t: t != "None")


@settings(deadline=None, max_examples=50)
@given(
    lr=st.floats(min_value=0, allow_infinity=False),
    betas=st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple),
    fp8=st.none() | _TEXTS,
    seed=st.none() | st.integers().filter(lambda seed: seed != 13),
    packing=st.booleans(),
)
def test_any_config_survives_yaml_and_flags(tmp_path_factory, lr, betas, fp8, seed, packing):
    run = Run(load=Path("a"), optimization=OptimizerSection(lr=lr, betas=betas), fp8=fp8, seed=seed, packing=packing)
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    config.write_yaml(run, path)
    assert parse("--config", str(path)) == run
    assert parse(*config.to_flags(run)) == run


def test_flags_of_a_section_leave_out_its_own_defaults():
    assert config.to_flags(OptimizerSection(optimizer="rmsprop")) == ["--optimizer=rmsprop"]


@dataclass(frozen=True, kw_only=True)
class ImportCommand:
    """Read a checkpoint."""

    source: Path


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a checkpoint."""

    target: Path


def parse_command(*argv: str) -> object:
    commands = {"import": ImportCommand, "export": ExportCommand}
    return config.parse_command(commands, name="convert.py", description="Convert.", argv=argv)


def test_a_command_chooses_its_config():
    assert parse_command("import", "--source", "a") == ImportCommand(source=Path("a"))
    assert parse_command("--debug", "export", "--target", "b") == ExportCommand(target=Path("b"))


@pytest.mark.parametrize(
    ("argv", "word"), [([], "missing"), (["improt"], "'improt'"), (["--source", "a"], "'--source'")]
)
def test_a_missing_or_unknown_command_names_the_choices(argv, word):
    with pytest.raises(ConfigError) as caught:
        parse_command(*argv)
    assert word in str(caught.value)
    assert "convert.py import" in str(caught.value)


def test_help_of_commands_lists_them_and_each_has_its_own(capsys):
    for argv, words in (
        (["--help"], ["Read a checkpoint."]),
        (["export", "--help"], ["Write a checkpoint.", "--target"]),
    ):
        with pytest.raises(SystemExit):
            parse_command(*argv)
        text = capsys.readouterr().out
        assert all(word in text for word in words)


def test_two_sections_with_one_flag_are_a_programmers_mistake():
    @dataclass(frozen=True, kw_only=True)
    class Clash:
        one: OptimizerSection = OptimizerSection()
        lr: float = 1.0

    with pytest.raises(AssertionError, match="--lr"):
        config.parse(Clash, name="x", description="", argv=[])


@dataclass(frozen=True, kw_only=True)
class Layout:
    ranks: Annotated[config.PositiveInt | None, config.LAYOUT] = 1
    micro: Annotated[config.PositiveInt, config.LAYOUT] = 2
    eps: Annotated[float, config.Range(0, 1), config.LAYOUT] = 0.5

    def __post_init__(self) -> None:
        config.check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class SectionOfLogs:
    log_dir: str = "logs"


@dataclass(frozen=True, kw_only=True)
class Marked:
    steps: int = 3
    layout: Layout = Layout()
    optimizer: OptimizerSection = OptimizerSection()
    whole: Annotated[SectionOfLogs, config.LAYOUT] = SectionOfLogs()


def test_what_is_not_marked_layout_decides():
    before = config.deciding(Marked())
    assert before == {"steps": 3, "optimizer.lr": 5e-7, "optimizer.optimizer": "adam", "optimizer.betas": [0.9, 0.95]}
    assert config.deciding(Marked(layout=Layout(ranks=8), whole=SectionOfLogs(log_dir="x"))) == before
    assert config.deciding(Marked(steps=4)) == {**before, "steps": 4}


@pytest.mark.parametrize("name", ["ranks", "micro", "eps"])
def test_a_marked_number_keeps_its_range(name):
    with pytest.raises(ConfigError, match=f"{name} is -1; it must be a number in"):
        Layout(**{name: -1})
    with pytest.raises(ConfigError, match=f"--{name}") as caught:
        config.parse(Layout, name="x", description="", argv=[f"--{name}", "many"])
    assert "Annotated" not in str(caught.value) and "LAYOUT" not in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Holds the settings of another command."""

    rounds: int = 1
    other: Annotated[
        Run,
        config.SettingsOf(Run, name="other", decided={"load": "LOAD"}, by="the loop"),
    ]


def parse_loop(*argv: str) -> Loop:
    return config.parse(Loop, name="loop.py", description="", argv=argv)


def test_another_command_s_settings_are_typed_as_name_value_and_written_as_a_mapping(tmp_path):
    defaults = Run(load=Path("LOAD"))
    assert parse_loop().other == defaults
    typed = parse_loop("--other", "lr=5.0e-7", "packing=false", "host=[a=1, b=2]", "seed=None", "--rounds", "2")
    assert typed.rounds == 2
    assert typed.other == dataclasses.replace(
        defaults, optimization=OptimizerSection(lr=5e-7), packing=False, host=("a=1", "b=2"), seed=None
    )
    file = tmp_path / "loop.yaml"
    file.write_text(
        "rounds: 2\nother:\n  optimization: {lr: 5.0e-7}\n  packing: false\n  host: [a=1, b=2]\n  seed: null\n"
    )
    assert parse_loop("--config", str(file)) == typed
    over = parse_loop("--config", str(file), "--other", "lr=1e-6", "--other=fp8=e4m3", "--rounds", "3")
    optimization = OptimizerSection(lr=1e-6)
    assert over == Loop(rounds=3, other=dataclasses.replace(typed.other, optimization=optimization, fp8="e4m3"))


@pytest.mark.counts("bad inputs")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "other holds 'lr'. Write NAME=VALUE, or in YAML `other: {NAME: VALUE}`"),
        ("host=[a", "other holds 'host=\\[a', which is not YAML"),
        ("load=x", "other sets load, which the loop decides itself. Remove it"),
        ("lrr=1", "section other: unknown key 'lrr'. Did you mean lr"),
        ("optimization={lr: 1}", None),
        ("lr=-1", "^lr \\(-1.0\\) is negative. Use --lr 5e-7.$"),
        ("lr=many", "section other: .*--lr"),
        ("seed=13", "^seed 13 is  unlucky"),
    ],
)
def test_another_command_s_settings_are_refused_in_its_own_words(text, message):
    if message is None:
        assert parse_loop("--other", text).other.optimization.lr == 1
        return
    with pytest.raises(ConfigError, match=message):
        parse_loop("--other", text)


def test_a_holder_reads_back_from_what_it_keeps():
    loop = parse_loop("--other", "lr=4.0e-5", "host=[a=1]", "bias=true", "--rounds", "4")
    kept = config.to_dict(loop)
    assert "load" not in kept["other"]
    assert config.from_dict(Loop, json.loads(json.dumps(kept)), place="state.json") == loop
    assert config.deciding(loop)["other.optimization.lr"] == 4e-5
    with pytest.raises(ConfigError, match="state.json: unknown key 'round'"):
        config.from_dict(Loop, {"round": 1}, place="state.json")


@pytest.mark.parametrize(("value", "text"), [(5e-7, "5e-7"), (1e-12, "1e-12"), (1e20, "1e+20"), (0.1, "0.1"), (3, "3")])
def test_numbers_are_spelled_as_people_type_them(value, text):
    assert config.spell(value) == text and float(config.spell(value)) == value


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two paths."""

    one: Annotated[Path, config.POSITIONAL]
    other: Annotated[Path, config.POSITIONAL]
    quiet: bool = False


@pytest.mark.parametrize(
    "argv",
    [
        ["a", "b", "--quiet"],
        ["--quiet", "a", "b"],
        ["a", "--quiet", "b"],
        ["a", "--other", "b", "--quiet"],
        ["--other", "b", "--quiet", "a"],
        ["--quiet", "--one", "a", "--other=b"],
    ],
    ids=["bare", "behind", "around", "half", "half behind", "flags"],
)
def test_a_positional_setting_is_typed_with_or_without_its_flag(argv: list[str]) -> None:
    assert config.parse(Pair, name="pair", description="", argv=argv) == Pair(
        one=Path("a"), other=Path("b"), quiet=True
    )


@pytest.mark.parametrize(("argv", "word"), [(["a"], "--other is missing"), (["a", "b", "c"], "c")])
def test_too_few_or_too_many_positional_settings_are_refused(argv: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        config.parse(Pair, name="pair", description="", argv=argv)
