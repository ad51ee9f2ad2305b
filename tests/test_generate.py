"""Generation: the sampler, the cache, and the command under several layouts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from random_model import write_checkpoint

import mpillm
from mpillm.array.backend import Backend
from mpillm.array.random import fold
from mpillm.checkpoint.reader import Checkpoint
from mpillm.data.tokenizer import load_tokenizer
from mpillm.errors import UserError
from mpillm.inference.engine import Engine, Sampling
from mpillm.inference.loading import load
from mpillm.inference.sampling import sample
from mpillm.models.gpt2 import Settings
from mpillm.models.settings import build_model
from mpillm.nn.layer import Micro
from mpillm.parallel.mesh import Mesh
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Forward = Callable[[np.ndarray], np.ndarray]

TEXT = Path(__file__).parent.parent / "LICENSE"
CONTEXT = 8
SETTINGS = Settings(
    layers=2, heads=3, width=12, vocabulary=29, context=CONTEXT, init_std=0.4, tied=False
)
FREE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "greedy": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mpirun: Command) -> Path:
    """A run folder, trained with three heads on two tensor ranks."""
    folder = tmp_path_factory.mktemp("run")
    config = folder / "small.toml"
    config.write_text(
        "[model]\nlayers = 2\nheads = 3\nwidth = 24\n[parallel]\ntensor = 2\n"
        "[train]\nsteps = 60\nbatch_size = 8\nsequence_length = 24\n"
        "[optimizer]\nlr = 1e-2\nwarmup = 5\n"
        f"[data]\ntext = ['{TEXT}']\n[run]\ndir = '{folder}'\n"
    )
    result = mpirun(2, "-m", "mpillm", "train", str(config))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random model, with weights so large that texts do not repeat one token."""
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("random"), SETTINGS))


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Engine:
    """The random model on one rank."""
    return Engine(checkpoint, MPI.COMM_SELF, Backend.create("numpy"))


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint) -> Forward:
    """Logits (b, t, v) of the random model for (b, t) tokens, by a forward pass and no cache."""
    backend = Backend.create("numpy")
    mesh = Mesh(MPI.COMM_SELF, ParallelSettings(data=1), backend, Recorder())
    model, dtype = build_model(SETTINGS), np.dtype("float64")
    (stage,) = load(model, checkpoint, mesh, backend, dtype).stages

    def forward(tokens: np.ndarray) -> np.ndarray:
        b, t = tokens.shape
        micro = Micro(tokens, index=np.arange(t), samples=np.arange(b), want="logits")
        logits: np.ndarray = stage.forward((), micro)[0][0]
        return logits

    return forward


def follow(whole: Forward, prompt: list[int], count: int, row: int, how: Sampling) -> list[int]:
    """What `Engine.generate` draws for a row, each token after a forward pass over all it sees."""
    text, length = list(prompt), min(len(prompt), CONTEXT)
    for place in range(count):
        if length > CONTEXT:
            length = CONTEXT // 2
        logits = whole(np.array([text[-length:]]))[0, -1]
        token = sample(
            logits,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            greedy=how.greedy,
            key=fold(how.seed, "generate", row, place),
        )
        text.append(token)
        length += 1
    return text[len(prompt) :]


def test_greedy_takes_the_first_largest() -> None:
    logits = np.array([0.0, 2.0, 2.0, -1.0])
    assert sample(logits, **{**FREE, "greedy": True}, key=1) == 1


def test_sampling_follows_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    drawn = [sample(np.log(probabilities), **FREE, key=key) for key in range(20000)]
    share = np.bincount(drawn, minlength=4) / len(drawn)
    # Five standard deviations.
    assert (np.abs(share - probabilities) < 5 * np.sqrt(probabilities / len(drawn))).all()


def test_temperature_sharpens_and_flattens() -> None:
    logits = np.log(np.array([0.6, 0.4]))

    def share(temperature: float) -> float:
        settings = {**FREE, "temperature": temperature}
        return sum(sample(logits, **settings, key=key) == 0 for key in range(4000)) / 4000

    sharp, flat = 0.6**4 / (0.6**4 + 0.4**4), 0.6**0.25 / (0.6**0.25 + 0.4**0.25)
    assert share(0.25) == pytest.approx(sharp, abs=0.04)
    assert share(4.0) == pytest.approx(flat, abs=0.04)


@pytest.mark.parametrize(
    ("settings", "possible"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.4}, {3}),
        ({"top_p": 0.5}, {3, 1}),
        ({"top_p": 0.75}, {3, 1, 0}),
        ({"top_k": 3, "top_p": 0.999}, {3, 1, 0}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_top_k_and_top_p(settings: dict[str, float], possible: set[int]) -> None:
    logits = np.log(np.array([0.2, 0.28, 0.1, 0.42]))
    drawn = {sample(logits, **{**FREE, **settings}, key=key) for key in range(500)}
    assert drawn == possible


def test_logits_equal_a_forward_pass(engine: Engine, whole: Forward) -> None:
    tokens = np.random.default_rng(0).integers(0, 29, (3, CONTEXT))
    assert np.abs(engine.logits(tokens) - whole(tokens)).max() < 1e-12


@pytest.mark.parametrize(
    "how", [Sampling(greedy=True), Sampling(seed=3), Sampling(0.7, 9, 0.9, seed=4)]
)
@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ([5, 9, 3], CONTEXT - 3),
        ([7, 2, 11], 5 * CONTEXT),  # the older half is forgotten again and again
        (list(range(CONTEXT + 9)), 2 * CONTEXT),  # the prompt is cut to the context
    ],
    ids=["within", "beyond", "cut"],
)
def test_cached_decoding_equals_reading_everything(
    engine: Engine, whole: Forward, prompt: list[int], count: int, how: Sampling
) -> None:
    drawn = engine.generate(prompt, count, 2, how).tolist()
    assert drawn == [follow(whole, prompt, count, row, how) for row in range(2)]
    assert how.greedy or len({*drawn[0], *drawn[1]}) > 2


def test_samples_differ_and_repeat(engine: Engine) -> None:
    first = engine.generate([1], 20, 3, Sampling(seed=1))
    assert (first == engine.generate([1], 20, 3, Sampling(seed=1))).all()
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert not (first == engine.generate([1], 20, 3, Sampling(seed=2))).all()
    # A sample does not depend on how many are drawn beside it.
    assert (engine.generate([1], 20, 1, Sampling(seed=1))[0] == first[0]).all()


def test_command_gives_the_same_text_on_any_ranks(
    python: Command, mpirun: Command, run: Path
) -> None:
    command = ["-m", "mpillm", "generate", str(run), "--prompt", "Licen", "--max-new-tokens", "60"]
    sampled = ["--num-samples", "2", "--temperature", "0.8", "--top-k", "20", "--seed", "3"]
    for options in (["--greedy"], sampled):
        texts = [python(*command, *options)]
        texts += [mpirun(ranks, *command, *options) for ranks in (2, 4)]
        for result in texts:
            assert result.returncode == 0, result.stderr
            assert result.stdout == texts[0].stdout
        assert texts[0].stdout.count("Licen") >= (1 if options == ["--greedy"] else 2)


def test_command_gives_the_same_text_in_any_layout(
    python: Command, mpirun: Command, run: Path
) -> None:
    prompt = "--A. Licen"  # no setting, although it looks like one
    command = ["-m", "mpillm", "generate", str(run), f"--prompt={prompt}", "--max-new-tokens=30"]
    command += ["--num-samples=3", "--seed=4"]
    layouts = (
        ["--parallel.pipe=2"],
        ["--parallel.zero=3"],  # data parallelism takes the ranks that are left
        ["--parallel.tensor=2", "--parallel.sequence"],
        ["--parallel.data=1", "--parallel.pipe=2", "--parallel.boundaries=[3]"],
    )
    texts = [python(*command), *(mpirun(2, *command, *layout) for layout in layouts)]
    for result in texts:
        assert result.returncode == 0, result.stderr
        assert result.stdout == texts[0].stdout
    assert texts[0].stdout.count(prompt) == 3


def test_layouts_from_python(run: Path) -> None:
    """As settings or as a table; the same text, and the same mistakes as on the command line."""
    options = {"prompt": "Licen", "max_new_tokens": 5, "greedy": True, "comm": MPI.COMM_SELF}
    texts = [
        mpillm.generate(run, parallel=layout, **options)
        for layout in (None, {}, {"data": 1}, ParallelSettings(pipe=1))
    ]
    assert all(text == texts[0] for text in texts)
    for table, message in (
        ({"tenser": 2}, "parallel.tenser: no such setting; did you mean 'tensor'?"),
        ({"tensor": 0}, "parallel.tensor: expected integer >= 1, got 0"),
        ({"tensor": 2}, "parallel: tensor 2 x pipe 1 = 2 does not divide 1 rank"),
    ):
        with pytest.raises(UserError) as caught:
            mpillm.generate(run, parallel=table, **options)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "中"], "中"),
        (["--prompt", ""], "--prompt"),
        (["--prompt", "a", "--temperature", "0"], "--temperature"),
        (["--prompt", "a", "--top-p", "1.5"], "--top-p"),
        (["--prompt", "a", "--top-k", "-1"], "--top-k"),
        (["--prompt", "a", "--num-samples", "0"], "--num-samples"),
        (["--prompt", "a", "--parallel.tensor=2"], "does not divide 1 rank"),
        (["--prompt", "a", "--parallel.data=3"], "does not fit 1 rank"),
        (["--prompt", "a", "--parallel.sequence"], "parallel.tensor >= 2"),
        (["--prompt", "a", "--parallel.tensor=two"], "--parallel.tensor: expected integer >= 1"),
        (["--prompt", "a", "--parallel.tenser=2"], "did you mean 'tensor'?"),
        (["--prompt", "a", "--tensor=2"], "did you mean 'parallel.tensor'?"),
        (["--prompt", "a", "--parallel.tensor", "2"], "unexpected argument '2'"),
        (["--prompt", "a", "--train.steps=2"], "--train.steps: no such section"),
    ],
)
def test_mistakes_are_told_in_one_line(
    python: Command, run: Path, options: list[str], message: str
) -> None:
    result = python("-m", "mpillm", "generate", str(run), *options)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], result.stderr


def test_the_tokenizer_is_the_run_s(run: Path) -> None:
    tokenizer = load_tokenizer(run / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("License")) == "License"


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (["--parallel.pipe=3"], "parallel: tensor 1 x pipe 3 = 3 does not divide 2 ranks"),
        (
            ["--parallel.pipe=2", "--parallel.chunks=3", "--parallel.schedule=gpipe"],
            "set parallel.pipe x parallel.chunks <=",
        ),
        (["--parallel.pipe=2", "--parallel.boundaries=[4]"], "expected ascending layers"),
    ],
)
def test_layouts_that_do_not_fit_are_told_once(
    mpirun: Command, run: Path, layout: list[str], message: str
) -> None:
    """By the ranks, or by the model: four layers."""
    result = mpirun(2, "-m", "mpillm", "generate", str(run), "--prompt=a", *layout)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("mpillm: error: ")]
    assert len(lines) == 1 and message in lines[0], result.stderr
    assert "Traceback" not in result.stderr and result.stdout.strip() == ""
