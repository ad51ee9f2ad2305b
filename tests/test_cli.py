"""The command line, the Python API beside it, and thread counts, in this one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mpillm
from mpillm.__main__ import COMMANDS, main
from mpillm.parallel import launch

Run = Callable[..., "subprocess.CompletedProcess[str]"]


class World:
    """A communicator of several ranks that all answer as the script says."""

    def __init__(self, answers: list[Any]) -> None:
        self.size, self.rank, self._answers = len(answers), 0, answers

    def allgather(self, own: object) -> list[Any]:
        return self._answers

    def Free(self) -> None:
        pass


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: mpillm {command} ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mpillm {mpillm.__version__}\n"


def test_help_is_for_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PMI_RANK", "1")
    for arguments in (["--help"], ["--version"], ["train", "--help"]):
        assert main(arguments) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "no command 'trian'; did you mean 'train'?"),
        (["--verion"], "no command '--verion'; did you mean '--version'?"),
        (["train"], "train: the following arguments are required: CONFIG.toml"),
        (["train", "a", "--frsh"], "train: no option --frsh; did you mean '--fresh'?"),
        (
            ["train", "a.toml", "--train.steps", "5"],
            "train: unexpected argument '5'; usage: mpillm train CONFIG.toml "
            "[--section.key=value ...] [--fresh]",
        ),
        (["generate", "r"], "generate: the following arguments are required: --prompt"),
        (
            ["generate", "r", "--prompt=a", "--topk=3"],
            "generate: no option --topk; did you mean '--top-k'?",
        ),
        (
            ["generate", "r", "--prompt=a", "--top-k=x"],
            "generate: argument --top-k: expected an integer, got 'x'",
        ),
        (
            ["generate", "r", "--prompt=a", "--top-p=x"],
            "generate: argument --top-p: expected a number, got 'x'",
        ),
        (
            ["checkpoint", "inspct", "r"],
            "checkpoint: no action 'inspct'; did you mean 'inspect'?",
        ),
        (["checkpoint"], "checkpoint: the following arguments are required: ACTION"),
        (
            ["checkpoint", "verify"],
            "checkpoint verify: the following arguments are required: PATH",
        ),
        (
            ["checkpoint", "reshard", "r"],
            "checkpoint reshard: the following arguments are required: DST",
        ),
    ],
)
def test_usage_mistakes(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"mpillm: error: {line}\n"


@pytest.mark.parametrize(("stopped", "code"), [(None, 0), ("SIGUSR1", 85)])
def test_train_passes_on_what_it_was_given(
    monkeypatch: pytest.MonkeyPatch, stopped: str | None, code: int
) -> None:
    calls: list[Any] = []

    def train(config: object, **options: object) -> SimpleNamespace:
        calls.append((config, options))
        return SimpleNamespace(stopped=stopped)

    monkeypatch.setattr(mpillm, "train", train)
    assert main(["train", "--train.steps=5", "a.toml", "--fresh", "--run.dir=x"]) == code
    assert calls == [
        (Path("a.toml"), {"overrides": ["--train.steps=5", "--run.dir=x"], "fresh": True})
    ]


def test_interrupts_end_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mpillm, "train", interrupted)
    assert main(["train", "a.toml"]) == 130


def test_checkpoint_commands_need_no_mpi(python: Run, tmp_path: Path) -> None:
    program = (
        "import sys; from mpillm.__main__ import main\n"
        f"print(main(['checkpoint', 'verify', {str(tmp_path / 'nothing')!r}]))\n"
        "print('mpillm.checkpoint.verify' in sys.modules, 'mpi4py' in sys.modules)"
    )
    result = python("-c", program)
    assert result.stdout == "2\nTrue False\n"
    assert result.stderr.startswith("mpillm: error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"PMI_RANK": "3"}, 3),
        ({"PMIX_RANK": "2", "OMPI_COMM_WORLD_RANK": "2"}, 2),
        ({"SLURM_PROCID": "5", "SLURM_STEP_ID": "0"}, 5),
        ({"SLURM_PROCID": "5"}, 0),
        ({"PMI_RANK": "none"}, 0),
    ],
)
def test_rank_hint(environment: dict[str, str], rank: int) -> None:
    assert launch.rank_hint(environment) == rank


@pytest.mark.parametrize(
    ("cores", "quota", "threads"),
    [
        ([range(8)] * 4, float("inf"), 2),  # not bound: all share all cores
        ([range(8)] * 3, float("inf"), 2),
        ([range(6)] * 6, float("inf"), 1),
        ([range(2)] * 8, float("inf"), 1),  # more ranks than cores
        ([range(4), range(4, 8)], float("inf"), 4),  # bound: each has its own
        ([range(8)] * 2, 3.0, 1),  # a container with three cores' worth of time
    ],
)
def test_fair_share(
    cores: list[range], quota: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world: Any = World([set(own) for own in cores])
    monkeypatch.setattr(launch, "_node", lambda comm: comm)
    monkeypatch.setattr(launch, "_core_quota", lambda: quota)
    assert launch._fair_share(world) == threads
    total = len(set().union(*cores))
    assert launch.core_share(world) == pytest.approx(min(total, quota) / len(cores))


@pytest.mark.parametrize(
    ("text", "quota"),
    [("max 100000\n", float("inf")), ("250000 100000\n", 2.5), ("", float("inf"))],
)
def test_core_quota(text: str, quota: float, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert launch._core_quota(tmp_path / "cpu.max") == quota
    assert launch._core_quota(tmp_path / "missing") == float("inf")


def test_threads_are_set_for_numpy_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch._THREAD_VARIABLES:
        monkeypatch.setenv(name, "7")
    here: Any = World([3, 3])
    monkeypatch.setitem(sys.modules, "numpy", sys)
    assert launch.choose_threads(3, here) == 3
    assert os.environ["OPENBLAS_NUM_THREADS"] == "7"  # too late: the program's own choice stays
    monkeypatch.delitem(sys.modules, "numpy")
    assert launch.choose_threads(3, here) == 3
    assert {os.environ[name] for name in launch._THREAD_VARIABLES} == {"3"}


def test_threads_the_user_has_set_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch._THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setitem(sys.modules, "numpy", sys)
    world: Any = World([])
    world.allgather = lambda own: [own]
    assert launch.choose_threads(0, world) == 5


def test_the_api_checks_settings(python: Run) -> None:
    program = """
import mpillm
from mpillm.errors import UserError
for config in ({"model": {"family": "gpt2"}, "train": {"stops": 1}}, "no/such.toml"):
    try:
        mpillm.train(config)
    except UserError as error:
        print(error)
"""
    result = python("-c", program)
    assert result.stdout.splitlines() == [
        "train.stops: no such setting; did you mean 'steps'?",
        "no/such.toml: no such file; there is no folder no either",
    ]
