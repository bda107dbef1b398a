"""The fuzz suite finds a fault of every class that is planted, and none in a short run of its own."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time

import pytest

import fdiv.cli.command
import fdiv.cli.verbs
import fdiv.rl.rewards
from fdiv import terminal
from fdiv.errors import RecipeError
from fdiv.rl.dph.rehearsal import RehearsalCache
from fdiv.training import checkpoints
from tests.fuzz.__main__ import main
from tests.fuzz.case import FAULTS, Kind, Outcome
from tests.fuzz.driver import edits_of, fuzz
from tests.fuzz.kinds import KINDS, recipes
from tests.fuzz.kinds.checkpoints import Checkpoints
from tests.fuzz.world import World


def raises(error):
    def call(*_, **__):
        raise error

    return call


def unpickled(folder):
    """A check of a checkpoint that loads what it finds."""
    for file in folder.rglob("*"):
        if file.is_file() and file.read_bytes()[:1] == b"\x80":
            pickle.loads(file.read_bytes())
    return None


class EveryProgram:
    """A reward that gives every program the same score."""

    def __init__(self, score):
        self.score = score

    def __call__(self, prompts, completions, test):
        return [self.score] * len(completions)


def plant_a_reader_that_raises(patch):
    patch.setattr(fdiv.cli.verbs, "load_recipe", raises(KeyError("method")))


def plant_a_reader_that_does_not_end(patch):
    patch.setattr(fdiv.cli.verbs, "load_recipe", lambda *_: time.sleep(60))
    patch.setattr(recipes, "_LIMIT", 0.2)


def plant_a_failure_without_a_word(patch):
    patch.setattr(fdiv.cli.command, "_fail", lambda error, args, code: code)


def plant_a_check_that_takes_everything(patch):
    patch.setattr(fdiv.cli.verbs, "run", lambda *_: 0)


def plant_a_message_without_end(patch):
    patch.setattr(fdiv.cli.verbs, "load_recipe", raises(RecipeError("x " * 2000)))
    patch.setattr(terminal, "error", lambda message: terminal.info(f"fdiv: {message}"))


def plant_a_cache_that_is_not_checked(patch):
    load = RehearsalCache.load

    def unchecked(path):
        try:
            return load(path)
        except Exception:
            whole = load(next(path.parent.parent.glob("world/*.safetensors")))
            return RehearsalCache(whole.header, whole.rows[:-1])

    patch.setattr(RehearsalCache, "load", unchecked)


def plant_a_reward_that_says_yes(patch):
    patch.setattr(fdiv.rl.rewards, "CodeReward", lambda **_: EveryProgram(1.0))


def plant_a_reward_that_says_no(patch):
    patch.setattr(fdiv.rl.rewards, "CodeReward", lambda **_: EveryProgram(0.0))


def plant_a_checkpoint_that_is_unpickled(patch):
    patch.setattr(checkpoints, "checkpoint_fault", unpickled)


PLANTED = [
    ("recipes", "traceback", plant_a_reader_that_raises),
    ("recipes", "hang", plant_a_reader_that_does_not_end),
    ("recipes", "silent", plant_a_failure_without_a_word),
    ("recipes", "silent", plant_a_check_that_takes_everything),
    ("command_lines", "long", plant_a_message_without_end),
    ("caches", "silent", plant_a_cache_that_is_not_checked),
    ("programs", "escape", plant_a_reward_that_says_yes),
    ("programs", "lost", plant_a_reward_that_says_no),
    ("checkpoints", "escape", plant_a_checkpoint_that_is_unpickled),
]


@pytest.mark.parametrize(("kind", "verdict", "plant"), PLANTED, ids=[plant.__name__ for *_, plant in PLANTED])
def test_a_planted_fault_is_found(kind, verdict, plant, monkeypatch, capsys, tmp_path):
    plant(monkeypatch)
    report = tmp_path / "fuzz.json"
    numbers = [n for n in range(99) if edits_of(Checkpoints(World(tmp_path)), 0, n)[0][0] == "pickle"][:2]
    numbers = numbers if kind == "checkpoints" else range(6) if kind == "programs" else range(12)
    assert main(["--only", kind, "--output", str(report), "--case", *map(str, numbers)]) == 1
    shown = capsys.readouterr().out
    assert f"{verdict} · {kind}: " in shown
    assert f"again: python -m tests.fuzz --only {kind} --seed 0 --case " in shown
    content = json.loads(report.read_text())
    assert content["counts"][kind][verdict] > 0
    assert verdict in {fault["verdict"] for fault in content["faults"]}


def test_a_short_run_finds_no_fault(capsys):
    """`make fuzz` is the long one."""
    code = main(["--seed", "16"])
    shown = capsys.readouterr().out
    assert code == 0, shown
    for kind in KINDS:
        assert f"{kind.name} " in shown


def test_every_class_is_planted():
    assert {verdict for _, verdict, _ in PLANTED} == set(FAULTS)


class Drawers(Kind):
    """Fails where the third drawer is open."""

    name, what, few = "drawers", "drawers", 30

    def members(self, rng):
        return [("open", rng.randrange(6)) for _ in range(4)]

    def judge(self, edits, folder):
        return Outcome("silent", "the drawer is open") if ("open", 3) in edits else Outcome("ok")


class Sound(Drawers):
    """Never fails."""

    def judge(self, edits, folder):
        return Outcome("ok")


def test_a_fault_is_shown_once_and_at_its_smallest():
    report = fuzz([Drawers], 0)
    assert report.counts["drawers"].total() == 30
    assert [fault.edits for fault in report.faults] == [[("open", 3)]]
    assert report.faults[0].times == report.counts["drawers"]["silent"] > 1


def test_the_exit_code_is_0_where_there_is_no_fault(capsys):
    assert main([], [Sound]) == 0
    assert main(["--seed", "1"], [Drawers]) == 1
    assert main(["--minutes", "0.001"], [Sound]) == 0
    capsys.readouterr()


SEEDED = [kind for kind in KINDS if kind.name != "logs"]  # whose members are made from the records of a run


@pytest.mark.parametrize("kind", SEEDED, ids=[kind.name for kind in SEEDED])
def test_a_case_is_the_same_again(kind, tmp_path, tiny_model_dir):
    world = World(tmp_path)
    world.model = tiny_model_dir
    first = [edits_of(kind(world), 5, number) for number in range(10)]
    assert repr(first) == repr([edits_of(kind(world), 5, number) for number in range(10)])
    assert repr(first) != repr([edits_of(kind(world), 6, number) for number in range(10)])


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, tiny_model_dir):
    world = World(tmp_path_factory.mktemp("world"))
    world.model = tiny_model_dir
    return Checkpoints(world)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_forged_checkpoint_is_refused_and_not_executed(file, interrupted, tmp_path):
    """Its marker agrees with the pickle in it: whoever can write the one can write the other."""
    outcome = interrupted.judge([("pickle", 3, file)], tmp_path)
    assert outcome.verdict == "refused", outcome
    assert "checkpoint-3 cannot be loaded (" in outcome.message
    assert "remove it, and resume from the one before" in outcome.message


def test_a_fork_of_a_process_with_threads_computes():
    """OpenMP's threads are not in the fork: with more than one it would wait for them for ever."""
    import torch

    from tests.fuzz.kinds.kills import _one_thread

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values = torch.rand(1 << 20)
        values.exp().sum()  # starts the threads
        with _one_thread():
            child = os.fork()
            if child == 0:
                values.exp().sum()
                os._exit(7)
            stop = time.monotonic() + 30
            while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < stop:
                time.sleep(0.01)
            if status[0] == 0:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status[1]) == 7
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
