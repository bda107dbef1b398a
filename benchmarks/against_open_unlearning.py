"""The same model on the same TOFU rows, evaluated by us and by open-unlearning's own code: do the numbers agree, and
how long does each take?

    python -m benchmarks.against_open_unlearning --checkout PATH --model PATH --retain_model PATH --data DIR
        [--peer_python PYTHON] [--peer_path DIR] [--split forget10] [--rows 50] [--output FILE]

`--checkout` is a clone of github.com/locuslab/open-unlearning; nothing of it is here. It needs hydra-core, omegaconf,
scikit-learn and rouge-score: give an interpreter that has them (`--peer_python`), or a folder of packages to add to
ours (`--peer_path`, made with `pip install --target DIR omegaconf hydra-core`). Each side runs in a process of its
own with one thread, float32, the full metric set (all six attacks, GradNorm included) and its default batch sizes. The
only change to the peer is where rows come from: its call of `load_dataset("locuslab/TOFU", …)` reads the local files.
The prompt is the plain format, which both write the same way. All rows of every set are evaluated; `--rows N` keeps
the first N. The retain model's log, which both sides read, is made before, with likelihoods only.

The time is that of the evaluation, from before the first row is read to after the log is written; imports and model
loading are outside. Memory is the process's peak resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETS = ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
ATTACKS = ("loss", "zlib", "reference", "gradnorm", "min_k", "min_k_plus_plus")
ADDED = ("exact_memorization", *(f"mia_{attack}" for attack in ATTACKS))
"""Metrics that the peer offers and does not switch on by default."""
COMPARED = (
    *("forget_truth_ratio", "forget_quality", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "model_utility", "privleak"),
    *("extraction_strength", *ADDED),
)
TIME_GOAL, TOLERANCE = 3.0, 1e-3


def copy_rows(args: argparse.Namespace, folder: Path) -> None:
    """The files of the split in a folder of their own, cut to `--rows`, with `--answer_start` before every answer."""

    def lengthened(value: Any) -> Any:
        return [args.answer_start + one for one in value] if isinstance(value, list) else args.answer_start + value

    holdout = args.split.replace("forget", "holdout")
    for name in (f"{args.split}_perturbed", holdout, *SETS):
        lines = (Path(args.data) / f"{name}.json").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[: args.rows]]
        rows = [{k: lengthened(v) if "answer" in k else v for k, v in row.items()} for row in rows]
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measured(work: Any) -> dict[str, float]:
    """Wall and CPU seconds of `work()`, and the process's peak memory in MiB."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "peak_mib": peak}


def run_ours(task: dict[str, Any]) -> None:
    """Evaluate with fdiv and write `ours.json` and `ours_cost.json`."""
    import rouge_score.rouge_scorer  # noqa: F401 (the peer imports both with its package, we on first use)
    import scipy.stats  # noqa: F401
    from accelerate.utils import extract_model_from_parallel

    from fdiv.eval.benchmark.log import write_eval_log
    from fdiv.eval.tofu.evaluation import TofuEvalConfig, TofuEvaluation
    from fdiv.models.loading import load_model, load_tokenizer

    folder = Path(task["folder"])
    model, tokenizer = load_model(task["model"], dtype="float32"), load_tokenizer(task["model"])
    reference = load_model(task["retain_model"], dtype="float32")
    extract_model_from_parallel(model)  # imports DeepSpeed where it is installed

    def work() -> None:
        config = TofuEvalConfig(
            split=task["split"],
            data=task["data"],
            retain_logs=task["retain_log"],
            chat_template="never",
            question_format=task["question_start"] + "{question}" + task["question_end"],
            answer_format="{answer}",
            fluency_classifier="none",
        )
        evaluation = TofuEvaluation(config, tokenizer, progress=False)
        log = evaluation.run(model, reference_model=reference, likelihood_only=task["likelihood_only"])
        result = evaluation.aggregate(log)
        write_eval_log(folder / "OURS_EVAL.json", result.log)
        (folder / "ours.json").write_text(json.dumps(result.values))

    (folder / "ours_cost.json").write_text(json.dumps(measured(work)))


def run_peer(task: dict[str, Any]) -> None:
    """Evaluate with open-unlearning's evaluator and write `TOFU_EVAL.json` and `theirs_cost.json`."""
    import datasets

    original = datasets.load_dataset

    def local_rows(path: str, *positional: Any, **options: Any) -> Any:
        if path != "locuslab/TOFU":
            return original(path, *positional, **options)
        text = (Path(task["data"]) / f"{options['name']}.json").read_text(encoding="utf-8")
        return datasets.Dataset.from_list([json.loads(line) for line in text.splitlines()])

    datasets.load_dataset = local_rows
    checkout, folder = Path(task["checkout"]).resolve(), Path(task["folder"])
    sys.path.insert(0, str(checkout / "src"))
    os.chdir(checkout)
    from evals import get_evaluators
    from hydra import compose, initialize_config_dir
    from model import get_model

    names = {"forget_split": task["split"], "holdout_split": task["split"].replace("forget", "holdout")}
    settings = {
        **names,
        "model.model_args.pretrained_model_name_or_path": task["model"],
        "model.tokenizer_args.pretrained_model_name_or_path": task["model"],
        "model.model_args.attn_implementation": "sdpa",
        "model.model_args.torch_dtype": "float32",
        "model.model_args.device_map": "cpu",
        "retain_logs_path": task["retain_log"] or "null",
        "eval.tofu.output_dir": str(folder),
        "eval.tofu.metrics.mia_reference.reference_model_path": task["retain_model"],
    }
    overrides = ["experiment=eval/tofu/default", f"+eval/tofu_metrics=[{','.join(ADDED)}]", "task_name=benchmark"]
    overrides += ["hydra/job_logging=default", "hydra/hydra_logging=default"]  # colorlog is not needed
    overrides += [f"{key}={value}" for key, value in settings.items()]
    with initialize_config_dir(str(checkout / "configs"), version_base=None):
        config = compose("eval.yaml", overrides=overrides)
    config.model.template_args = {
        "apply_chat_template": False,
        "user_start_tag": task["question_start"],
        "user_end_tag": task["question_end"],
        "asst_start_tag": "",
    }
    model, tokenizer = get_model(config.model)

    def work() -> None:
        (evaluator,) = get_evaluators(config.eval).values()
        evaluator.evaluate(model=model, tokenizer=tokenizer, template_args=config.model.template_args)

    (folder / "theirs_cost.json").write_text(json.dumps(measured(work)))


def start(side: str, python: str, task: dict[str, Any], peer_path: str | None) -> None:
    """One side in a process of its own; its output is shown when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if peer_path and side == "theirs":
        environment["PYTHONPATH"] = peer_path
    command = [python, __file__, "--side", side, "--task", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-4000:]}")


def compare(folder: Path) -> dict[str, Any]:
    """Both sides' values, their relative difference, and what each cost."""
    theirs = json.loads((folder / "TOFU_EVAL.json").read_text())
    ours = json.loads((folder / "ours.json").read_text())
    values = {}
    for name in COMPARED:
        pair = ours[name], theirs[name]["agg_value"]
        both = None not in pair
        gap = abs(pair[0] - pair[1]) / max(abs(pair[1]), 1e-12) if both else None
        values[name] = {"ours": pair[0], "theirs": pair[1], "relative_difference": gap}
    cost = {side: json.loads((folder / f"{side}_cost.json").read_text()) for side in ("ours", "theirs")}
    ratios = {key: cost["theirs"][key] / cost["ours"][key] for key in cost["ours"]}
    return {"values": values, "cost": cost, "theirs_over_ours": ratios}


def main() -> int:
    """Run both sides, print the table, and return 1 if a value differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkout", "model", "retain_model", "data", "peer_path", "output"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--split", default="forget10")
    parser.add_argument("--rows", type=int, help="the first N rows of every set")
    parser.add_argument("--question_start", default="<bos>Question: ", help="before the question")
    parser.add_argument("--question_end", default="\nAnswer:", help="after it")
    parser.add_argument("--answer_start", default=" ", help="before every answer")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        {"ours": run_ours, "theirs": run_peer}[args.side](json.loads(args.task))
        return 0
    for name in ("checkout", "model", "retain_model", "data"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is needed")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = folder / "rows"
        rows.mkdir()
        copy_rows(args, rows)
        shared = ("checkout", "model", "retain_model", "split", "question_start", "question_end")
        task = {name: getattr(args, name) for name in shared}
        counts = {path.stem: len(path.read_text().splitlines()) for path in sorted(rows.glob("*.json"))}
        task |= {"data": str(rows), "folder": str(folder), "retain_log": None, "likelihood_only": False}
        start("ours", sys.executable, task | {"model": args.retain_model, "likelihood_only": True}, None)
        (folder / "OURS_EVAL.json").rename(folder / "RETAIN_EVAL.json")
        task["retain_log"] = str(folder / "RETAIN_EVAL.json")
        start("ours", sys.executable, task, None)
        start("theirs", args.peer_python, task, args.peer_path)
        result = compare(folder)
    wrong = []
    print(f"{'metric':24}{'ours':>14}{'open-unlearning':>18}{'relative difference':>22}")
    for name, value in result["values"].items():
        gap = value["relative_difference"]
        if gap is None or gap > TOLERANCE:
            wrong.append(name)
        ours, theirs, gap = ("–" if x is None else f"{x:.6g}" for x in (value["ours"], value["theirs"], gap))
        print(f"{name:24}{ours:>14}{theirs:>18}{gap:>22}")
    ratios, cost = result["theirs_over_ours"], result["cost"]
    for key in ("wall", "cpu", "peak_mib"):
        ours, theirs = cost["ours"][key], cost["theirs"][key]
        print(f"{key:10} ours {ours:9.1f}   open-unlearning {theirs:9.1f}   ratio {ratios[key]:.2f}")
    print(f"goal: cpu ratio >= {TIME_GOAL}, peak ratio >= 1; values within {TOLERANCE}: {wrong or 'all'}")
    if args.output:
        from fdiv.provenance import environment

        result |= {"rows": counts, "split": args.split, "goal": {"cpu": TIME_GOAL, "peak_mib": 1.0}}
        result["environment"] = environment(shlex.join(["python", *sys.argv]), seed=0)
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
