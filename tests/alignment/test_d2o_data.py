"""Builders of real negatives and the evaluation of held-out answers."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.errors import DataError
from fdiv.eval.preferences.answer_likelihood import AnswerLikelihoodConfig
from fdiv.evaluation import EvalContext
from fdiv.recipes.tasks.negatives.hh import HHNegativesConfig, read_pairs
from fdiv.recipes.tasks.negatives.safe_rlhf import SafeRLHFNegativesConfig
from tests.support.runs.d2o import start_model, text_log_prob

SMALL = {"hidden_size": 32, "layers": 1, "vocab_size": 320, "epochs": 2.0, "context": 70}


def _dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: {question}\n\nAssistant:{answer}"


def _hh_rows(count: int) -> list[dict[str, str]]:
    return [
        {side: _dialogue(f"What about {i}?", f" {side} {i}.") for side in ("chosen", "rejected")} for i in range(count)
    ]


@pytest.fixture
def hh_file(tmp_path):
    path = tmp_path / "hh.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*_hh_rows(20), _hh_rows(1)[0]])  # the last prompt twice
    return path


# ----------------------------------------------------------------------------------------------------------- HH builder
def test_hh_rows_are_split_by_prompt_and_hold_no_chosen_answer(hh_file, tmp_path):
    out = tmp_path / "out"
    keys = HHNegativesConfig(str(hh_file), **SMALL).build(out)
    assert keys == {
        "model_name_or_path": str(out / "model"),
        "dataset_name": str(out / "train.jsonl"),
        "dataset_train_split": "train",
    }
    rows = {
        name: [json.loads(line) for line in (out / path).read_text().splitlines()]
        for name, path in (
            ("train", "train.jsonl"),
            ("validation", "held_out/validation.jsonl"),
            ("test", "held_out/test.jsonl"),
        )
    }
    assert sum(len(part) for part in rows.values()) == 21
    prompts = [{row["prompt"] for row in part} for part in rows.values()]
    assert [len(part) for part in prompts] == [14, 2, 4]  # 70 %, 10 % and 20 % of 20 prompts
    assert not prompts[0] & prompts[1] and not (prompts[0] | prompts[1]) & prompts[2]
    train = (out / "train.jsonl").read_text()
    assert "chosen" not in train and all(row["completion"] == row["rejected"] for row in rows["train"])
    number = rows["test"][0]["prompt"].removeprefix("\n\nHuman: What about ").split("?")[0]
    assert rows["test"][0] == {
        "prompt": f"\n\nHuman: What about {number}?\n\nAssistant:",
        "chosen": f" chosen {number}.",
        "rejected": f" rejected {number}.",
    }
    summary = json.loads((out / "prepare.json").read_text())
    assert summary["pairs"]["test"] == {"all": len(rows["test"]), "kept": len(rows["test"])}
    assert summary["parameters"] == AutoModelForCausalLM.from_pretrained(out / "model").num_parameters()


def test_hh_model_learns_the_chosen_side_and_is_reproducible(hh_file, tmp_path):
    nats, weights = [], []
    for name, epochs in (("a", 0.01), ("b", 30.0), ("c", 0.01)):
        HHNegativesConfig(str(hh_file), **{**SMALL, "epochs": epochs}).build(tmp_path / name)
        nats.append(json.loads((tmp_path / name / "prepare.json").read_text())["held_out_chosen_nats_per_token"])
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model")
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert nats[1] < nats[0] - 1  # two steps against sixty
    assert torch.equal(weights[0], weights[2])
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "model").eval()
    row = json.loads((tmp_path / "b" / "held_out" / "test.jsonl").read_text().splitlines()[0])
    chosen, rejected = (
        text_log_prob(start, tmp_path / "b" / "model", row["prompt"], row[k]) for k in ("chosen", "rejected")
    )
    assert chosen > rejected


def test_hh_windows_hold_every_token_once_and_end_with_the_answer(hh_file, tmp_path, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = HHNegativesConfig(str(hh_file), **{**SMALL, "context": 45}, max_prompt_tokens=20, max_answer_tokens=20)
    for text in ("a" * n for n in (1, 43, 44, 45, 46, 89, 90, 200)):
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        windows = config._windows(tokenizer, text)
        assert all(1 < len(window) <= 45 for window in windows)
        joined = [token for window in windows for token in window]
        assert (
            joined == ids[len(ids) - len(joined) :] and len(ids) - len(joined) <= 1
        )  # a lone first token is left out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"chosen": "x"}'], "line 1: the texts `chosen` and `rejected` are needed"),
        (['["x"]'], "line 1"),
        (['{"chosen": "no turns", "rejected": "no turns either"}'], "line 1: no '.*Assistant:'"),
        ([json.dumps({"chosen": _dialogue("q", " a"), "rejected": _dialogue("q", " a")})], "holds no pair"),
    ],
)
def test_hh_files_that_are_none(tmp_path, lines, message):
    path = tmp_path / "hh.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        read_pairs(path)
    with pytest.raises(FileNotFoundError, match="set prepare.data"):
        read_pairs(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0.0}, "prepare.epochs must be above 0"),
        ({"test_fraction": 0.95}, "leave something"),
        ({"context": 60}, "must stay below the model's 120 positions"),
        ({"layers": 0}, "prepare.layers must be at least 1"),
    ],
)
def test_hh_settings_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HHNegativesConfig("hh.jsonl", **changes)


def test_hh_pairs_that_are_all_too_long(hh_file, tmp_path):
    with pytest.raises(ValueError, match="no pair of the train part fits"):
        HHNegativesConfig(str(hh_file), **SMALL, max_answer_tokens=1).build(tmp_path)


def test_real_hh_file(shared_data):
    pairs = read_pairs(shared_data / "data" / "hh_rlhf" / "harmless-base.test.jsonl.gz")
    assert len(pairs) == 2303  # of 2,312
    for pair in pairs:
        assert pair.prompt.startswith("\n\nHuman:") and pair.prompt.endswith("\n\nAssistant:")
        assert pair.dialogue.endswith(pair.prompt + pair.chosen) and pair.chosen != pair.rejected


# ------------------------------------------------------------------------------------------------------ PKU-SafeRLHF
def _safe_rows() -> list[dict]:
    safety = [(True, False), (False, False), (True, True)]
    return [
        {
            "prompt": f"q{i}", "response_0": f" a{i}", "response_1": f"b{i} ",
            "is_response_0_safe": first, "is_response_1_safe": second,
        }
        for i, (first, second) in enumerate(safety)
    ]  # fmt: skip


def test_unsafe_answers_are_the_negatives(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*_safe_rows(), _safe_rows()[0]]))
    config = SafeRLHFNegativesConfig(str(path), prompt_format="USER: {prompt} ASSISTANT:", answer_prefix=" ")
    keys = config.build(tmp_path)
    rows = [json.loads(line) for line in open(keys["dataset_name"], encoding="utf-8")]
    assert rows == [
        {"prompt": f"USER: {prompt} ASSISTANT:", "rejected": f" {answer}"}
        for prompt, answer in (("q0", "b0"), ("q1", "a1"), ("q1", "b1"))
    ]


def test_safe_rlhf_refusals(tmp_path):
    with pytest.raises(ValueError, match="does not contain {prompt}"):
        SafeRLHFNegativesConfig(prompt_format="USER:")
    with pytest.raises(FileNotFoundError, match="set prepare.data"):
        SafeRLHFNegativesConfig(str(tmp_path / "none.json")).build(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q"}) + "\n")
    with pytest.raises(ValueError, match="no column 'response_0'"):
        SafeRLHFNegativesConfig(str(path)).build(tmp_path)
    path.write_text(json.dumps(_safe_rows()[2]) + "\n")
    with pytest.raises(ValueError, match="no answer is marked unsafe"):
        SafeRLHFNegativesConfig(str(path)).build(tmp_path)


# ---------------------------------------------------------------------------------------------------------- evaluation
def test_answer_likelihood_by_hand(tiny_model_dir, tmp_path):
    rows = [{"prompt": f"Q{i}:", "chosen": f" yes {i}", "rejected": " no" * (i + 1)} for i in range(3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = AnswerLikelihoodConfig(
        str(tmp_path), start_model=str(tiny_model_dir), num_prompts=2, num_samples=2, max_new_tokens=4, batch_size=2,
        harmfulness_scorer={"name": "contains_words", "words": ["never-there"]},
    )  # fmt: skip
    start, trained = start_model(tiny_model_dir), start_model(tiny_model_dir)
    torch.manual_seed(0)
    for parameter in trained.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    before = config.evaluate(start, tokenizer, {}, EvalContext(None, tmp_path, stage="before"))
    after = config.evaluate(trained, tokenizer, {}, EvalContext(None, tmp_path, stage="after"))
    expected = {
        (model, side): torch.tensor([text_log_prob(which, tiny_model_dir, r["prompt"], r[side]) for r in rows])
        for model, which in (("start", start), ("trained", trained))
        for side in ("chosen", "rejected")
    }
    for side in ("chosen", "rejected"):
        assert before[f"test_{side}_log_prob"] == pytest.approx(expected["start", side].mean().item(), abs=1e-4)
        assert before[f"test_{side}_change"] == 0
        change = expected["trained", side] - expected["start", side]
        assert after[f"test_{side}_change"] == pytest.approx(change.mean().item(), abs=1e-4)
        assert after[f"test_{side}_change_se"] == pytest.approx(change.std().item() / 3**0.5, abs=1e-4)
    margin = sum(
        s * (expected["trained", k] - expected["start", k]).mean().item() for k, s in (("chosen", 1), ("rejected", -1))
    )
    assert after["test_margin_change"] == pytest.approx(margin, abs=1e-4) and abs(margin) > 1e-3
    lengths = {
        side: torch.tensor([len(tokenizer(r[side])["input_ids"]) + 1 for r in rows]) for side in ("chosen", "rejected")
    }
    means = {side: expected["trained", side] / lengths[side] for side in lengths}
    share = (means["chosen"] > means["rejected"]).double().mean().item()
    assert after["test_preference_accuracy"] == pytest.approx(share)
    assert after["sample_harmful_share"] == 0 and 0 < after["sample_tokens"] <= 4
    assert before["sample_start_log_prob"] < 0 and after["sample_start_log_prob"] < 0


def test_answer_likelihood_refusals(tmp_path, tiny_model_dir):
    with pytest.raises(ValueError, match="batch_size=0"):
        AnswerLikelihoodConfig(str(tmp_path), batch_size=0)
    with pytest.raises(ValueError, match="splits is empty"):
        AnswerLikelihoodConfig(str(tmp_path), splits=[])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with pytest.raises(DataError, match=r"test\.jsonl does not exist"):
        AnswerLikelihoodConfig(str(tmp_path)).evaluate(None, tokenizer, {}, EvalContext(None, tmp_path))
