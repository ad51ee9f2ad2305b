"""Settings: files, options, checks, and the way back to TOML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from mpillm.config import Section, describe, dump, from_table, load, setting_names, to_table
from mpillm.errors import UserError
from mpillm.training.settings import RunConfig


class Numbers(Section, frozen=True, kw_only=True):
    """Numbers and switches."""

    steps: Annotated[int, Meta(ge=1, description="how many")] = 10
    rate: Annotated[float, Meta(ge=0, lt=1, description="how fast")] = 0.5
    clip: Annotated[float, Meta(description="any number")] = 1.0
    betas: Annotated[tuple[float, float], Meta(description="two numbers")] = (0.9, 0.95)
    sizes: Annotated[tuple[int, ...], Meta(description="integers")] = ()
    exact: Annotated[bool, Meta(description="a switch")] = False
    peak: Annotated[float, Meta(gt=0)] | None = None


class Words(Section, frozen=True, kw_only=True):
    """Words."""

    name: Annotated[str, Meta(description="any text")] = ""
    kind: Annotated[Literal["cosine", "constant", "1f1b"], Meta(description="one of three")] = (
        "cosine"
    )
    files: Annotated[tuple[str, ...], Meta(description="several texts")] = ()


class Shape(Section, frozen=True, kw_only=True):
    """A union of sections, told apart by `family`."""

    family: str

    @classmethod
    def variant(cls, table: dict[str, Any], where: str) -> type[Section]:
        name = table.get("family", "box")
        if name not in ("box", "ball"):
            raise UserError(f"{where}.family: no family {name!r}; did you mean 'box'?")
        return Box if name == "box" else Ball


class Box(Shape, frozen=True, kw_only=True):
    """A box."""

    family: str = "box"
    width: Annotated[int, Meta(ge=1, description="of the box")]


class Ball(Shape, frozen=True, kw_only=True):
    """A ball."""

    family: str = "ball"
    radius: Annotated[float, Meta(gt=0, description="of the ball")] = 1.0


class Config(Section, frozen=True, kw_only=True):
    """All sections."""

    shape: Shape
    numbers: Numbers = Numbers()
    words: Words = Words()


BOX = '[shape]\nfamily = "box"\nwidth = 3\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "job.toml"
    path.write_text(text)
    return path


def message(folder: Path, text: str, *overrides: str) -> str:
    """The error line of a file and options, without the folder's name."""
    with pytest.raises(UserError) as caught:
        load(Config, write(folder, text), overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(f"{folder}/", "")


def test_file_and_options(tmp_path: Path) -> None:
    text = BOX + '[numbers]\nrate = 0\nbetas = [0, 0.5]\n[words]\nkind = "constant"\n'
    config = load(
        Config, write(tmp_path, text), ["--numbers.steps=7", "--numbers.exact", "--words.name=a b"]
    )
    assert config == Config(
        shape=Box(width=3),
        numbers=Numbers(steps=7, rate=0.0, betas=(0.0, 0.5), exact=True),
        words=Words(kind="constant", name="a b"),
    )
    assert isinstance(config.numbers.rate, float)


@pytest.mark.parametrize(
    ("option", "section", "key", "value"),
    [
        ("--words.name=7", "words", "name", "7"),
        ("--words.name=", "words", "name", ""),
        ("--words.name=a=b", "words", "name", "a=b"),
        ("--words.name=true", "words", "name", "true"),
        ("--words.name='quoted'", "words", "name", "quoted"),
        ("--words.name=1\nx=2", "words", "name", "1\nx=2"),
        ("--words.kind=1f1b", "words", "kind", "1f1b"),
        ("--words.files=a.txt", "words", "files", ("a.txt",)),
        ('--words.files=["a", "b"]', "words", "files", ("a", "b")),
        ("--numbers.rate=.25", "numbers", "rate", 0.25),
        ("--numbers.clip=-1e-3", "numbers", "clip", -1e-3),
        ("--numbers.sizes=4", "numbers", "sizes", (4,)),
        ("--numbers.betas=[0, 1]", "numbers", "betas", (0.0, 1.0)),
        ("--numbers.exact=false", "numbers", "exact", False),
        ("--numbers.peak=2", "numbers", "peak", 2.0),
    ],
)
def test_option_values(option: str, section: str, key: str, value: object) -> None:
    config = load(Config, None, ["--shape.width=1", option])
    assert getattr(getattr(config, section), key) == value


def test_later_options_win_and_hyphens_are_underscores() -> None:
    overrides = ["--shape.width=1", "--train.batch-size=1", "--train.batch-size=8"]
    overrides[0] = "--model.family=gpt2"
    assert load(RunConfig, None, overrides).train.batch_size == 8


def test_options_leave_the_given_table_alone() -> None:
    table = {"shape": {"width": 2}}
    assert load(Config, table, ["--shape.width=3"]).shape == Box(width=3)
    assert table == {"shape": {"width": 2}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOX + "[numbrs]\n", "job.toml: numbrs: no such section; did you mean 'numbers'?"),
        (
            BOX + "[numbers]\nstep = 1",
            "job.toml: numbers.step: no such setting; did you mean 'steps'?",
        ),
        (
            BOX + "[words]\nbetas = 1",
            "job.toml: words.betas: no such setting; did you mean 'numbers.betas'?",
        ),
        ("steps = 1\n" + BOX, "job.toml: steps: no such section; did you mean 'numbers.steps'?"),
        (BOX + "'a\tb' = 1", r"job.toml: shape.'a\tb': no such setting; valid: family, width"),
        (
            BOX + "[numbers]\nsteps = 0",
            "job.toml: numbers.steps: expected integer >= 1, got 0",
        ),
        (
            BOX + "[numbers]\nsteps = 1.0",
            "job.toml: numbers.steps: expected integer >= 1, got 1.0",
        ),
        (
            BOX + "[numbers]\nsteps = true",
            "job.toml: numbers.steps: expected integer >= 1, got true",
        ),
        (
            BOX + "[numbers]\nrate = true",
            "job.toml: numbers.rate: expected number >= 0 and < 1, got true",
        ),
        (
            BOX + '[numbers]\nrate = "x"',
            "job.toml: numbers.rate: expected number >= 0 and < 1, got 'x'",
        ),
        (BOX + "[numbers]\nclip = nan", "job.toml: numbers.clip: expected number, got nan"),
        (
            BOX + "[numbers]\nbetas = [0.9, nan]",
            "job.toml: numbers.betas: expected [number, number], got [0.9, nan]",
        ),
        (
            BOX + "[numbers]\nbetas = [0.9]",
            "job.toml: numbers.betas: expected [number, number], got [0.9]",
        ),
        (
            BOX + '[numbers]\nsizes = [1, "b"]',
            "job.toml: numbers.sizes: expected [integer, ...], got [1, 'b']",
        ),
        (BOX + "[numbers]\nexact = 1", "job.toml: numbers.exact: expected true or false, got 1"),
        (BOX + "[numbers]\npeak = 0", "job.toml: numbers.peak: expected number > 0, got 0"),
        (BOX + "[words]\nname = 3", "job.toml: words.name: expected text, got 3"),
        (
            BOX + '[words]\nkind = "cosin"',
            "job.toml: words.kind: no such value 'cosin'; did you mean 'cosine'?",
        ),
        (
            BOX + '[words]\nkind = "x"',
            "job.toml: words.kind: no such value 'x'; valid: 1f1b, constant, cosine",
        ),
        (
            BOX + "[words]\nkind = 1",
            "job.toml: words.kind: expected 1f1b | constant | cosine, got 1",
        ),
        (
            "words = 1\n" + BOX,
            "job.toml: words: a section, not a value; expected words.key, got 1",
        ),
        (
            '[shape]\nfamily = "boks"',
            "job.toml: shape.family: no family 'boks'; did you mean 'box'?",
        ),
        ("", "job.toml: missing section [shape]: A union of sections, told apart by `family`."),
        ("[shape]", "job.toml: missing setting shape.width: of the box"),
        (
            '[shape]\nfamily = "ball"\nwidth = 1',
            "job.toml: shape.width: no such setting; valid: family, radius",
        ),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, expected: str) -> None:
    assert message(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--numbers.step=1", "--numbers.step: no such setting; did you mean 'steps'?"),
        ("--numbrs.steps=1", "--numbrs.steps: no such section; did you mean 'numbers'?"),
        ("--steps=1", "--steps: no such section; did you mean 'numbers.steps'?"),
        ("--numbers.steps=x", "--numbers.steps: expected integer >= 1, got 'x'"),
        (
            "--numbers.steps",
            "--numbers.steps: no value given; expected --numbers.steps=integer >= 1",
        ),
        ("--numbers.steps.x=1", "--numbers.steps.x: expected integer >= 1, got {'x': 1}"),
        ("--numbers=3", "--numbers: a section, not a value; expected numbers.key, got 3"),
        ("--words.kind=cosin", "--words.kind: no such value 'cosin'; did you mean 'cosine'?"),
        ("--shape.family=boks", "--shape.family: no family 'boks'; did you mean 'box'?"),
        ("--.steps=3", "--.steps=3: expected --section.key=value"),
        ("numbers.steps=3", "numbers.steps=3: expected --section.key=value"),
    ],
)
def test_mistakes_in_an_option(tmp_path: Path, option: str, expected: str) -> None:
    assert message(tmp_path, BOX, option) == expected


def test_long_values_are_cut(tmp_path: Path) -> None:
    line = message(tmp_path, BOX + f'[numbers]\nsteps = "{"x" * 500}"')
    assert line.endswith("xxx...") and len(line) < 150


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, BOX)
    for name, expected in [
        ("jobs.toml", f"no such file; did you mean '{tmp_path}/job.toml'?"),
        ("no/job.toml", f"no such file; there is no folder {tmp_path}/no either"),
        (".", "cannot be read: Is a directory"),
    ]:
        with pytest.raises(UserError) as caught:
            load(Config, tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {expected}"


def test_files_that_are_not_toml(tmp_path: Path) -> None:
    line = message(tmp_path, "[shape]\nwidth = = 3\n")
    assert line.startswith("job.toml: not TOML: ") and "line 2, column 9" in line
    (tmp_path / "job.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(UserError, match=r"job.toml: not UTF-8 text \(byte 5\)"):
        load(Config, tmp_path / "job.toml")


DEEP = ".".join("a" * 150)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a = " + "[" * 100_000, "not TOML: nested too deeply"),
        ("a = " + "{a=" * 50_000, "not TOML: nested too deeply"),
        (f"{DEEP} = 1", "not TOML: nested too deeply"),
        (f"[{DEEP}]\n{DEEP} = 1", "not TOML: nested too deeply"),
        (f"# a comment\n{DEEP}.{DEEP} = 1", "not TOML: line 2 has more than 200 dots"),
        ("a = 0x" + "f" * 65, "not TOML: an integer has more than 256 bits"),
        ("a = 0x" + "f" * 100_000, "not TOML: an integer has more than 256 bits"),
        ("a = " + "9" * 200_000, "not TOML: "),
        ("a = 1\na = 2", "not TOML: Cannot overwrite a value"),
        ("a = 1" + " " * 2**18, "more than 256 KiB; not a file of settings"),
        ("a" * 100_000 + " = 1", "a" * 77 + "...: no such section; valid: numbers, shape, words"),
        ('"a\\nb" = 1', r"'a\nb': no such section; valid: numbers, shape, words"),
        ('a = "\\ud800"', "not TOML: Escaped character is not a Unicode scalar value"),
        ('[shape]\nfamily = "a\\nb"', r"shape.family: no family 'a\nb'; did you mean 'box'?"),
    ],
)
def test_hostile_files_are_refused_at_once_in_one_line(
    tmp_path: Path, content: str, expected: str
) -> None:
    line = message(tmp_path, content)
    assert line.startswith(f"job.toml: {expected}") and len(line) < 300 and line.isprintable()


def test_options_cannot_hurt_either() -> None:
    for value in ("[" * 50_000, "0x" + "f" * 50_000, f"{{{DEEP}=1}}"):
        config = load(Config, {"shape": {"family": "box", "width": 1}}, [f"--words.name={value}"])
        assert config.words.name == value


def test_a_file_must_be_one(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    os.mkfifo(path)  # to read it would wait for a writer for ever
    with pytest.raises(UserError, match=r"job\.toml: not a regular file"):
        load(Config, path)
    path.unlink()
    (tmp_path / "other.toml").write_text('[shape]\nfamily = "box"\nwidth = 3\n')
    path.symlink_to("other.toml")  # a user's file may be a link
    assert load(Config, path).shape == Box(width=3)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
finite = st.floats(allow_nan=False)


@given(
    numbers=st.builds(
        Numbers,
        steps=st.integers(1, 2**62),
        rate=st.floats(0, 1, exclude_max=True),
        clip=finite,
        betas=st.tuples(finite, finite),
        sizes=st.lists(st.integers(-5, 5)).map(tuple),
        exact=st.booleans(),
        peak=st.none() | st.floats(0, exclude_min=True),
    ),
    words=st.builds(
        Words,
        name=text,
        kind=st.sampled_from(["cosine", "1f1b"]),
        files=st.lists(text, max_size=3).map(tuple),
    ),
    shape=st.builds(Box, width=st.integers(1)) | st.builds(Ball, radius=st.floats(0.1, 1e300)),
)
def test_dump_loads_back(
    tmp_path_factory: pytest.TempPathFactory, numbers: Numbers, words: Words, shape: Shape
) -> None:
    config = Config(numbers=numbers, words=words, shape=shape)
    assert from_table(Config, to_table(config)) == config
    path = tmp_path_factory.getbasetemp() / "dumped.toml"
    path.write_bytes(dump(config).encode())
    assert load(Config, path) == config


def test_settings_built_in_python_are_checked_as_tables() -> None:
    with pytest.raises(UserError, match="numbers.steps: expected integer >= 1, got 'many'"):
        from_table(Config, to_table(Config(shape=Box(width=1), numbers=Numbers(steps="many"))))  # type: ignore[arg-type]


def test_describe_names_every_setting() -> None:
    table = describe(Config)
    assert "  --numbers.steps=10                   how many (integer >= 1)" in table.splitlines()
    assert "  --shape.width=                       of the box (integer >= 1)" in table.splitlines()
    assert "[words] Words." in table.splitlines()
    assert all(f"--{name}=" in describe(RunConfig) for name in setting_names(RunConfig))


def test_every_setting_has_a_line_of_help() -> None:
    lines = [line for line in describe(RunConfig).splitlines() if line.startswith("  --")]
    assert len(lines) == len(setting_names(RunConfig)) > 30


def test_the_default_run_loads_back(tmp_path: Path) -> None:
    config = from_table(RunConfig, {"model": {"family": "gpt2"}})
    path = tmp_path / "config.toml"
    path.write_text(dump(config))
    assert load(RunConfig, path) == config
