"""What a trainer's batch holds is what the evaluation of its model scores, and what generation goes on from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.data_utils import common_prefix_length

from fdiv.cli import main
from fdiv.errors import DataError, RolloutError
from fdiv.eval.preferences.evaluation import PreferencesEvalConfig
from fdiv.eval.tofu.evaluation import TofuEvalConfig, TofuEvaluation
from fdiv.inference.encoding import Encoding, encoding_stamp
from fdiv.inference.prompting import PromptFormat
from fdiv.models.logprobs import token_scores
from fdiv.models.tiny import build_tiny_model
from fdiv.recipe import load_recipe
from fdiv.recipe.dump import resolved_yaml
from fdiv.recipes.tasks.by_heart import learn_by_heart
from fdiv.rl.presample.data import tokenize_prompts
from fdiv.run.plan import plan_run
from fdiv.unlearning.data import Answer, UnlearningCollator, encode_answer
from tests.support.encodings import TEMPLATES, messages
from tests.support.runs import d2o, dph, f_dpg, f_dpo, unlearning

KEYS = {
    "qwen 3": {"chat_template_kwargs": {"enable_thinking": False}},
    "r1": {},
    "llama 3, the clock's date": {"date_string": "10 Apr 2025", "system_prompt": "Be kind."},
    "gemma": {"end_token": "appended"},
}


def tokenizer_of(folder, template):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES[template].text
    return tokenizer


def read_json_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def first_row(batch):
    """(ids, labels) of the first row of a padded batch."""
    ids, attended = batch["input_ids"][0].tolist(), batch["attention_mask"][0].tolist()
    labels = [token for token, label in zip(ids, batch["completion_mask"][0].tolist(), strict=True) if label]
    return [token for token, seen in zip(ids, attended, strict=True) if seen], labels


@pytest.mark.parametrize("template", KEYS)
def test_a_batch_is_what_the_evaluation_scores(template, tiny_model_dir, tofu_dir, tmp_path):
    keys, tokenizer = KEYS[template], tokenizer_of(tiny_model_dir, template)
    row = read_json_rows(tofu_dir / "forget10_perturbed.json")[0]
    evaluation = TofuEvaluation(TofuEvalConfig(data=str(tofu_dir), gradnorm=False, **keys), tokenizer)
    scored = next(request.text for request in evaluation.plan.scoring if request.key == "forget_Q_A_Prob/0")
    asked = next(request for request in evaluation.plan.generation if request.key == "forget_Q_A_ROUGE/0")
    assert asked.prompt_ids == scored.prompt_ids
    # Unlearning.
    rows = Dataset.from_list([{"question": row["question"], "answer": row["answer"]}])
    trainer = unlearning.make_trainer(
        "GradDiff", str(tiny_model_dir), tmp_path / "a", rows=rows, tokenizer=tokenizer, max_length=256, **keys
    )
    assert first_row(trainer.data_collator([trainer.train_dataset[0]])) == (
        list(scored.input_ids), list(scored.label_ids),
    )  # fmt: skip
    # f-DPO, and the evaluation of its pairs.
    pair = {"prompt": messages(row["question"]), "chosen": messages("", row["answer"])[1:]}
    rejected = [messages("", text)[1:] for text in (row["answer"], "No.")]
    pairs = Dataset.from_list([{**pair, "rejected": answer} for answer in rejected])
    trainer = f_dpo.make_trainer(
        tiny_model_dir, pairs, tmp_path / "b", processing_class=tokenizer, max_length=256, **keys
    )
    assert first_row(trainer.data_collator([trainer.train_dataset[0]])) == (
        list(scored.input_ids), list(scored.label_ids),
    )  # fmt: skip
    context = SimpleNamespace(training_args=trainer.args, report_rows=lambda *_: None)
    measured = PreferencesEvalConfig()._rows(tokenizer, {"test": pairs}, context)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert measured == [{name: trainer.train_dataset[i][name] for name in columns} for i in range(2)]


@pytest.mark.parametrize("template", KEYS)
def test_rollouts_presampling_and_negatives_have_one_prompt(template, tiny_model_dir, tmp_path):
    tokenizer = tokenizer_of(tiny_model_dir, template)
    keys = {name: value for name, value in KEYS[template].items() if name != "end_token"}
    prompt = messages("Where does Ana live?")
    due = tokenize_prompts(tokenizer, [prompt], Encoding(**keys))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    options = {"prompts": [prompt] * 2, "processing_class": tokenizer, "max_completion_length": 4, **keys}
    for made in (f_dpg.trainer(model, tmp_path / "a", **options), dph.trainer(model, tmp_path / "b", **options)):
        assert [list(ids) for ids in made._tokenize_prompts([prompt])[0]] == due
    rows = Dataset.from_list([{"prompt": prompt, "rejected": messages("", "Rome")[1:]}] * 2)
    made = d2o.make_trainer(model, rows, tmp_path / "c", processing_class=tokenizer, **keys)
    assert [made.train_dataset[0]["prompt_ids"]] == due == made._tokenize_prompts([prompt])[0]


def test_an_anchor_from_another_prompt_is_refused(tiny_model_dir, tmp_path):
    def rollouts(prompts, trainer):
        return {"prompt_ids": [[5]] * len(prompts), "completion_ids": [[7, 8]] * len(prompts), "logprobs": None}

    trainer = d2o.make_trainer(tiny_model_dir, d2o.negative_rows(2), tmp_path, rollout_func=rollouts, max_steps=1)
    with pytest.raises(RolloutError, match=r"sampled anchor 0 .* tokens \[5\].*trainer._tokenize_prompts"):
        trainer.train()


@pytest.mark.parametrize("template", ["chatml", "gemma", "r1", "qwen 3", "stripping, with spaces of its own"])
def test_the_probability_of_an_answer_is_that_of_the_trained_labels(template, tofu_dir, tmp_path):
    """Also of a model that has learnt some of them; "appended" adds the one label that was not trained."""
    rows = read_json_rows(tofu_dir / "forget10_perturbed.json")
    build_tiny_model(tmp_path, vocab_texts=[row["question"] + row["answer"] for row in rows], seed=1)
    tokenizer = tokenizer_of(tmp_path, template)
    answers = [Answer(messages(row["question"]), messages("", row["answer"])[1:], {}) for row in rows]
    encoded = [encode_answer(answer, tokenizer, None) for answer in answers]
    learn_by_heart(tmp_path, [encoded] * 25, 1e-2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = UnlearningCollator(tokenizer.pad_token_id)([{"index": 0, "forget": row} for row in encoded])
    with torch.no_grad():
        scores = token_scores(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    trained = (scores.log_probs.sum(1) / scores.mask.sum(1)).exp().mean().item()

    def measured(**keys):
        config = TofuEvalConfig(data=str(tofu_dir), gradnorm=False, fluency_classifier="none", generate=False, **keys)
        evaluation = TofuEvaluation(config, tokenizer, progress=False)
        return evaluation.aggregate(evaluation.run(model)).values["forget_Q_A_Prob"]

    assert measured() == pytest.approx(trained, rel=1e-4) and trained > 0.1
    ends_in_eos = TEMPLATES[template].end == "<|im_end|>"
    assert (measured(end_token="appended") == pytest.approx(trained, rel=1e-4)) == ends_in_eos


# ------------------------------------------------------------------------------------------------------- inheritance


def unlearning_recipe(tmp_path, **keys):
    path = tmp_path / "recipe.yaml"
    values = {
        "method": "grad_diff", "model_name_or_path": "model", "dataset_name": "rows.jsonl",
        "retain_dataset_name": "rows.jsonl", "eval": {"name": "tofu"}, **keys,
    }  # fmt: skip
    path.write_text(json.dumps(values))
    return plan_run(load_recipe(path))


def test_an_evaluation_takes_over_the_encoding_of_the_training(tmp_path):
    own = {"name": "tofu", "question_format": "{question}?", "date_string": "1 Jan 2020"}
    plan = unlearning_recipe(
        tmp_path,
        prompt_format="Q: {question}\nA:",
        end_token="appended",
        date_string="10 Apr 2025",
        eval=[{"name": "tofu"}, own, {"name": "muse"}, {"name": "passk"}],
        epoch_evaluation={"name": "tofu"},
        eval_strategy="epoch",
    )
    tofu, stated, muse, passk = (evaluation for _, evaluation in plan.evaluations)
    trained = PromptFormat("never", "Q: {question}\nA:", " {answer}", end_token="appended", date_string="10 Apr 2025")
    assert tofu.prompt() == muse.prompt() == trained
    assert (stated.question_format, stated.date_string, stated.end_token) == ("{question}?", "1 Jan 2020", "appended")
    assert (passk.date_string, passk.question_format, passk.chat_template) == ("10 Apr 2025", None, None)
    assert plan.configs.training.evaluation_keys()["question_format"] == "Q: {question}\nA:"
    written = resolved_yaml(plan.recipe)
    assert written.count("end_token: appended") == 4 and written.count("date_string: 10 Apr 2025") == 4


def test_template_keys_reach_the_evaluation(tmp_path):
    keys = {"chat_template_kwargs": {"enable_thinking": False}, "system_prompt": "Be kind."}
    never = {"name": "tofu", "chat_template": "never"}
    plan = unlearning_recipe(tmp_path, **keys, eval=[{"name": "tofu"}, never])
    tofu, plain = (evaluation for _, evaluation in plan.evaluations)
    assert tofu.prompt() == PromptFormat(**keys) and plain.system_prompt is None
    with pytest.raises(Exception, match="system_prompt='Be kind.' belongs to a chat template"):
        unlearning_recipe(tmp_path, **keys, prompt_format="{question}")


def test_a_retain_log_is_prepared_in_the_encoding_of_the_training(tmp_path):
    """So that it is that of the evaluation it is compared in."""
    data = {"name": "tofu_unlearning", "data": str(tmp_path)}
    for name in ("forget10.json", "retain90.json"):
        (tmp_path / name).write_text('{"question": "Who?", "answer": "Ana"}')
    for keys in ({"prompt_format": "{question}?"}, {"system_prompt": "Be kind.", "end_token": "appended"}):
        plan = unlearning_recipe(tmp_path, prepare=data, **keys)
        ((_, evaluation),) = plan.evaluations
        assert PromptFormat(**plan.recipe.prepare.instance()._prompt()) == evaluation.prompt() != PromptFormat()


def test_a_rehearsal_cache_of_another_encoding_is_refused(tiny_model_dir):
    tokenizer = tokenizer_of(tiny_model_dir, "llama 3, the clock's date")
    made = dph.cache(tiny_model_dir, settings={"encoding": encoding_stamp(tokenizer, Encoding())})
    assert made.check(made_with=encoding_stamp(tokenizer, Encoding())) == []
    for other in (Encoding("Be kind."), Encoding(date_string="1 Jan 2020"), Encoding(chat_template_kwargs={"a": 1})):
        with pytest.raises(DataError, match="restore the setting"):
            made.check(made_with=encoding_stamp(tokenizer, other))


# ------------------------------------------------------------------------------------------------------- command line


def test_the_stamp_of_a_log_says_how_rows_were_encoded(tiny_model_dir, tofu_dir, tmp_path):
    words = ["eval", "tofu", "--model", str(tiny_model_dir), "--data", str(tofu_dir), "--no_gradnorm", "--no_generate"]
    words += ["--max_items", "2", "--output", str(tmp_path), "--end_token", "appended", "--system_prompt", ""]
    assert main([*words, "--chat_template_kwargs", "{enable_thinking: false}"]) == 0
    stamp = json.loads((tmp_path / "TOFU_EVAL.json").read_text())["fdiv"]["prompt"]
    due = PromptFormat(end_token="appended", system_prompt="", chat_template_kwargs={"enable_thinking": False})
    assert stamp == due.stamp(AutoTokenizer.from_pretrained(tiny_model_dir))
    with pytest.raises(SystemExit):
        main([*words, "--chat_template_kwargs", "off"])


@pytest.mark.parametrize("name", ["tofu-mini-full", "tofu-mini-retain"])
def test_the_shared_models_tokenizers(shared_data, name):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / name)
    _as_trl_has_it(tokenizer)


def test_the_fetched_models_tokenizer():
    from fdiv.models.fetch import FetchError, find_model

    try:
        folder = find_model("smollm2-135m-instruct")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (FetchError, OSError) as error:
        pytest.skip(f"not fetched: {error}")
    _as_trl_has_it(tokenizer)


def _as_trl_has_it(tokenizer):
    """Labels of TRL's SFTTrainer, and no end token after the turn's own."""
    for question, answer in (("Where does Ana live?", "Porto"), (" Where? ", " In Porto.\n"), ("你好?", "1984")):
        row = PromptFormat().encode(tokenizer, question, answer)
        whole = tokenizer.apply_chat_template(messages(question, answer))["input_ids"]
        asked = tokenizer.apply_chat_template(messages(question), add_generation_prompt=True)["input_ids"]
        assert list(row.input_ids) == whole and row.prompt_length == common_prefix_length(asked, whole)
        assert row.label_ids.count(tokenizer.eos_token_id) == 1
        assert answer.strip() in tokenizer.decode(row.label_ids)
