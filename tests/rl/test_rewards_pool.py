"""The worker pool: whatever an item does to its worker costs that item's answer and no other."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fdiv.rl.rewards import Outcome, WorkerError, WorkerPool
from fdiv.rl.rewards.pool.processes import usage

TASK = Path(__file__).parents[1] / "support" / "sleepy_task.py"
BAD = [
    ({"hang": True}, "timeout"),
    ({"exit": 0}, "crash"),
    ({"exit": 3}, "crash"),
    ({"kill": signal.SIGKILL}, "crash"),
    ({"segfault": True}, "crash"),
    ({"raise": "boom"}, "crash"),
    ({"memory_error": True}, "memory"),
]


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(TASK, workers=2, time_limit=0.5, wall_limit=300.0) as pool:
        yield pool


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for_the_end(pids, seconds=20):
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return [pid for pid in pids if alive(pid)]


def test_a_bad_item_costs_its_own_answer_only(pool):
    items = [{"number": number} for number in range(40)]
    for place, (bad, _) in enumerate(BAD):
        items[5 * place] = bad
    outcomes = pool.map(items)
    assert [outcomes[5 * place].status for place in range(len(BAD))] == [status for _, status in BAD]
    for number, (item, outcome) in enumerate(zip(items, outcomes, strict=True)):
        if "number" in item:
            assert outcome == Outcome("ok", {"square": number**2, "length": 0})
        else:
            assert outcome.value is None and outcome.detail
    assert "ValueError: boom" in outcomes[25].detail
    assert pool.restarts == 6  # each but the one that only raised


def test_a_worker_that_outgrows_its_memory_is_killed():
    with WorkerPool(TASK, workers=1, time_limit=300.0, memory_limit=100 << 20, address_space=8 << 30) as pool:
        outcomes = pool.map([{"allocate": 10}, {"allocate": 100_000}, {"number": 2}])
    assert [outcome.status for outcome in outcomes] == ["ok", "memory", "ok"]
    assert outcomes[1].detail == "more than 104857600 bytes resident"


def test_waiting_is_limited_by_the_clock_and_computing_by_the_processor():
    with WorkerPool(TASK, workers=1, time_limit=0.2, wall_limit=60.0) as pool:
        assert pool.map([{"sleep": 1.0}])[0] == Outcome("ok", {"slept": 1.0})
        assert "0.2 s of processor time" in pool.map([{"hang": True}])[0].detail
    with WorkerPool(TASK, workers=1, time_limit=60.0, wall_limit=0.5) as pool:
        outcome = pool.map([{"sleep": 60.0}])[0]
        assert outcome.status == "timeout" and outcome.detail == "no answer within 0.5 s"


def test_workers_are_kept_between_calls_and_order_is_kept(pool):
    first = {outcome.value["pid"] for outcome in pool.map([{"pid": True}] * 20)}
    second = {outcome.value["pid"] for outcome in pool.map([{"pid": True}] * 20)}
    assert len(first | second) <= 2 and os.getpid() not in first
    assert [o.value["square"] for o in pool.map([{"number": n} for n in range(30)])] == [n * n for n in range(30)]
    assert pool.map([]) == []


def test_items_larger_than_a_pipe_and_any_text(pool):
    texts = ["x" * 3_000_000, "\ud800\u0000é\n", ""]
    outcomes = pool.map([{"number": 1, "text": text} for text in texts])
    assert [outcome.value["length"] for outcome in outcomes] == [3_000_000, 4, 0]


def test_what_a_task_prints_is_no_answer(pool):
    forged = '{"value": {"square": 9}}\n'
    assert pool.map([{"print": forged}, {"number": 2}]) == [
        Outcome("ok", {"printed": True}),
        Outcome("ok", {"square": 4, "length": 0}),
    ]


def test_secrets_of_the_trainer_stay_with_it(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with WorkerPool(TASK, workers=1) as pool:
        assert pool.map([{"environment": "HF_TOKEN"}])[0].value == {"value": None}
        assert pool.map([{"environment": "PATH"}])[0].value == {"value": os.environ["PATH"]}


def test_killed_while_idle_costs_nothing(pool):
    pids = {outcome.value["pid"] for outcome in pool.map([{"pid": True}] * 20)}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_for_the_end(pids) == []
    assert [outcome.status for outcome in pool.map([{"number": 1}] * 4)] == ["ok"] * 4


def test_worker_killed_from_outside_in_the_middle_of_a_batch():
    with WorkerPool(TASK, workers=1, time_limit=60.0) as pool:
        pid = pool.map([{"pid": True}])[0].value["pid"]
        limit = usage(pid)[0] + 0.2  # seconds of processor time, which only the item that hangs takes

        def kill():
            until = time.monotonic() + 50
            while usage(pid)[0] < limit and time.monotonic() < until:
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        outcomes = pool.map([{"number": 3}, {"hang": True}, {"number": 4}])
        killer.join()
        assert [outcome.status for outcome in outcomes] == ["ok", "crash", "ok"]
        assert outcomes[2].value["square"] == 16 and pool.restarts == 1


def test_killed_template_is_started_again():
    with WorkerPool(TASK, workers=1, time_limit=60.0) as pool:
        pool.map([{"number": 1}])
        template = pool._processes.template
        template.kill()
        template.wait()
        assert pool.map([{"number": 5}])[0].value["square"] == 25
        # and in the middle of a call: the crash asks it for a new worker
        timer = threading.Timer(0.3, pool._processes.template.kill)
        timer.start()
        outcomes = pool.map([{"allocate": 600}, {"exit": 1}, {"number": 6}])
        timer.join()
        assert [outcome.status for outcome in outcomes] == ["ok", "crash", "ok"]


def test_threads_take_turns(pool):
    results = {}

    def score(name):
        results[name] = [outcome.value["square"] for outcome in pool.map([{"number": name}] * 5)]

    threads = [threading.Thread(target=score, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [name**2] * 5 for name in range(4)}


def test_a_forked_copy_has_workers_of_its_own(pool):
    before = {outcome.value["pid"] for outcome in pool.map([{"pid": True}] * 20)}
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        pids = {outcome.value["pid"] for outcome in pool.map([{"pid": True}] * 8)}
        pool.close()
        os.write(writer, repr(sorted(pids)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        pids = {int(word) for word in pipe.read().strip("[]").split(",")}
    os.waitpid(child, 0)
    assert pids and not pids & before
    assert wait_for_the_end(pids) == []
    assert {outcome.value["pid"] for outcome in pool.map([{"pid": True}] * 20)} <= before


def test_pickled_it_travels_as_its_settings(pool):
    copy = pickle.loads(pickle.dumps(pool))
    with copy:
        assert copy.map([{"number": 7}])[0].value["square"] == 49


@pytest.mark.parametrize("ending", ["sys.exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "raise KeyboardInterrupt"])
def test_no_orphans_when_the_trainer_ends(ending):
    program = (
        "import os, signal, sys, threading\n"
        "from fdiv.rl.rewards import WorkerPool\n"
        f"pool = WorkerPool({str(TASK)!r}, workers=2, time_limit=600)\n"
        "pids = {o.value['pid'] for o in pool.map([{'pid': True}] * 20)}\n"
        "print(*pids, pool._processes.template.pid, flush=True)\n"
        "threading.Thread(target=pool.map, args=([{'hang': True}],), daemon=True).start()\n"
        f"import time; time.sleep(0.5)\n{ending}\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500)
    pids = [int(word) for word in result.stdout.split()]
    assert len(pids) >= 2
    assert wait_for_the_end(pids) == []


def test_a_task_that_cannot_start_is_named():
    with pytest.raises(WorkerError, match="sleepy_task.py cannot be started: ImportError: no module of that name"):
        WorkerPool(TASK, {"broken": True}, workers=1).map([{"number": 1}])


def test_workers_that_never_start_are_an_error_not_a_loop():
    with pytest.raises(WorkerError, match=r"5 workers of sleepy_task.py in a row ended before they were ready"):
        WorkerPool(TASK, {"stillborn": True}, workers=1).map([{"number": 1}])


@pytest.mark.parametrize("key", ["workers", "time_limit", "wall_limit", "memory_limit", "start_limit"])
def test_limits_must_be_positive(key):
    with pytest.raises(ValueError, match=f"{key}=0 must be positive"):
        WorkerPool(TASK, **{key: 0})
