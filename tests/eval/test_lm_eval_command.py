"""`fdiv eval lm_eval` on a local task file."""

import json

import pytest

from fdiv.cli import main
from fdiv.eval.lm_eval.command import summarise

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{target}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture
def task(tmp_path):
    rows = [
        {"question": "what is two plus two?", "choices": ["four", "the capital of France"], "target": 0},
        {"question": "what is the capital of France?", "choices": ["Rome", "Paris"], "target": 1},
        {"question": "what jumps?", "choices": ["fox", "dog"], "target": 0},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "tasks" / "tiny_choice.yaml"
    file.parent.mkdir()
    file.write_text(TASK.format(data=data))
    return file, rows


def test_a_local_task_file(task, tiny_model_dir, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'fdiv[eval]')")
    import torch

    from fdiv.models.loading import load_model, load_tokenizer

    file, rows = task
    words = [
        "eval",
        "lm_eval",
        "--model",
        str(tiny_model_dir),
        "--tasks",
        str(file),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0
    out = json.loads((tmp_path / "out" / "out.json").read_text())

    model, tokenizer = load_model(str(tiny_model_dir)), load_tokenizer(str(tiny_model_dir))

    def log_prob(prompt, answer):
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor(tokenizer(prompt + answer)["input_ids"])
        log_p = model(ids[None]).logits[0].log_softmax(-1)
        return sum(log_p[t - 1, ids[t]].item() for t in range(start, len(ids)))

    hits = []
    for row in rows:
        scores = [log_prob(f"Question: {row['question']}\nAnswer:", " " + choice) for choice in row["choices"]]
        hits.append(scores.index(max(scores)) == row["target"])
    assert out["tiny_choice/acc"] == pytest.approx(sum(hits) / 3)
    assert out["items"] == {"tiny_choice": 3}
    assert "tiny_choice/acc" in out["standard_errors"]
    samples = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["metrics"]["acc"] for line in samples] == [float(hit) for hit in hits]


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.yaml", "no such task file"),
        pytest.param("surely_no_such_task", "lm-eval knows no surely_no_such_task", marks=pytest.mark.slow),
    ],
)
def test_unknown_tasks_are_one_line(tiny_model_dir, tmp_path, capsys, name, message):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'fdiv[eval]')")
    assert main(["eval", "lm_eval", "--model", str(tiny_model_dir), "--tasks", name, "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_missing_lm_eval_is_one_line(tiny_model_dir, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "lm_eval", "--model", str(tiny_model_dir), "--tasks", "mmlu", "--output", str(tmp_path)]) == 1
    assert "pip install 'fdiv[eval]'" in capsys.readouterr().err


def test_summary_keeps_filters_and_drops_text():
    results = {
        "results": {"gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, " ": ""}},
        "groups": {"mmlu": {"acc,none": 0.25, "acc_stderr,none": "N/A"}},
    }
    values, errors = summarise(results)
    assert values == {"gsm8k/exact_match,strict": 0.5, "mmlu/acc": 0.25}
    assert errors == {"gsm8k/exact_match,strict": 0.1}
