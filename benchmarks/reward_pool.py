"""1,000 mathematics answers through `MathReward`, 1 % of them hanging: time, counts, and what was lost.

    python -m benchmarks.reward_pool --data FOLDER [--workers 2] [--time_limit 10] [--output FILE]
    python -m benchmarks.reward_pool --reward code [--workers 2] [--output FILE]

FOLDER holds `passk_artifacts/qwen_math_cot_100.jsonl` (800 recorded answers) and `gsm8k/test.jsonl` (200 worked
solutions, every fourth with a wrong number). They are scored twice in one run by fresh pools: as they are, and with
every hundredth replaced by an answer that keeps SymPy busy for ever. Lost is an answer that does not hang, whose gold
can be read, and that has no score; or, in the second pass, another one than in the first.

With `--reward code`, 1,000 easy programs with three asserts each go through `CodeReward` in bubblewrap, and, batch by
batch in the same run, the plain way without a sandbox: program and tests in one new interpreter per answer.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HANGING = r"The answer is \boxed{9^{9^{9^{9}}}}."


def answers(folder: Path) -> list[tuple[str, str]]:
    """1,000 pairs of gold and completion."""
    pairs = []
    for line in (folder / "passk_artifacts" / "qwen_math_cot_100.jsonl").read_text(encoding="utf-8").splitlines():
        problem = json.loads(line)
        pairs += [(problem["gt"], completion) for completion in problem["code"]]
    lines = (folder / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines[: 1000 - len(pairs)]):
        solution = json.loads(line)["answer"]
        steps, _, value = solution.rpartition("#### ")
        said = value + "1" if number % 4 == 0 else value
        pairs.append((solution, rf"{steps}The answer is \boxed{{{said}}}."))
    return pairs


def scored(golds: list[str], completions: list[str], options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Scores, and what the pass took."""
    from fdiv.rl.rewards import MathReward

    reward = MathReward(
        workers=options.workers, time_limit=options.time_limit, wall_limit=options.wall_limit, failure_limit=None
    )
    reward(["warm up"], [r"\boxed{1}"], solution=["1"])
    reward.counts.clear()
    started = time.perf_counter()
    scores = []
    for start in range(0, len(golds), options.batch):
        rows = slice(start, start + options.batch)
        scores += reward(completions[rows], completions[rows], solution=golds[rows])
    seconds = time.perf_counter() - started
    result = {
        "seconds": round(seconds, 3),
        "answers_per_second": round(len(golds) / seconds, 1),
        **reward.summary(),
        "unusable_golds": reward.unusable_golds,
    }
    reward.close()
    return scores, result


PROGRAM = "from typing import List\n\ndef f(x: List[int]) -> int:\n    return {} * sum(x)\n"
TESTS = "assert f([1, 2]) == 3 * {0}\nassert f([]) == 0\nassert f([5]) == 5 * {0}\n"


def plainly(answer: tuple[str, str]) -> bool:
    """Whether program and tests run to their end in one new interpreter."""
    command = [sys.executable, "-I", "-S", "-B", "-c", "\n".join(answer)]
    return subprocess.run(command, env={}, check=False).returncode == 0


def code_report(options: argparse.Namespace) -> dict[str, Any]:
    """1,000 programs in bubblewrap and without: seconds, and their ratio."""
    from fdiv.rl.rewards import CodeReward

    rows = [(PROGRAM.format(number), TESTS.format(number)) for number in range(1000)]
    reward = CodeReward(allow_execution=True, workers=options.workers, time_limit=60.0, failure_limit=None)
    reward(["warm up"] * options.workers, [rows[0][0]] * options.workers, test=[rows[0][1]] * options.workers)
    reward.counts.clear()
    seconds = {"sandboxed": 0.0, "plain": 0.0}
    with ThreadPoolExecutor(options.workers) as threads:
        for start in range(0, len(rows), options.batch):
            programs, tests = zip(*rows[start : start + options.batch], strict=True)
            started = time.perf_counter()
            scores = reward(["?"] * len(programs), programs, test=tests)
            seconds["sandboxed"] += time.perf_counter() - started
            started = time.perf_counter()
            passed = list(threads.map(plainly, rows[start : start + options.batch]))
            seconds["plain"] += time.perf_counter() - started
            assert scores == [1.0] * len(programs) and all(passed)
    counts = reward.summary()
    reward.close()
    return {
        "answers": len(rows),
        "workers": options.workers,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "answers_per_second": {name: round(len(rows) / value, 1) for name, value in seconds.items()},
        "sandboxed_over_plain": round(seconds["sandboxed"] / seconds["plain"], 3),
        **counts,
    }


def math_report(options: argparse.Namespace) -> dict[str, Any]:
    """Both passes, and what was lost."""
    pairs = answers(options.data)
    golds, completions = [gold for gold, _ in pairs], [completion for _, completion in pairs]
    hanging = list(range(50, len(pairs), 100))
    clean_scores, clean = scored(golds, completions, options)
    with_hanging = list(completions)
    for row in hanging:
        golds[row], with_hanging[row] = "1", HANGING  # a gold that can be read, so that it comes to the answer
    scores, hung = scored(golds, with_hanging, options)
    others = sorted(set(range(len(pairs))) - set(hanging))
    lost_rows = [
        row
        for row in others
        if (scores[row] is None and golds[row] not in hung["unusable_golds"])
        or (None not in (scores[row], clean_scores[row]) and scores[row] != clean_scores[row])
    ]
    return {
        "answers": len(pairs),
        "hanging": len(hanging),
        "hanging_not_scored": sum(scores[row] is None for row in hanging),
        "lost": len(lost_rows),
        "lost_without_hanging": clean["timeout"] + clean["memory"] + clean["crash"],
        "workers": options.workers,
        "time_limit": options.time_limit,
        "without_hanging": clean,
        "with_hanging": hung,
        "processor_seconds_of_hanging": len(hanging) * options.time_limit,
    }


def main() -> int:
    """Print and write the report; exit status 1 if an answer was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reward", choices=("math", "code"), default="math")
    parser.add_argument("--data", type=Path, help="folder of the mathematics answers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--time_limit", type=float, default=10.0, help="seconds of processor time for one answer")
    parser.add_argument("--wall_limit", type=float, help="seconds by the clock for one answer")
    parser.add_argument("--batch", type=int, default=250, help="answers per call")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    if options.reward == "math" and options.data is None:
        parser.error("--data is needed for the mathematics answers")
    from fdiv.provenance import environment

    report = code_report(options) if options.reward == "code" else math_report(options)
    report["environment"] = environment(shlex.join(["python", "-m", "benchmarks.reward_pool", *sys.argv[1:]]))
    if options.data is not None:  # this machine's own
        report["environment"]["command"] = report["environment"]["command"].replace(str(options.data), "FOLDER")
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 1 if report.get("lost") or report["answers"] != 1000 else 0


if __name__ == "__main__":
    sys.exit(main())
