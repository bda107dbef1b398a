"""`FDistillTrainer` against the dense loss, TRL's own trainer, and itself over other batches, checkpoints and rollouts."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.distillation import FDistillConfig, FDistillTrainer, f_distill_loss
from fdiv.distillation.f_distill.data import check_rows, completion_tokens, samples_itself
from fdiv.distillation.teachers import shared_tokens
from fdiv.errors import CheckpointError, DataError
from fdiv.models.vocabulary import check_head
from fdiv.training.rollouts import RecordedRollouts
from tests.support.runs.f_distill import make_teacher, make_trainer, messages, rows
from tests.support.same_run import PLAIN_STEPS, assert_same_weights

GATED = {"name": "gated", "forward": "forward_kl", "reverse": "reverse_kl", "gate": {"name": "head_tail", "mass": 0.5}}
SPECS = ["reverse_kl", "forward_kl", "total_variation", "neyman_chi2", {"name": "skew_jensen_shannon", "weight": 0.7}]
SPECS += ["cauchy_schwarz", GATED]


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def expected(model_dir, teacher_dir, data, divergence, temperature=1.0, room=24):
    """The dense loss of all rows, a mean over tokens; rows one by one, tokens by hand."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).double() for path in (model_dir, teacher_dir))
    total, tokens = 0.0, 0
    for row in data:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [
            *tokenizer(row["prompt"] + row["completion"])["input_ids"][len(prompt) :],
            tokenizer.eos_token_id,
        ]
        completion = completion[:room]
        ids = torch.tensor([prompt + completion])
        log_p, log_q = (
            (model(ids).logits[:, len(prompt) - 1 : -1] / temperature).log_softmax(-1) for model in (student, teacher)
        )
        mask = torch.ones(log_p.shape[:2], dtype=torch.bool)
        total = total + f_distill_loss(log_p, log_q, mask, divergence).sum() * len(completion)
        tokens += len(completion)
    return total / tokens, student


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_loss_and_gradient_are_those_of_the_dense_loss(spec, tiny_model_dir, teacher_dir, tmp_path):
    """Padded rows of uneven lengths, given completions with an end token, temperature 1.5."""
    data = rows(4)
    trainer = make_trainer(
        tiny_model_dir,
        teacher_dir,
        data,
        tmp_path,
        divergence=spec,
        temperature=1.5,
        max_steps=1,
        shuffle_dataset=False,
    )
    batch = trainer._prepare_inputs(data)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    dense, student = expected(tiny_model_dir, teacher_dir, data, spec, 1.5)
    dense.backward()
    assert loss.item() == pytest.approx(dense.item(), rel=2e-5)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)
    assert all(parameter.grad is None for parameter in trainer.teacher_model.parameters())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_on_the_same_samples_it_is_trls_trainer(beta, tiny_model_dir, teacher_dir, tmp_path):
    from trl import DistillationConfig, DistillationTrainer

    names = {0.0: "forward_kl", 1.0: "reverse_kl"}
    spec = names.get(beta) or {"name": "skew_jensen_shannon", "weight": 1 - beta}
    ours = make_trainer(tiny_model_dir, teacher_dir, rows(4), tmp_path / "ours", divergence=spec, temperature=0.8)
    theirs = DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), teacher_model=str(teacher_dir),
        args=DistillationConfig(output_dir=str(tmp_path / "trl"), beta=beta, temperature=0.8, bf16=False, use_cpu=True,
                                gradient_checkpointing=False, report_to=[]),
        train_dataset=Dataset.from_list(rows(4)), processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
    )  # fmt: skip
    batch = ours._prepare_inputs(rows(4))
    got, wanted = ours.compute_loss(ours.model, batch), theirs.compute_loss(theirs.model, batch)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)
    got.backward(), wanted.backward()
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_learns_its_teacher_and_says_so(tiny_model_dir, teacher_dir, tmp_path):
    trainer = make_trainer(
        tiny_model_dir, teacher_dir, rows(), tmp_path, divergence="jensen_shannon", max_steps=40, learning_rate=5e-3,
        per_device_train_batch_size=12, eval_dataset=Dataset.from_list(rows(5)), eval_strategy="no",
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_divergence/jensen_shannon"] < 0.5 * before["eval_divergence/jensen_shannon"]
    assert after["eval_loss"] == pytest.approx(after["eval_divergence/jensen_shannon"])
    last = trainer.state.log_history[-3]
    assert last["on_policy_fraction"] == 0 and last["completions/mean_length"] > 5
    assert 0 < last["entropy"] < math.log(400) and 0 < last["teacher_entropy"] < math.log(400)
    for name in ("log_ratio", "density_weight"):
        assert last[f"{name}/tokens_p05"] <= last[f"{name}/tokens_p50"] <= last[f"{name}/tokens_p95"]
    assert last["divergence/jensen_shannon_se"] > 0
    dense, _ = expected(tiny_model_dir, teacher_dir, rows(5), "jensen_shannon")
    assert before["eval_loss"] == pytest.approx(dense.item(), rel=1e-4)


@pytest.mark.parametrize("spec", ["cauchy_schwarz", GATED], ids=str)
def test_without_an_f_it_learns_and_says_so(spec, tiny_model_dir, teacher_dir, tmp_path):
    trainer = make_trainer(
        tiny_model_dir, teacher_dir, rows(), tmp_path, divergence=spec, max_steps=20, learning_rate=5e-3,
        per_device_train_batch_size=12,
    )  # fmt: skip
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    last = trainer.state.log_history[-2]
    label = "cauchy_schwarz" if spec == "cauchy_schwarz" else "gated(forward_kl,reverse_kl,head_tail(0.5))"
    assert last[f"divergence/{label}"] == pytest.approx(last["loss"], rel=1e-3) and last[f"divergence/{label}_se"] > 0
    assert (0 < last["gate"] < 1) if spec == GATED else "gate" not in last
    assert "log_ratio/tokens_p50" in last and "density_weight/tokens_p50" not in last


@pytest.mark.processor
@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}, {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 1}])  # fmt: skip
def test_accumulation_changes_nothing(options, tiny_model_dir, teacher_dir, tmp_path):
    settings = {**PLAIN_STEPS, "learning_rate": 0.5, "max_steps": 2, "divergence": "le_cam"}
    whole = make_trainer(
        tiny_model_dir, teacher_dir, rows(), tmp_path / "1", per_device_train_batch_size=8, **settings
    )
    parts = make_trainer(tiny_model_dir, teacher_dir, rows(), tmp_path / "2", **settings, **options)
    whole.train(), parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    assert_same_weights(whole, parts, 1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_resumed_run_is_the_whole_run(share, tiny_model_dir, teacher_dir, tmp_path):
    settings = {"on_policy_share": share, "max_steps": 5, "save_strategy": "steps", "save_steps": 2, "seed": 3}
    whole = make_trainer(tiny_model_dir, teacher_dir, rows(), tmp_path / "whole", **settings)
    whole.train()
    again = make_trainer(tiny_model_dir, teacher_dir, rows(), tmp_path / "whole", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again) == losses(whole)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_another_teacher_is_refused(tiny_model_dir, teacher_dir, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tiny_model_dir, teacher_dir, rows(), tmp_path / "out", **settings).train()
    other = make_teacher(tmp_path / "other", seed=8)
    trainer = make_trainer(tiny_model_dir, other, rows(), tmp_path / "out", **settings)
    with pytest.raises(CheckpointError, match="teacher is"):
        trainer.train(resume_from_checkpoint=True)


# ---------------------------------------------------------------- own samples
def recorded(data, tokenizer, word):
    return [
        {"prompt": row["prompt"], "sample": n, "logprobs": None, "prompt_ids": tokenizer(row["prompt"])["input_ids"],
         "completion_ids": [*tokenizer(f" {word} {n}")["input_ids"], tokenizer.eos_token_id]}
        for row in data for n in range(20)
    ]  # fmt: skip


def test_recorded_rollouts_take_the_place_of_samples(tiny_model_dir, teacher_dir, tmp_path):
    """On-policy with given rollouts: the loss is that of the same completions given as data."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    data = rows(4)
    own = make_trainer(
        tiny_model_dir, teacher_dir, data, tmp_path / "1", on_policy_share=1.0, max_steps=1,
        rollout_func=RecordedRollouts(recorded(data, tokenizer, "said")),
    )  # fmt: skip
    own.train()
    same = [{"prompt": row["prompt"], "completion": " said 0"} for row in data]
    dense, _ = expected(tiny_model_dir, teacher_dir, same, "reverse_kl")
    assert losses(own)[0] == pytest.approx(dense.item(), rel=1e-3)
    assert own.state.log_history[0]["on_policy_fraction"] == 1


def test_the_student_samples_a_share_of_the_rows(tiny_model_dir, teacher_dir, tmp_path):
    trainer = make_trainer(
        tiny_model_dir, teacher_dir, rows(), tmp_path, on_policy_share=0.5, per_device_train_batch_size=12, max_steps=2
    )
    trainer.train()
    wanted = [samples_itself(row["prompt"], 0.5, trainer.args.seed, epoch) for epoch in (0, 1) for row in rows()]
    shares = [entry["on_policy_fraction"] for entry in trainer.state.log_history if "on_policy_fraction" in entry]
    assert shares == pytest.approx([sum(wanted[:12]) / 12, sum(wanted[12:]) / 12])
    assert 0 < shares[0] < 1


def test_a_prompt_is_sampled_for_with_the_stated_chance():
    chosen = [samples_itself(f"prompt {number}", 0.3, 1, 0) for number in range(4000)]
    assert sum(chosen) / 4000 == pytest.approx(0.3, abs=0.03)
    again = [samples_itself(f"prompt {number}", 0.3, 1, 1) for number in range(4000)]
    assert sum(a and b for a, b in zip(chosen, again, strict=True)) / 4000 == pytest.approx(0.09, abs=0.02)
    assert samples_itself("x", 1.0, 0, 0) and not samples_itself("x", 0.0, 0, 0)
    assert isinstance(samples_itself([{"role": "user", "content": "\ud800"}], 0.5, 0, 0), bool)


# ---------------------------------------------------------------- models and data
def test_lora_trains_the_adapter_towards_the_same_loss(tiny_model_dir, teacher_dir, tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tiny_model_dir, teacher_dir, rows(4), tmp_path, peft_config=adapter, learning_rate=1e-2)
    trainer.train()
    dense, _ = expected(tiny_model_dir, teacher_dir, rows(4), "reverse_kl")
    assert losses(trainer)[0] == pytest.approx(dense.item(), rel=1e-3) and losses(trainer)[-1] < losses(trainer)[0]


def test_learned_positions_under_left_padding(tiny_gpt2_dir, tmp_path):
    teacher = make_teacher(tmp_path / "teacher", architecture="gpt2")
    trainer = make_trainer(tiny_gpt2_dir, teacher, rows(4), tmp_path / "out", max_steps=1, disable_dropout=True)
    trainer.train()
    dense, _ = expected(tiny_gpt2_dir, teacher, rows(4), "reverse_kl")
    assert losses(trainer)[0] == pytest.approx(dense.item(), rel=1e-3)


def test_messages_go_through_the_chat_template(tiny_model_dir, teacher_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    trainer = make_trainer(tiny_model_dir, teacher_dir, messages(4), tmp_path, max_completion_length=60)
    trainer.train()
    row = messages(4)[2]
    asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    prompt_ids, ids = completion_tokens(tokenizer, row, trainer.args.encoding(), [tokenizer.eos_token_id])
    assert prompt_ids == asked
    assert tokenizer.decode(ids) == row["completion"][0]["content"] + tokenizer.eos_token
    assert losses(trainer)[-1] > 0


def test_heads_of_one_tokenizer_padded_to_two_widths(tiny_model_dir, teacher_dir, tmp_path):
    """The cells beyond the narrower head are left out of the teacher's distribution."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    teacher.resize_token_embeddings(teacher.config.vocab_size + 64, mean_resizing=False)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[-64:] = 3.0
    teacher.config._name_or_path = str(teacher_dir)
    trainer = make_trainer(tiny_model_dir, teacher, rows(4), tmp_path, max_steps=1)
    trainer.train()
    dense, _ = expected(tiny_model_dir, teacher_dir, rows(4), "reverse_kl")
    assert losses(trainer)[0] == pytest.approx(dense.item(), rel=1e-3)


def wider(model_dir):
    """The student with 64 tokens more than its tokenizer has, which it is sure to say."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(model.config.vocab_size + 64, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    return model


def test_a_wider_student_samples_what_the_teacher_knows(tiny_model_dir, teacher_dir, tmp_path):
    """One of its tokens that the teacher lacks in every few, if they were not left out."""
    known = AutoModelForCausalLM.from_pretrained(teacher_dir).config.vocab_size
    options = {"on_policy_share": 1.0, "max_steps": 1}
    trainer = make_trainer(
        tiny_model_dir, teacher_dir, rows(4), tmp_path / "1", model=wider(tiny_model_dir), **options
    )
    seen = []
    sample = trainer._sample
    trainer._sample = lambda *arguments: seen.extend(sample(*arguments)) or seen
    trainer.train()
    assert sum(map(len, seen)) > 40 and max(map(max, seen)) < known
    assert math.isfinite(losses(trainer)[0])
    told = [
        {"prompt": row["prompt"], "sample": 0, "prompt_ids": [], "logprobs": None, "completion_ids": [5, known + 3]}
        for row in rows(4)
    ]
    trainer = make_trainer(
        tiny_model_dir, teacher_dir, rows(4), tmp_path / "2", model=wider(tiny_model_dir),
        rollout_func=RecordedRollouts(told), **options,
    )  # fmt: skip
    with pytest.raises(DataError, match=f"4 of 4 rows have a token that the teacher lacks, .* token {known + 3} "):
        trainer.train()


def test_a_token_that_the_teacher_lacks_is_refused_in_rows_and_as_the_end(tiny_model_dir, teacher_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size), mean_resizing=False)
    data = [*rows(3), {"prompt": "Say it.", "completion": " One<|done|>"}]
    both = {"model": model, "processing_class": tokenizer}
    with pytest.raises(DataError, match=r"train_dataset.*: 1 of 4 rows .* row 3 with token \d+ \('<\|done\|>'\)"):
        make_trainer(tiny_model_dir, teacher_dir, data, tmp_path, **both)
    make_trainer(tiny_model_dir, teacher_dir, data[:3], tmp_path, **both)
    tokenizer.eos_token = "<|done|>"
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    with pytest.raises(DataError, match="the end tokens of the student: 1 of 1 rows"):
        make_trainer(tiny_model_dir, teacher_dir, rows(3), tmp_path, on_policy_share=1.0, **both)


def test_vocabularies_are_compared():
    class Tokenizer:
        def __init__(self, *tokens):
            self.tokens = tokens

        def get_vocab(self):
            return {token: number for number, token in enumerate(self.tokens) if token is not None}

    ours = Tokenizer("a", "b", "c")
    assert shared_tokens(ours, Tokenizer("a", "b", "c"), 3, 3) is None
    assert shared_tokens(ours, Tokenizer("a", "b", "c"), 8, 8) is None
    assert shared_tokens(ours, Tokenizer("a", "b", "c"), 8, 5) == 5
    assert shared_tokens(ours, Tokenizer("a", "b", "c", "<tool>"), 4, 4) == 3
    assert shared_tokens(ours, None, 4, 4) is None
    with pytest.raises(DataError, match=r"token 1 is 'b' and 'B' \(2 of 3 differ\)"):
        shared_tokens(ours, Tokenizer("a", "B", "C"), 3, 3)
    with pytest.raises(DataError, match="token 2 is 'c' and None"):
        shared_tokens(ours, Tokenizer("a", "b", None, "d"), 3, 4)
    with pytest.raises(DataError, match="no tokenizer beside it"):
        shared_tokens(ours, None, 4, 5)


def test_a_teacher_of_another_vocabulary(tiny_model_dir, tmp_path):
    from fdiv.models.tiny import build_tiny_model

    other = build_tiny_model(tmp_path / "other", vocab_texts=["quite other words, and no others"], vocab_size=300)
    with pytest.raises(DataError, match="different vocabularies"):
        make_trainer(tiny_model_dir, other, rows(4), tmp_path)


def test_a_head_that_is_not_a_matrix(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    check_head(model)
    model.config.logits_scaling = 2.0  # Llama's forward does not know it
    with pytest.raises(DataError, match="not its LM head times its last hidden states"):
        check_head(model)


BAD_ROWS = {
    "no rows": ([], "is empty"),
    "no prompt": ([{"completion": "a"}], "no column 'prompt'"),
    "no completion": ([{"prompt": "a"}], "no column 'completion'"),
    "empty": ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}], "row 1.*'completion'"),
    "number": ([{"prompt": 3, "completion": 4}], "row 0.*'prompt'"),
    "mixed": ([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}], "use one of the two"),
    "no content": ([{"prompt": [{"role": "user", "content": ""}], "completion": [{"role": "assistant", "content": "b"}]}],
                   "column 'prompt'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows_that_cannot_be_used(case):
    data, message = BAD_ROWS[case]
    with pytest.raises(DataError, match=message):
        check_rows(Dataset.from_list(data), "train_dataset", True)
    with pytest.raises(DataError, match="is missing"):
        check_rows(None, "train_dataset", True)
    check_rows(Dataset.from_list([{"prompt": "a"}]), "train_dataset", False)


def test_options_that_are_refused(tiny_model_dir, tmp_path):
    machine = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    for options, message in (
        ({"beta": 0.5}, "set `divergence` instead"),
        ({"on_policy_share": 1.5}, "on_policy_share=1.5"),
        ({"on_policy_share": math.nan}, "on_policy_share=nan"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"divergence": "kl"}, "ambiguous"),
        ({"divergence": {**GATED, "gate": "head_tail"}}, "missing a required argument: 'mass'"),
        ({"divergence": "cauchy_schwarz", "normalized": True}, "has no f''"),
    ):
        with pytest.raises(ValueError, match=message):
            FDistillConfig(**machine, **options)
    with pytest.raises(DataError, match="there is no teacher"):
        make_trainer(tiny_model_dir, None, rows(4), tmp_path)
    with pytest.raises(DataError, match="cannot be loaded"):
        make_trainer(tiny_model_dir, tmp_path / "nowhere", rows(4), tmp_path)


def test_names_of_the_package():
    import fdiv.distillation as package

    assert {"FDistillTrainer", "vocabulary_divergence", "topk_divergence"} <= set(dir(package))
    assert FDistillTrainer.config_class is FDistillConfig
