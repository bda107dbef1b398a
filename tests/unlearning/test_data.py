"""Reading, encoding and pairing of forget, retain and template rows."""

from __future__ import annotations

import copy
import json
from collections import Counter
from itertools import chain

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from torch.utils.data import BatchSampler
from transformers import AutoTokenizer

from fdiv.inference.prompting import PromptFormat
from fdiv.unlearning.data import (
    Answer,
    EncodedAnswer,
    ForgetDataset,
    UnlearningCollator,
    check_disjoint,
    encode_answer,
    encode_text,
    load_rows,
    read_answers,
)
from fdiv.unlearning.data.pairing import EpochSampler, draw_index, draw_prefix, epoch_order
from fdiv.unlearning.data.templates import REFUSALS, GenerationSettings, column_templates, read_refusals
from fdiv.unlearning.methods.flat import FLATConfig
from fdiv.unlearning.methods.idk_dpo import IdkDPOConfig
from tests.support.runs.unlearning import forget_rows, make_trainer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


# ------------------------------------------------------------------------------------------------------------ pairing


def test_prefixes_are_a_fixed_function_with_the_lengths_of_the_paper():
    """None with probability ½, else k tokens of n with weight 1/k: of 3 tokens 6/11, 3/11, 2/11."""
    draws = [draw_prefix(7, epoch, index, 3, 0.5) for epoch in range(40) for index in range(100)]
    assert draws == [draw_prefix(7, epoch, index, 3, 0.5) for epoch in range(40) for index in range(100)]
    shares = [draws.count(length) / len(draws) for length in range(4)]
    assert shares == pytest.approx([1 / 2, 3 / 11, 3 / 22, 1 / 11], abs=0.03)
    assert draws != [draw_prefix(8, epoch, index, 3, 0.5) for epoch in range(40) for index in range(100)]
    assert {draw_prefix(0, 0, index, 9, 0.0) for index in range(50)} == {0}
    assert 0 not in {draw_prefix(0, 0, index, 9, 1.0) for index in range(50)}
    assert draw_prefix(0, 0, 0, 0, 1.0) == 0  # an answer without a word


def test_draws_are_a_fixed_function_of_seed_epoch_and_index():
    """The first draws, once and for all: a change of hash would change everybody's runs."""
    assert [draw_index(0, 0, i, "retain", 400) for i in range(4)] == GOLDEN["retain"]
    assert [draw_index(42, 1, i, "template", 100) for i in range(4)] == GOLDEN["template"]
    assert epoch_order(0, 0, 6) == GOLDEN["order"]


GOLDEN = {"retain": [364, 190, 137, 268], "template": [25, 38, 2, 98], "order": [4, 2, 3, 5, 1, 0]}


def test_draws_are_uniform_and_independent_of_each_other():
    draws = [draw_index(3, epoch, index, "retain", 10) for epoch in range(20) for index in range(100)]
    counts = torch.tensor([Counter(draws)[k] for k in range(10)], dtype=torch.float64)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # χ² with 9 degrees of freedom, p = 0.001
    other = [draw_index(3, epoch, index, "template", 10) for epoch in range(20) for index in range(100)]
    agreement = sum(a == b for a, b in zip(draws, other, strict=True)) / len(draws)
    assert abs(agreement - 0.1) < 4 * (0.09 / 2000) ** 0.5
    assert draws[:100] != draws[100:200]  # epochs differ
    assert sorted(epoch_order(1, 2, 50)) == list(range(50)) != epoch_order(1, 2, 50)
    with pytest.raises(ValueError, match="empty"):
        draw_index(0, 0, 0, "retain", 0)


@pytest.mark.parametrize("count", [5, 12, 13])
def test_one_and_two_processes_see_the_same_global_batches(count):
    """accelerate's sharding of the sampler: step by step the same rows, however 8 examples are split."""

    def steps(processes, per_device, accumulation):
        sampler = EpochSampler(count, seed=7, global_batch_size=processes * per_device * accumulation)
        sampler.set_epoch(3)
        shards = [
            list(BatchSamplerShard(BatchSampler(sampler, per_device, drop_last=False), processes, rank))
            for rank in range(processes)
        ]
        micro = [[shard[i] for shard in shards] for i in range(len(shards[0]))]
        joined = [list(chain(*batch)) for batch in micro]
        return [sorted(chain(*joined[i : i + accumulation])) for i in range(0, len(joined), accumulation)]

    whole = steps(1, 8, 1)
    assert steps(2, 4, 1) == steps(2, 2, 2) == steps(1, 1, 8) == steps(8, 1, 1) == whole
    assert all(len(step) == 8 for step in whole)
    addresses = [address for step in whole for address in step]
    assert {divmod(address, count)[0] for address in addresses} == {3}
    assert {address % count for address in addresses} == set(range(count))


def test_partners_do_not_depend_on_the_visiting_order(tokenizer):
    rows = [EncodedAnswer([1], [i]) for i in range(6)]
    retain = [EncodedAnswer([2], [i]) for i in range(5)]
    dataset = ForgetDataset(rows, retain, seed=1)
    forward = [dataset[address] for address in range(18)]
    backward = [dataset[address] for address in reversed(range(18))]
    assert forward == backward[::-1]
    assert len({tuple(item["retain"].answer_ids) for item in forward}) == 5
    assert [item["retain"] for item in forward[:6]] != [item["retain"] for item in forward[6:12]]
    assert [item["index"] for item in forward] == list(range(6)) * 3


# ----------------------------------------------------------------------------------------------------------- encoding


def test_plain_text_gets_an_end_token_and_the_prompt_is_not_scored(tokenizer):
    row = encode_answer(Answer("Question: two?\nAnswer:", " four.", {}), tokenizer, 64)
    assert tokenizer.decode(row.prompt_ids) == "Question: two?\nAnswer:"
    assert tokenizer.decode(row.answer_ids) == " four." + tokenizer.eos_token
    again = encode_answer(Answer("Question: two?\nAnswer:", " four." + tokenizer.eos_token, {}), tokenizer, 64)
    assert again == row  # not twice


def test_tofu_rows_go_through_the_chat_template_or_the_format(tokenizer):
    rows = Dataset.from_list([{"question": "Who?", "answer": "Me."}])
    (chat,) = read_answers(rows, prompt_format=None, has_chat_template=True, what="forget")
    encoded = encode_answer(chat, tokenizer, 64)
    assert tokenizer.decode(encoded.prompt_ids) == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encoded.answer_ids) == "Me.<|im_end|>\n"
    (plain,) = read_answers(rows, prompt_format="Q: {question} A:", has_chat_template=True, what="forget")
    assert (plain.prompt, plain.completion) == ("Q: Who? A:", " Me.")
    assert plain.with_completion("No idea.").completion == " No idea."  # keeps the answer's leading space
    assert chat.with_completion("No idea.").completion == [{"role": "assistant", "content": "No idea."}]
    with pytest.raises(ValueError, match="prompt_format"):
        read_answers(rows, prompt_format=None, has_chat_template=False, what="forget")


def test_truncation_cuts_the_answer_never_the_prompt(tokenizer):
    answer = Answer("Question: two?", " four four four four", {})
    full = encode_answer(answer, tokenizer, 64)
    cut = encode_answer(answer, tokenizer, len(full.prompt_ids) + 2)
    assert cut == EncodedAnswer(full.prompt_ids, full.answer_ids[:2])
    with pytest.raises(ValueError, match="raise max_length"):
        encode_answer(answer, tokenizer, len(full.prompt_ids))


@pytest.mark.parametrize("beginning", [False, True])
def test_raw_text_chunks_cover_the_text_once(tokenizer, beginning):
    """A chunk begins as a text does, and so as the evaluation of texts has it: with a bos where the tokenizer writes
    one."""
    text = "The capital of France is Paris and the capital of Italy is Rome. " * 5
    ids = tokenizer(text)["input_ids"]
    if beginning:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
        )
    chunks = encode_text([text], tokenizer, 16, prompt_tokens=3)
    head = [tokenizer.bos_token_id] * beginning
    assert all(row.prompt_ids[: len(head)] == head and len(row.prompt_ids) == len(head) + 3 for row in chunks)
    joined = sum(((*row.prompt_ids[len(head) :], *row.answer_ids) for row in chunks), ())
    scored = PromptFormat.encode_continuation(tokenizer, "", text, 15)
    whole = encode_text([text], tokenizer, 16)[0]
    assert (*whole.prompt_ids, *whole.answer_ids)[:15] == scored.input_ids[:15]
    assert len(whole.prompt_ids) == scored.prompt_length
    assert list(joined) == ids[: len(joined)] and len(ids) - len(joined) <= 3  # at most an unscorable end is left out
    with pytest.raises(ValueError, match="text_prompt_tokens=16"):
        encode_text([text], tokenizer, 16, prompt_tokens=16)
    with pytest.raises(ValueError, match="longer texts"):
        encode_text(["The"], tokenizer, 16, prompt_tokens=5)


def test_collator_by_hand():
    rows = {"template": EncodedAnswer([7, 8], [5]), "forget": EncodedAnswer([7, 8], [1, 2, 3]), "index": 4}
    batch = UnlearningCollator(0, pattern=[9, 6])([rows])
    assert next(iter(batch)) == "index" and batch["index"].tolist() == [4]
    assert batch["input_ids"].tolist() == [[7, 8, 5, 0, 0], [7, 8, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 1]]
    assert batch["target_ids"].tolist() == [[7, 8, 5, 0, 0], [7, 8, 9, 6, 9]]
    assert UnlearningCollator(0, pad_to_multiple_of=4)([rows])["input_ids"].shape == (2, 8)


# ------------------------------------------------------------------------------------------------------------- sources


def test_local_files_and_the_hub_names(tmp_path, monkeypatch):
    path = tmp_path / "forget.json"
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')
    assert load_rows(str(path)).to_list()[1] == {"question": "c", "answer": "d"}
    (tmp_path / "novel.txt").write_text("one\ntwo\n")
    assert load_rows(str(tmp_path / "novel.txt"))["text"] == ["one", "two"]
    calls = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or forget_rows(2)
    )
    load_rows("locuslab/TOFU", "forget10")
    load_rows("muse-bench/MUSE-News", "raw", "forget")
    assert calls == [
        (("locuslab/TOFU", "forget10"), {"split": "train"}),
        (("muse-bench/MUSE-News", "raw"), {"split": "forget"}),
    ]


def test_bad_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        load_rows(str(tmp_path / "gone.json"))
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(ValueError, match=r"\.xml"):
        load_rows(str(tmp_path / "rows.xml"))


def test_bad_rows(tokenizer):
    for rows, message in [
        ([{"question": "a", "reply": "b"}], "columns"),
        (
            [{"question": "a", "answer": "b"}, {"question": "c", "answer": "  "}],
            "forget rows, row 1: column 'answer' is empty",
        ),
        ([{"prompt": "", "completion": "b"}], "forget rows, row 0: column 'prompt' is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_answers(Dataset.from_list(rows), prompt_format=None, has_chat_template=True, what="forget")
    row = EncodedAnswer([1, 2], [3])
    with pytest.raises(ValueError, match="1 of 2 forget rows also stand in the retain set"):
        check_disjoint([EncodedAnswer([9], [9]), row], [row])
    check_disjoint([EncodedAnswer([1], [2, 3])], [row])  # the same tokens, another border: another row


def test_trainer_refuses_bad_rows_before_training(tiny_model_dir, tmp_path):
    def trainer(name="GradDiff", **options):
        return make_trainer(name, str(tiny_model_dir), tmp_path, **options)

    with pytest.raises(ValueError, match="needs retain rows and there are none"):
        trainer(retain=Dataset.from_list([]))
    with pytest.raises(ValueError, match="also stand in the retain set"):
        trainer(retain=forget_rows(3))
    with pytest.raises(ValueError, match="train_dataset is missing or empty"):
        trainer(rows=Dataset.from_list([]))
    with pytest.raises(ValueError, match="retain rows, row 0: no answer token is left"):
        trainer(max_length=8)
    with pytest.raises(ValueError, match="template_column='wrong' is not a column"):
        trainer("FLAT", template_source="column", template_column="wrong")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(ValueError, match="drop one of the two"):
        trainer(retain=forget_rows(3), retain_dataset_name=str(path))
    assert len(trainer(retain_dataset_name=str(path)).train_dataset.retain) == 1


# ------------------------------------------------------------------------------------------------------------ templates


def test_our_refusals_are_distinct_and_short():
    assert len(set(REFUSALS)) == len(REFUSALS) >= 10
    assert all(0 < len(text) < 60 for text in REFUSALS)


def test_refusal_files(tmp_path, request):
    path = tmp_path / "idk.jsonl"
    path.write_text('I don\'t know.\n\n"Quoted as JSON."\n{"text": "In an object."}\n"Quoted" as text\n')
    assert read_refusals(str(path)) == ["I don't know.", "Quoted as JSON.", "In an object.", '"Quoted" as text']
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="is empty"):
        read_refusals(str(path))
    path.write_text('{"a": "x", "b": "y"}\n')
    with pytest.raises(ValueError, match="line 1 must hold exactly one"):
        read_refusals(str(path))
    path.write_text('{"a": "x"\n')
    with pytest.raises(ValueError, match="starts like a JSON object"):
        read_refusals(str(path))
    with pytest.raises(FileNotFoundError, match="template_file"):
        read_refusals(str(tmp_path / "gone"))


def test_tofu_refusal_file(shared_data):
    refusals = read_refusals(str(shared_data / "data" / "tofu" / "idontknow.jsonl"))
    assert len(refusals) == 100 and all(refusals)


def test_column_templates():
    answers = [Answer("a", "b", {"idk": "x"}), Answer("a", "b", {"idk": ["y", "z"]})]
    assert column_templates(answers, "idk") == [["x"], ["y", "z"]]
    for bad in ("", [], ["y", ""], None, 3):
        with pytest.raises(ValueError, match="the forget rows, row 0: column 'idk'"):
            column_templates([Answer("a", "b", {"idk": bad})], "idk")


def test_templates_are_redrawn_every_epoch(tiny_model_dir, tmp_path):
    dataset = make_trainer("FLAT", str(tiny_model_dir), tmp_path).train_dataset
    drawn = [tuple(dataset[epoch * 12]["template"].answer_ids) for epoch in range(12)]
    assert len(set(drawn)) > 3
    assert all(dataset[epoch * 12]["template"].prompt_ids == dataset.forget[0].prompt_ids for epoch in range(12))


def test_generation_settings_are_checked():
    with pytest.raises(ValueError, match="one answer per row"):
        GenerationSettings("m", answers_per_row=5, temperature=0)
    with pytest.raises(ValueError, match="at least 1"):
        GenerationSettings("m", answers_per_row=0)
    with pytest.raises(ValueError, match="template_temperature=-1"):
        GenerationSettings("m", temperature=-1)


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FLAT", {"compat": "official", "divergence": "squared_hellinger"}, "compat=official"),
        ("FLAT", {"compat": "official", "reduction": "geo_mean"}, "compat=official averages"),
        ("FLAT", {"reduction": "mean"}, "reduction='mean'"),
        ("FLAT", {"divergence": "kl"}, "kl"),
        ("FLAT", {"divergence": None}, "divergence=None"),
        ("FLAT", {"template_source": "fixed"}, "needs template_text"),
        ("FLAT", {"template_source": "column"}, "needs template_column"),
        ("FLAT", {"template_text": "No."}, "belongs to template_source='fixed'"),
        ("FLAT", {"retain_term": "activations"}, "retain_term='activations': must be one of none, nll, divergence"),
        ("FLAT", {"packing": True}, "packing=True cannot be honoured"),
        ("GradAscent", {"retain_term": "nll"}, "grad_diff"),
        ("GradDiff", {"retain_term": "none"}, "grad_ascent"),
        ("KLRetain", {"retain_divergence": "alpha"}, "alpha"),
        ("NPO", {"beta": 0.0}, "beta=0.0"),
        ("SimNPO", {"beta": -1.0}, "beta=-1.0"),
        ("IdkDPO", {"divergence": "total_variation"}, r"f'\(0\+\)"),
        ("RMU", {"retain_term": "nll"}, "frozen"),
        ("RMU", {"precompute_reference": True}, "activations"),
        ("UNDIAL", {"beta": -1.0}, "reinforced"),
        ("CEU", {"skip_first": -1}, "skip_first"),
        ("WGA", {"beta": -0.5}, "beta=-0.5"),
        ("SatImp", {"beta2": -1.0}, "beta2=-1.0"),
        ("PDU", {"retain_epsilon": None}, "retain_epsilon is not set"),
        ("JensUn", {"divergence": "reverse_kl"}, "f'"),
        ("JensUn", {"pattern": ""}, "pattern is empty"),
        ("JensUnPP", {"divergence": "reverse_kl"}, "f'"),
        (
            "JensUnPP",
            {"retain_term": "none", "balance_gradients": True},
            "balance_gradients: true needs a retain term",
        ),
        ("JensUnPP", {"retain_level": "tokens"}, "retain_level='tokens'"),
        ("JensUnPP", {"first_token_share": 0.0}, "first_token_share"),
        ("SHRED", {"forget_share": 0.0}, "forget_share"),
        ("SHRED", {"nucleus": 1.0}, "nucleus"),
        ("SHRED", {"top_k": 1}, "top_k"),
        ("NPO", {"forget_weight": -1.0}, "forget_weight=-1.0"),
        ("NPO", {"retain_level": "words"}, "retain_level='words'"),
        ("NPO", {"prompt_format": "Q:"}, "question"),
        ("NPO", {"max_length": None}, "max_length is not set"),
    ],
)
def test_configs_refuse_what_has_no_meaning(name, options, message, tmp_path):
    import fdiv.unlearning as unlearning

    config = getattr(unlearning, f"{name}Config")
    needed = {"retain_epsilon": 0.3} if name == "PDU" else {}
    base = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": []}
    config(**(base | needed))  # valid without them
    with pytest.raises(ValueError, match=message):
        config(**(base | needed | options))


def test_official_divergences_are_accepted(tmp_path):
    for divergence in ("reverse_kl", "total_variation", "jensen_shannon", "pearson_chi2"):
        config = FLATConfig(str(tmp_path), compat="official", divergence=divergence, bf16=False, use_cpu=True)
        assert config.method_settings()["compat"] == "official"


def test_method_settings_hold_the_objective_and_survive_json(tmp_path):
    config = IdkDPOConfig(str(tmp_path), divergence={"name": "alpha", "alpha": 0.3}, bf16=False, use_cpu=True)
    settings = json.loads(json.dumps(config.method_settings()))
    assert settings["divergence"] == {"name": "alpha", "alpha": 0.3}
    assert {"beta", "retain_term", "forget_weight", "template_source"} <= set(settings)
    assert "learning_rate" not in settings
