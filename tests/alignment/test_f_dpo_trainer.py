"""FDPOTrainer: parity with TRL's DPOTrainer, references, data types, invariances, metrics."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from fdiv.alignment import FDPOConfig, FDPOTrainer
from fdiv.divergences import get_divergence
from fdiv.errors import NonFiniteLossError
from fdiv.eval.calibration import length_normalised_calibration, margin_calibration
from fdiv.logprobs import mean_log_prob, sequence_log_prob, token_scores

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}


def preference_rows(count: int = 24) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"Question {i}: what comes after {i * 3}?",
            "chosen": f" After {i * 3} comes {i * 3 + 1}." + " Of course." * (i % 3),
            "rejected": f" No idea{', sorry' * (i % 4)}.",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return Dataset.from_list(preference_rows())


def _args(config, tmp_path, **options):
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
    } | options
    return config(
        output_dir=str(tmp_path), bf16=False, use_cpu=True, logging_steps=1,
        report_to=[], save_strategy=options.pop("save_strategy", "no"), disable_tqdm=True, **options,
    )  # fmt: skip


def _trainer(model_dir, rows, tmp_path, *, trainer=FDPOTrainer, config=FDPOConfig, model=None, **kwargs):
    names = inspect.signature(DPOTrainer.__init__).parameters
    passed = {key: kwargs.pop(key) for key in list(kwargs) if key in names}
    return trainer(
        model if model is not None else AutoModelForCausalLM.from_pretrained(model_dir),
        args=_args(config, tmp_path, **kwargs),
        train_dataset=rows,
        processing_class=passed.pop("processing_class", AutoTokenizer.from_pretrained(model_dir)),
        **passed,
    )


def _run(*args, **kwargs):
    trainer = _trainer(*args, **kwargs)
    trainer.train()
    return trainer


def _weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def _history(trainer, key: str) -> torch.Tensor:
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry], dtype=torch.float64)


def _assert_same_run(ours, theirs, tolerance: float = 1e-6) -> None:
    for key in ("loss", "grad_norm"):
        assert len(_history(ours, key)) >= 10
        torch.testing.assert_close(_history(ours, key), _history(theirs, key), atol=tolerance, rtol=0)
    torch.testing.assert_close(_weights(ours), _weights(theirs), atol=tolerance, rtol=0)
    assert _history(ours, "loss")[-1] < 0.65  # something was trained


# ------------------------------------------------------------------------------------------------ parity with TRL


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reverse_kl_is_trl_dpo_step_for_step(tiny_model_dir, rows, tmp_path, lora):
    extra = {"peft_config": LoraConfig(**LORA), "learning_rate": 3e-2} if lora else {}
    ours = _run(tiny_model_dir, rows, tmp_path, **extra)
    theirs = _run(tiny_model_dir, rows, tmp_path, trainer=DPOTrainer, config=DPOConfig, **extra)
    _assert_same_run(ours, theirs)
    shared = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    shared += [f"{kind}/{half}" for kind in ("logps", "logits") for half in ("chosen", "rejected")]
    shared += ["entropy", "num_tokens", "mean_token_accuracy"]
    for key in shared:
        torch.testing.assert_close(_history(ours, key), _history(theirs, key), atol=2e-5, rtol=1e-6, msg=key)
    assert set(theirs.state.log_history[0]) <= set(ours.state.log_history[0])


@pytest.mark.parametrize(
    ("divergence", "theirs"),
    [
        ("jensen_shannon", {"f_divergence_type": "js_divergence"}),
        ("forward_kl", {"f_divergence_type": "forward_kl"}),
        (
            {"name": "alpha", "alpha": 0.3},
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        ),
    ],
    ids=["js", "forward_kl", "alpha"],
)
def test_equals_trls_own_divergences(tiny_model_dir, rows, tmp_path, divergence, theirs):
    ours = _run(tiny_model_dir, rows, tmp_path, divergence=divergence)
    trl = _run(tiny_model_dir, rows, tmp_path, trainer=DPOTrainer, config=DPOConfig, **theirs)
    _assert_same_run(ours, trl, tolerance=1e-5)  # exp, written in two ways
    # TRL logs the raw reward under the name we give to what is optimised.
    for half in ("chosen", "rejected"):
        torch.testing.assert_close(
            _history(ours, f"rewards_raw/{half}"), _history(trl, f"rewards/{half}"), atol=1e-5, rtol=0
        )
    assert (_history(ours, "rewards/chosen")[4:] - _history(ours, "rewards_raw/chosen")[4:]).abs().max() > 1e-3


def test_normalized_gives_every_divergence_the_first_step_of_dpo(tiny_model_dir, rows, tmp_path):
    first = {}
    for divergence in ("reverse_kl", "jensen_shannon", "chi2_kl"):
        for normalized in (False, True):
            run = _run(tiny_model_dir, rows, tmp_path, divergence=divergence, normalized=normalized, max_steps=1)
            first[divergence, normalized] = _history(run, "grad_norm")[0].item()
    dpo = first["reverse_kl", False]
    assert first["jensen_shannon", False] == pytest.approx(dpo / 2, rel=1e-5)
    assert first["chi2_kl", False] == pytest.approx(dpo * 2, rel=1e-5)
    for divergence in ("reverse_kl", "jensen_shannon", "chi2_kl"):
        assert first[divergence, True] == pytest.approx(dpo, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5},
        {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2},
    ],
    ids=["checkpointing", "moving_reference", "accumulation"],
)
def test_trl_options_work_as_in_trl(tiny_model_dir, rows, tmp_path, options):
    ours = _run(tiny_model_dir, rows, tmp_path, **options)
    theirs = _run(tiny_model_dir, rows, tmp_path, trainer=DPOTrainer, config=DPOConfig, **options)
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(_history(ours, key), _history(theirs, key), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(_weights(ours), _weights(theirs), atol=1e-6, rtol=0)


def test_mixture_of_experts_keeps_the_auxiliary_loss(tiny_model_dir, rows, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")  # fmt: skip
    runs = [
        _run(
            tmp_path / "moe", rows, tmp_path, trainer=trainer, config=config, processing_class=tokenizer,
            router_aux_loss_coef=0.1, max_steps=10,
        )
        for trainer, config in ((FDPOTrainer, FDPOConfig), (DPOTrainer, DPOConfig))
    ]  # fmt: skip
    for key in ("loss", "grad_norm", "aux_loss"):
        torch.testing.assert_close(_history(runs[0], key), _history(runs[1], key), atol=1e-5, rtol=1e-6)
    assert _history(runs[0], "loss")[0] > math.log(2) + 0.1 * 0.9  # log 2 plus the weighted auxiliary loss


def test_compute_metrics_gets_the_logits_as_in_trl(tiny_model_dir, rows, tmp_path):
    logits = []

    def compute_metrics(prediction):
        logits.append(prediction.predictions)
        return {"mine": 1.0}

    for trainer, config in ((FDPOTrainer, FDPOConfig), (DPOTrainer, DPOConfig)):
        options = {"eval_dataset": rows.select(range(4)), "compute_metrics": compute_metrics}
        run = _trainer(tiny_model_dir, rows, tmp_path, trainer=trainer, config=config, **options)
        assert run.evaluate()["eval_mine"] == 1.0
    assert logits[0].shape[-1] == run.model.config.vocab_size and (logits[0] == logits[1]).all()


# ------------------------------------------------------------------------------------------------ invariances


def test_accumulation_equals_one_large_batch(tiny_model_dir, rows, tmp_path):
    options = {"divergence": "forward_kl", "optim": "sgd", "learning_rate": 0.05}
    large = _run(tiny_model_dir, rows, tmp_path, per_device_train_batch_size=8, **options)
    small = _run(
        tiny_model_dir, rows, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, **options
    )
    start = torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(tiny_model_dir).parameters()])
    assert (_weights(large) - start).abs().max() > 1e-2
    assert (_weights(large) - _weights(small)).abs().max() < 1e-5
    for key in ("loss", "grad_norm", "entropy", "rewards/margins", "log_ratio/chosen_p05", "divergence/forward_kl",
                "divergence/forward_kl_se", "clamped_fraction", "num_tokens"):  # fmt: skip
        torch.testing.assert_close(_history(large, key), _history(small, key), atol=1e-5, rtol=1e-4, msg=key)


def test_resuming_is_bit_for_bit(tiny_model_dir, rows, tmp_path):
    options = {"divergence": "jensen_shannon", "max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    straight = _run(tiny_model_dir, rows, tmp_path / "a", **options)
    resumed = _trainer(tiny_model_dir, rows, tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert torch.equal(_weights(straight), _weights(resumed))
    assert torch.equal(_history(straight, "loss"), _history(resumed, "loss"))
    assert (tmp_path / "a" / "checkpoint-4" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ references


def test_precomputed_reference_equals_live(tiny_model_dir, rows, tmp_path):
    live = _run(tiny_model_dir, rows, tmp_path, divergence="forward_kl")
    cached = _run(tiny_model_dir, rows, tmp_path, divergence="forward_kl", precompute_ref_log_probs=True)
    assert cached.ref_model is None
    _assert_same_run(live, cached)


def test_explicit_reference_is_used(tiny_model_dir, rows, tmp_path):
    """Reference = another model: the first logged log-ratio is the difference of the two, not 0."""
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        other.lm_head.weight.mul_(2.0)
    trainer = _run(tiny_model_dir, rows, tmp_path, ref_model=other, max_steps=1)
    assert trainer.accelerator.unwrap_model(trainer.ref_model) is other
    assert abs(_history(trainer, "rewards_raw/chosen")[0].item()) > 1e-3


def test_model_object_without_a_path_gets_a_frozen_copy(tiny_model_dir, rows, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    in_memory = type(source)(source.config)
    in_memory.load_state_dict(source.state_dict())
    in_memory.config._name_or_path = ""
    ours = _run(tiny_model_dir, rows, tmp_path, model=in_memory, divergence="jensen_shannon")
    named = _run(tiny_model_dir, rows, tmp_path, divergence="jensen_shannon")
    _assert_same_run(ours, named)
    assert not any(p.requires_grad for p in ours.ref_model.parameters())
    assert torch.equal(
        ours.accelerator.unwrap_model(ours.ref_model).lm_head.weight, source.lm_head.weight
    )  # still the start


def test_model_object_changed_after_loading_is_its_own_reference(tiny_model_dir, rows, tmp_path):
    """TRL would reload the files and start away from the policy; π_ref is the policy as handed over."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    trainer = _run(tiny_model_dir, rows, tmp_path, model=model, max_steps=1)
    assert _history(trainer, "loss")[0].item() == pytest.approx(math.log(2), abs=1e-7)


def test_model_named_by_a_string(tiny_model_dir, rows, tmp_path):
    named = _run(tiny_model_dir, rows, tmp_path, model=str(tiny_model_dir), processing_class=None, max_steps=10)
    _assert_same_run(named, _run(tiny_model_dir, rows, tmp_path, max_steps=10))


def test_continuing_an_adapter_uses_its_starting_copy(tiny_model_dir, rows, tmp_path):
    def adapted() -> PeftModel:
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(**LORA))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    trainer = _run(tiny_model_dir, rows, tmp_path, model=adapted(), learning_rate=2e-2, divergence="jensen_shannon")
    # log 2 at the start: the reference is the adapter as it was, not the base model.
    assert _history(trainer, "loss")[0].item() == pytest.approx(math.log(2), abs=1e-7)
    assert _history(trainer, "loss")[-1] < 0.6
    start = {name: p for name, p in adapted().named_parameters() if "lora_" in name}
    reference = {n.replace(".ref.", ".default."): p for n, p in trainer.model.named_parameters() if ".ref." in n}
    assert reference and all(torch.equal(start[name], parameter) for name, parameter in reference.items())


# ------------------------------------------------------------------------------------------------ data


def test_conversational_rows_equal_plain_rows_with_the_same_tokens(tiny_model_dir, rows, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk, plain = [], []
    for row in rows:
        prompt = [{"role": "user", "content": row["prompt"]}]
        talk.append(
            {"prompt": prompt} | {k: [{"role": "assistant", "content": row[k]}] for k in ("chosen", "rejected")}
        )
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        plain.append({"prompt": text, "chosen": row["chosen"], "rejected": row["rejected"]})
    runs = [
        _run(tiny_model_dir, Dataset.from_list(data), tmp_path, processing_class=tokenizer, divergence="jeffreys")
        for data in (talk, plain)
    ]
    for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert list(runs[0].train_dataset[key]) == list(runs[1].train_dataset[key])
    _assert_same_run(*runs)


def test_long_padding_never_gives_nan(tiny_model_dir, tmp_path):
    uneven = [
        {"prompt": "A", "chosen": " b", "rejected": " c" * 90},
        {"prompt": "A " * 90, "chosen": "", "rejected": "d"},
    ]
    trainer = _run(tiny_model_dir, Dataset.from_list(uneven * 4), tmp_path, divergence="neyman_chi2", max_steps=3)
    assert torch.isfinite(_weights(trainer)).all() and torch.isfinite(_history(trainer, "grad_norm")).all()


# ------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize("architecture", ["tiny_model_dir", "tiny_gpt2_dir"])
def test_evaluation_metrics_equal_an_independent_calculation(request, architecture, rows, tmp_path):
    """Each sequence scored alone, without padding: also right for learned positions (GPT-2)."""
    tiny_model_dir = request.getfixturevalue(architecture)
    torch.manual_seed(5)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    beta, cap, divergence = 0.3, {"llama": 0.7, "gpt2": 4.0}[policy.config.model_type], get_divergence("jeffreys")
    trainer = _trainer(
        tiny_model_dir, rows, tmp_path, model=policy, ref_model=reference, eval_dataset=rows.select(range(11)),
        divergence="jeffreys", beta=beta, max_exponent=cap, per_device_eval_batch_size=4,
    )  # fmt: skip
    logged = trainer.evaluate()

    def score(model, row, half):
        ids = torch.tensor([row["prompt_ids"] + row[f"{half}_ids"]])
        mask = torch.ones_like(ids)
        completion = mask.clone()
        completion[:, : len(row["prompt_ids"])] = 0
        return token_scores(model, ids, mask, completion, outputs=("entropy", "is_top1", "mean_logits"), fused=False)

    with torch.no_grad():
        policy_scores = {h: [score(policy, r, h) for r in trainer.eval_dataset] for h in ("chosen", "rejected")}
        log_ratio = {
            half: torch.stack(
                [
                    (sequence_log_prob(s) - sequence_log_prob(score(reference, r, half)))[0]
                    for s, r in zip(policy_scores[half], trainer.eval_dataset, strict=True)
                ]
            ).double()
            for half in ("chosen", "rejected")
        }
    rewards = {half: beta * divergence.score(log_ratio[half], cap) for half in log_ratio}
    margin = rewards["chosen"] - rewards["rejected"]
    expected = {"clamped_fraction": (torch.stack(list(log_ratio.values())) < -cap).any(0).double().mean()}
    assert 0 < expected["clamped_fraction"] < 1
    expected |= {"rewards/margins": margin.mean(), "rewards/accuracies": (margin > 0).double().mean()}
    expected["rewards_raw/margins"] = beta * (log_ratio["chosen"] - log_ratio["rejected"]).mean()
    tokens = {half: torch.cat([s.mask[s.mask] for s in policy_scores[half]]).sum() for half in log_ratio}
    for half, values in log_ratio.items():
        expected[f"rewards/{half}"] = rewards[half].mean()
        expected[f"rewards_raw/{half}"] = beta * values.mean()
        expected[f"logps/{half}"] = torch.cat([sequence_log_prob(s) for s in policy_scores[half]]).mean()
        expected[f"logits/{half}"] = sum(s.mean_logits.sum() for s in policy_scores[half]) / tokens[half]
        for name, q in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
            expected[f"log_ratio/{half}_{name}"] = torch.quantile(values, q)
    expected["entropy"] = sum(s.entropy.sum() for h in log_ratio for s in policy_scores[h]) / sum(tokens.values())
    expected["mean_token_accuracy"] = sum(s.is_top1.sum() for s in policy_scores["chosen"]) / tokens["chosen"]
    pairs = divergence.generator(torch.stack(list(log_ratio.values()), 1)).mean(1)
    expected["divergence/jeffreys"] = pairs.mean()
    expected["divergence/jeffreys_se"] = pairs.std() / math.sqrt(11)
    means = {half: torch.cat([mean_log_prob(s) for s in policy_scores[half]]) for half in log_ratio}
    expected["ece_length_normalised"] = torch.tensor(length_normalised_calibration(means["chosen"], means["rejected"]))
    expected["ece_margin"] = torch.tensor(margin_calibration(margin))
    expected["loss"] = torch.log1p(torch.exp(-margin)).mean()
    for name, value in expected.items():
        assert logged[f"eval_{name}"] == pytest.approx(value.item(), abs=2e-4, rel=2e-4), name


def test_one_host_read_per_micro_batch(tiny_model_dir, rows, tmp_path, monkeypatch):
    """The non-finite check is the only `bool()` of a tensor in the loss; metrics wait for the log."""
    trainer = _trainer(tiny_model_dir, rows, tmp_path)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    reads = []
    for method in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(torch.Tensor, method)
        monkeypatch.setattr(
            torch.Tensor, method, lambda self, *a, _o=original, _m=method: (reads.append(_m), _o(self, *a))[1]
        )
    columns = {"loss": torch.ones(4), "other": torch.zeros(4)}
    trainer.record_examples(columns)
    assert reads == ["__bool__"]
    monkeypatch.undo()
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))


# ------------------------------------------------------------------------------------------------ stopping and cards


def test_non_finite_loss_stops_before_the_optimizer_step(tiny_model_dir, rows, tmp_path):
    trainer = _trainer(tiny_model_dir, rows, tmp_path, divergence="forward_kl", max_steps=6)

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    trainer.model.lm_head.weight[5, 0] = float("nan")
                self.before = _weights(trainer).clone()

    poison = Poison()
    trainer.add_callback(poison)
    with pytest.raises(
        NonFiniteLossError, match=r"step 4: the loss is nan \(divergence=forward_kl.*learning_rate"
    ) as e:
        trainer.train()
    assert "chosen_log_ratio=nan" in str(e.value) and "last logged metrics: loss=0." in str(e.value)
    after = _weights(trainer)
    assert torch.equal(torch.nan_to_num(after, nan=7.0), torch.nan_to_num(poison.before, nan=7.0))


def test_non_finite_loss_in_evaluation_is_an_error_too(tiny_model_dir, rows, tmp_path):
    trainer = _trainer(tiny_model_dir, rows, tmp_path, eval_dataset=rows)
    with torch.no_grad():
        trainer.model.lm_head.weight[5, 0] = float("inf")
    with pytest.raises(NonFiniteLossError, match="evaluation at step 0: the loss is nan"):
        trainer.evaluate()


def test_model_card_names_the_divergence_and_the_paper(tiny_model_dir, rows, tmp_path):
    trainer = _trainer(tiny_model_dir, rows, tmp_path, divergence={"name": "alpha", "alpha": 0.3}, beta=0.05)
    trainer.create_model_card(model_name="mine", tags="extra")
    text = (tmp_path / "README.md").read_text()
    for piece in (
        "- f-dpo",
        "- alpha",
        "- extra",
        "2309.16240",
        "| beta | `0.05` |",
        "{'name': 'alpha', 'alpha': 0.3}",
    ):
        assert piece in text
    assert "huggingface.co/None" not in text and str(tiny_model_dir) in text


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"train_dataset is empty"),
        ([{"prompt": "a", "completion": "b"}], r"no column 'chosen' and no column 'rejected'; it has \['completion'"),
        ([{"prompt": "a", "chosen": "b"}], r"no column 'rejected'"),
        ([{"prompt": "a", "chosen": 3, "rejected": "x"}], r"column 'chosen' of its first row is 3"),
        ([{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}], r"mixes strings and mess"),
    ],
)
def test_bad_data_is_named(tiny_model_dir, tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        _trainer(tiny_model_dir, Dataset.from_list(data), tmp_path)


def test_bad_evaluation_data_is_named(tiny_model_dir, rows, tmp_path):
    with pytest.raises(ValueError, match=r"eval_dataset\['held'\].*no column 'chosen'"):
        _trainer(tiny_model_dir, rows, tmp_path, eval_dataset={"held": rows.remove_columns("chosen")})


def test_precomputing_for_several_processes_needs_data_with_files(rows):
    from fdiv.alignment.f_dpo import _check_data

    args = SimpleNamespace(precompute_ref_log_probs=True, world_size=2)
    with pytest.raises(ValueError, match="train_dataset lies in memory only, so 2 processes"):
        _check_data(rows, None, args)
    _check_data(rows, None, SimpleNamespace(precompute_ref_log_probs=True, world_size=1))


def test_prompts_that_fill_max_length_are_an_error_when_nothing_is_left(tiny_model_dir, rows, tmp_path):
    with pytest.raises(ValueError, match="max_length=2"):
        _trainer(tiny_model_dir, rows, tmp_path, max_length=2)


def test_model_without_pad_token_is_refused_and_pad_token_is_the_remedy(tiny_model_dir, rows, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"tiny-llama.*has no pad token: set `pad_token`"):
        _trainer(tiny_model_dir, rows, tmp_path, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"pad_token '<nope>' is not in the vocabulary"):
        _trainer(tiny_model_dir, rows, tmp_path, processing_class=tokenizer, pad_token="<nope>")
    trainer = _trainer(tiny_model_dir, rows, tmp_path, processing_class=tokenizer, pad_token="<|bos|>")
    assert trainer.data_collator.pad_token_id == tokenizer.convert_tokens_to_ids("<|bos|>")


def test_plain_dpo_config_is_refused(tiny_model_dir, rows, tmp_path):
    with pytest.raises(TypeError, match="FDPOConfig"):
        _trainer(tiny_model_dir, rows, tmp_path, config=DPOConfig)


# ------------------------------------------------------------------------------------------------ private hooks


def test_signatures_of_the_private_hooks():
    """What FDPOTrainer overrides or calls inside TRL 1.16; an upgrade that changes one must be looked at."""

    def parameters(function) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(DPOTrainer._compute_loss) == ["self", "model", "inputs", "return_outputs"]
    assert parameters(DPOTrainer.compute_ref_log_probs) == ["self", "model", "inputs"]
    assert parameters(DPOTrainer.log) == ["self", "logs", "start_time"]
    assert parameters(DPOTrainer.evaluate) == ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"]
    assert parameters(DPOTrainer._prepare_dataset) == ["self", "dataset", "processing_class", "args", "dataset_name"]
    assert parameters(DPOTrainer.create_model_card) == ["self", "model_name", "dataset_name", "tags"]
    assert parameters(DPOTrainer.__init__) == parameters(FDPOTrainer.__init__)
    source = inspect.getsource(DPOTrainer)
    for attribute in ("self._metrics[mode]", "self._total_train_tokens", "self._tp_size", "self.aux_loss_enabled",
                      "self.router_aux_loss_coef", "self.precompute_ref_logps", '"ref_chosen_logps"'):  # fmt: skip
        assert attribute in source
