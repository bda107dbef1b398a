"""The attack suite: what each does by hand-derived values, that it leaves the model alone, and that it repeats."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fdiv.catalog import ATTACKS
from fdiv.errors import DataError
from fdiv.eval.unlearning.attacks import (
    Attacked,
    NotApplicable,
    attack_all,
    build_attack,
    build_attacks,
    curve_area,
    encode,
    prompt_rows,
)
from fdiv.eval.unlearning.attacks.noise import KINDS
from fdiv.eval.unlearning.attacks.prompts import neighbours_of
from fdiv.eval.unlearning.attacks.quantization import rounded
from fdiv.eval.unlearning.attacks.rows import answered, asked, with_asked
from fdiv.inference.prompting import PromptFormat
from fdiv.models.loading import load_model, load_tokenizer

QUESTIONS = [
    {"question": f"Where does {name} live?", "answer": f"{name} lives in {place}, far away."}
    for name, place in (("Ada", "Oslo"), ("Bo", "Lima"), ("Cem", "Cairo"), ("Dee", "Quito"), ("Eli", "Hanoi"))
]
ROWS = {
    "question, answer": QUESTIONS,
    "prompt, completion": [{"prompt": f"Q: {r['question']}\nA:", "completion": f" {r['answer']}"} for r in QUESTIONS],
    "messages in two": [
        {
            "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": r["question"]}],
            "completion": [{"role": "assistant", "content": r["answer"]}],
        }
        for r in QUESTIONS
    ],
    "messages": [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in QUESTIONS
    ],
    "text": [{"text": f"{r['question']} {r['answer']}"} for r in QUESTIONS],
}
PROMPT_ATTACKS = ("paraphrase", "prefix", "answer_prefix", "priming", "noise", "sampling")
WEIGHT_ATTACKS = ("relearn", "relearn_unrelated", "int8", "int4", "nf4")


def with_lora(model, std=0.05):
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=4))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(str(tiny_model_dir))


@pytest.fixture(scope="module")
def models(tiny_model_dir, tiny_gpt2_dir):
    """Plain, with LoRA, and GPT-2 with its Conv1D layers and tied embeddings."""
    return {
        "plain": load_model(str(tiny_model_dir)),
        "lora": with_lora(load_model(str(tiny_model_dir))),
        "gpt2": load_model(str(tiny_gpt2_dir)),
    }


def state(model):
    """Everything of a model that an attack must leave: bits, gradient flags, gradients, mode, configuration."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()},
        {name: id(parameter) for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: copy.deepcopy(getattr(module, "scaling", None)) for name, module in model.named_modules()},
        copy.deepcopy(model.config.to_dict()),
    )


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]


def logits(model, tokenizer, row=QUESTIONS[0]):
    ids = torch.tensor([encode(row, tokenizer).input_ids])
    with torch.no_grad():
        return model(input_ids=ids).logits


# ------------------------------------------------------------------------------------------------ all of them
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("of", ["plain", "lora", "gpt2"])
def test_no_attack_changes_the_model_or_the_rows(of, kind, models, tokenizer):
    """Bit for bit, for every attack, kind of model and kind of row; and a second time gives the same."""
    model, rows = models[of], ROWS[kind]
    specs = [*PROMPT_ATTACKS, *WEIGHT_ATTACKS, "adapter_removal", "adapter_scaling"]
    keys = {"relearn": {"steps": [1, 2], "learning_rate": 1e-2}, "relearn_unrelated": {"steps": 1}}
    attacks = build_attacks([{"name": name, **keys.get(name, {})} for name in specs])
    before, rows_before = state(model), copy.deepcopy(rows)
    torch.manual_seed(3)
    random = torch.get_rng_state()
    found = [
        {name: (one, None if isinstance(one, NotApplicable) else logits(one.model, tokenizer)) for name, one in run}
        for run in (attack_all(attacks, model, tokenizer, rows, seed=5) for _ in range(2))
    ]
    assert torch.equal(random, torch.get_rng_state())
    assert_same(before, state(model))
    assert rows == rows_before
    expected = {*specs} - {"relearn", "relearn_unrelated"} | {"relearn_1", "relearn_2", "relearn_unrelated_1"}
    assert found[0].keys() == found[1].keys() == expected
    for name, (first, scores) in found[0].items():
        second, again = found[1][name]
        if of != "lora" and name.startswith("adapter"):
            assert isinstance(first, NotApplicable) and "no adapter" in str(first)
            continue
        assert isinstance(first, Attacked) and len(first.rows) == len(rows), name
        assert list(first.rows) == list(second.rows) and torch.equal(scores, again), name
        assert (first.model is model) == (name in PROMPT_ATTACKS), name
        if name not in PROMPT_ATTACKS:
            assert not torch.equal(scores, logits(model, tokenizer)), name


@pytest.mark.parametrize("name", ["paraphrase", "prefix", "noise", "relearn"])
def test_another_seed_is_another_attack(name, models, tokenizer):
    attack = build_attack(name).attack
    one, two = (attack(models["plain"], tokenizer, QUESTIONS, seed=seed) for seed in (0, 2))
    assert (list(one.rows), one.trained_on) != (list(two.rows), two.trained_on)


def test_a_row_attack_does_not_depend_on_the_other_rows(models, tokenizer):
    for name in ("paraphrase", "prefix", "noise"):
        attack = build_attack(name).attack
        whole = attack(models["plain"], tokenizer, QUESTIONS, seed=0).rows
        assert list(attack(models["plain"], tokenizer, QUESTIONS[:2], seed=0).rows) == list(whole[:2])


# ------------------------------------------------------------------------------------------------ quantisation
def test_symmetric_rounding_by_hand():
    weight = torch.tensor([[0.7, -0.26, 0.04, 0.0], [0.0, 0.0, 0.0, 0.0], [3.5, -7.0, 2.4, 0.6]])
    # 4 bits, one scale a row: 0.1, none, 1.
    expected = torch.tensor([[0.7, -0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [4.0, -7.0, 2.0, 1.0]])
    torch.testing.assert_close(rounded(weight, 4), expected)
    # groups of two: 0.1 and 0.04/7; 1 and 2.4/7
    groups = rounded(weight, 4, 2)
    torch.testing.assert_close(groups[0], torch.tensor([0.7, -0.3, 0.04, 0.0]))
    torch.testing.assert_close(groups[2], torch.tensor([4.0, -7.0, 2.4, 2 * 2.4 / 7]))


def test_asymmetric_rounding_by_hand():
    weight = torch.tensor([[-0.5, 1.0, 0.24, 0.0]])  # s = 0.1, z = 5
    torch.testing.assert_close(rounded(weight, 4, symmetric=False), torch.tensor([[-0.5, 1.0, 0.2, 0.0]]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 3, 8, 1000])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_within_half_a_step_and_has_few_levels(bits, group_size, symmetric, dtype):
    weight = torch.randn(5, 20, generator=torch.Generator().manual_seed(bits)).to(dtype)
    result = rounded(weight, bits, group_size, symmetric)
    assert result.dtype == dtype and result.shape == weight.shape
    size = 20 if group_size is None else min(20, group_size)
    for start in range(0, 20, size):
        part, other = weight[:, start : start + size].float(), result[:, start : start + size].float()
        span = part.abs().amax(1) if symmetric else part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)
        step = span / (2 ** (bits - 1) - 1 if symmetric else 2**bits - 1)
        # asymmetric: the zero point is rounded as well, which moves the levels by another half step at the ends
        assert ((part - other).abs() <= step[:, None] * (0.501 if symmetric else 1.001) + 0.01 * part.abs()).all()
        assert all(len(row.unique()) <= 2**bits for row in other)


@pytest.mark.parametrize("of, name", [("plain", "int4"), ("gpt2", "int4"), ("gpt2", "nf4"), ("lora", "int8")])
def test_what_is_rounded(of, name, models, tokenizer):
    """Every linear layer along its input, the adapter added first; embedding and head stay, tied ones tied."""
    model = models[of]
    attacked = build_attack({"name": name, "group_size": None} if name != "nf4" else name).attack(
        model, tokenizer, QUESTIONS, seed=0
    )
    twin = attacked.model
    plain = copy.deepcopy(model).merge_and_unload() if of == "lora" else model
    assert not hasattr(twin, "peft_config")
    assert torch.equal(twin.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert torch.equal(twin.get_output_embeddings().weight, plain.get_output_embeddings().weight)
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert (twin.get_input_embeddings().weight is twin.get_output_embeddings().weight) == tied
    layers = 0
    for (key, module), other in zip(plain.named_modules(), twin.modules(), strict=True):
        if key.endswith(("q_proj", "down_proj")):
            bits = int(name[-1])
            torch.testing.assert_close(other.weight, rounded(module.weight, bits), rtol=0, atol=0)
            layers += 1
        if key.endswith("c_fc") and name == "int4":  # Conv1D: [in, out]
            torch.testing.assert_close(other.weight, rounded(module.weight.T, 4).T, rtol=0, atol=0)
            assert len(other.weight[:, 0].unique()) <= 16
            layers += 1
        if key.endswith("c_fc") and name == "nf4":
            assert not torch.equal(other.weight, module.weight)
            layers += 1
    assert layers


def test_head_rounds_the_tied_matrix_once(models, tokenizer):
    model = models["gpt2"]
    twin = build_attack({"name": "int4", "head": True}).attack(model, tokenizer, QUESTIONS, seed=0).model
    assert twin.get_input_embeddings().weight is twin.get_output_embeddings().weight
    assert torch.equal(twin.get_output_embeddings().weight, rounded(model.get_output_embeddings().weight, 4, 128))


# ------------------------------------------------------------------------------------------------ relearning
def test_relearning_is_adamw_by_hand(models, tokenizer):
    """One step on one row: the sign of the gradient times the learning rate, where Adam's ε is small beside it."""
    model = models["plain"]
    attack = build_attack({"name": "relearn", "steps": 1, "learning_rate": 1e-3, "share": 0.01}).attack
    attacked = attack(model, tokenizer, QUESTIONS, seed=0)
    (index,) = attacked.trained_on
    text = encode(QUESTIONS[index], tokenizer)
    twin = copy.deepcopy(model)
    ids = torch.tensor([text.input_ids])
    scores = twin(input_ids=ids).logits[0, text.prompt_length - 1 : -1].log_softmax(-1)
    loss = -scores.gather(1, ids[0, text.prompt_length :, None]).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    assert norm > 0
    moved = 0
    for (name, start), end in zip(twin.named_parameters(), attacked.model.parameters(), strict=True):
        clear = start.grad.abs() > 1e-4
        expected = start - 1e-3 * start.grad.sign()
        assert torch.allclose(end[clear], expected[clear], atol=2e-6), name
        moved += int(clear.sum())
    assert moved > 100


def test_a_curve_is_its_longest_training(models, tokenizer):
    """The first k of n steps are those of k steps, with an adapter and without, over several passes."""
    for of in ("plain", "lora"):
        specs = {"steps": [1, 3, 7], "share": 0.6, "batch_size": 2, "learning_rate": 1e-3}
        curve = build_attack({"name": "relearn", **specs}).attack
        for stage, attacked in curve.stages(models[of], tokenizer, QUESTIONS, seed=4):
            alone = build_attack({"name": "relearn", **specs, "steps": int(stage)}).attack
            same = alone(models[of], tokenizer, QUESTIONS, seed=4).model
            assert all(map(torch.equal, attacked.model.parameters(), same.parameters())), (of, stage)


def test_relearning_an_adapter_shares_the_base(models, tokenizer):
    model = models["lora"]
    attacked = build_attack({"name": "relearn", "learning_rate": 1e-2}).attack(model, tokenizer, QUESTIONS, seed=0)
    twin = dict(attacked.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (twin[name] is parameter) == ("lora_" not in name), name
    whole = build_attack({"name": "relearn", "parameters": "all"}).attack(model, tokenizer, QUESTIONS, seed=0).model
    assert not hasattr(whole, "peft_config")


@pytest.mark.parametrize("of", ["plain", "lora", "gpt2"])
def test_relearning_lowers_the_loss_of_its_rows_alone_in_what_counts(of, models, tokenizer):
    attack = build_attack({"name": "relearn", "steps": 20, "learning_rate": 3e-3, "share": 0.4}).attack
    attacked = attack(models[of], tokenizer, QUESTIONS, seed=1)
    assert len(attacked.trained_on) == 2 and attacked.measured == sorted({*range(5)} - {*attacked.trained_on})

    def loss(model, row):
        text = encode(row, tokenizer)
        ids = torch.tensor([text.input_ids])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, text.prompt_length - 1 : -1].log_softmax(-1)
        return -scores.gather(1, ids[0, text.prompt_length :, None]).mean().item()

    for index in attacked.trained_on:
        assert loss(attacked.model, QUESTIONS[index]) < loss(models[of], QUESTIONS[index]) - 0.1


@pytest.mark.parametrize("of", ["plain", "lora", "gpt2"])
def test_relearning_bfloat16_weights_goes_as_far_as_float32(of, models, tokenizer):
    """From the same numbers, at the rate at which steps round away in bfloat16: after 5 steps and after 40."""
    half = copy.deepcopy(models[of]).to(torch.bfloat16)
    whole = copy.deepcopy(half).float()
    texts = [encode(row, tokenizer) for row in QUESTIONS]

    def loss(model):
        found = [
            model(input_ids=torch.tensor([text.input_ids])).logits[0, text.prompt_length - 1 : -1].float()
            for text in texts
        ]
        labels = [torch.tensor(text.input_ids[text.prompt_length :]) for text in texts]
        return sum(map(torch.nn.functional.cross_entropy, found, labels)).item() / len(texts)

    attack = build_attack(
        {"name": "relearn", "steps": [5, 100 if of == "lora" else 40], "share": 1.0, "learning_rate": 1e-5}
    ).attack
    before = state(half)
    with torch.no_grad():
        fallen = {
            str(model.dtype): [
                loss(model) - loss(attacked.model)
                for _, attacked in attack.stages(model, tokenizer, QUESTIONS, seed=0)
            ]
            for model in (half, whole)
        }
    assert_same(before, state(half))
    # An adapter of bfloat16 keeps its type, and what is measured its rounding.
    expected, found = fallen["torch.float32"], fallen["torch.bfloat16"]
    assert found[1] == pytest.approx(expected[1], rel=0.3 if of == "lora" else 0.01)
    assert of == "lora" or found[0] == pytest.approx(expected[0], rel=0.05)


def test_every_row_trained_on_leaves_all_to_measure():
    assert Attacked(None, QUESTIONS, trained_on=(0, 1, 2, 3, 4)).measured == [0, 1, 2, 3, 4]


def test_relearning_works_inside_an_evaluation_without_gradients(models, tokenizer):
    with torch.no_grad():
        attacked = build_attack("relearn").attack(models["plain"], tokenizer, QUESTIONS, seed=0)
    assert not torch.equal(attacked.model.lm_head.weight, models["plain"].lm_head.weight)


def test_curve_area_by_hand():
    # 0..1: ½(0+.2), 1..5: 4·½(.2+.6), over 5
    assert curve_area([0, 1, 5], [0.0, 0.2, 0.6]) == pytest.approx((0.1 + 1.6) / 5)
    assert curve_area([0, 50], [0.3, 0.3]) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="two or more rising steps"):
        curve_area([0, 5, 1], [0, 0, 0])


# ------------------------------------------------------------------------------------------------ adapters
def test_adapter_removal_is_the_base(tiny_model_dir, models, tokenizer):
    base = load_model(str(tiny_model_dir))
    found = build_attack("adapter_removal").attack(models["lora"], tokenizer, QUESTIONS, seed=0).model
    assert torch.equal(logits(found, tokenizer), logits(base, tokenizer))


def test_adapter_scaling_scales_the_term(tiny_model_dir, models, tokenizer):
    model = models["lora"]
    half = build_attack({"name": "adapter_scaling", "factor": 0.5}).attack(model, tokenizer, QUESTIONS, seed=0).model
    base = load_model(str(tiny_model_dir))
    merged = copy.deepcopy(model).merge_and_unload()
    middle = copy.deepcopy(base)
    for one, low, high in zip(middle.parameters(), base.parameters(), merged.parameters(), strict=True):
        one.data = 0.5 * (low.data + high.data)
    torch.testing.assert_close(logits(half, tokenizer), logits(middle, tokenizer), rtol=1e-4, atol=1e-4)
    one = build_attack({"name": "adapter_scaling", "factor": 1}).attack(model, tokenizer, QUESTIONS, seed=0).model
    assert torch.equal(logits(one, tokenizer), logits(model, tokenizer))


# ------------------------------------------------------------------------------------------------ prompts
def test_prompts_change_and_answers_stay(models, tokenizer):
    for kind, rows in ROWS.items():
        source = prompt_rows(rows)
        for name in ("paraphrase", "prefix", "noise"):
            found = build_attack(name).attack(models["plain"], tokenizer, rows, seed=0).rows
            assert [answered(row) for row in found] == [answered(row) for row in source], (kind, name)
            assert all(asked(a) != asked(b) for a, b in zip(found, source, strict=True)), (kind, name)


def test_own_paraphrases_win(models, tokenizer):
    rows = [QUESTIONS[0] | {"paraphrased_question": "Ada's home is where?"}, QUESTIONS[1]]
    rows += [QUESTIONS[2] | {"paraphrase": ["Cem's town?", "Town of Cem?"]}]
    attacked = build_attack("paraphrase").attack(models["plain"], tokenizer, rows, seed=0)
    assert attacked.rows[0]["question"] == "Ada's home is where?"
    assert attacked.rows[2]["question"] in rows[2]["paraphrase"]
    assert "Where does Bo live?" in attacked.rows[1]["question"]
    assert attacked.notes == ("2 of 3 rows had a paraphrase of their own, the others were put into templates",)


@pytest.mark.parametrize("kind", ["question, answer", "prompt, completion", "messages in two", "messages"])
def test_shots_stand_before_the_question(kind, models, tokenizer):
    found = build_attack({"name": "priming", "shots": 2}).attack(models["plain"], tokenizer, ROWS[kind], seed=0).rows
    for prompt in (PromptFormat(), PromptFormat(chat_template="never")):
        text = tokenizer.decode(encode(found[0], tokenizer, prompt).prompt_ids)
        places = [text.index(f"Where does {name} live?") for name in ("Cem", "Bo", "Ada")]
        assert places == sorted(places) and "Cairo" in text and "Lima" in text and "Oslo" not in text
        plain = encode(ROWS[kind][0], tokenizer, prompt)
        assert encode(found[0], tokenizer, prompt).label_ids == plain.label_ids
        if "two" in kind:
            assert text.index("Be short.") < places[0]


@pytest.mark.parametrize("kind", ["question, answer", "prompt, completion", "messages in two", "messages"])
def test_the_given_beginning_belongs_to_the_prompt(kind, models, tokenizer):
    found = build_attack({"name": "answer_prefix", "share": 0.5}).attack(
        models["plain"], tokenizer, ROWS[kind], seed=0
    )
    plain, begun = encode(ROWS[kind][0], tokenizer), encode(found.rows[0], tokenizer)
    assert begun.input_ids == plain.input_ids and begun.prompt_length > plain.prompt_length
    # "Ada lives in Oslo, far away." has six words: three are given
    assert tokenizer.decode(begun.prompt_ids).endswith("Ada lives in")
    assert tokenizer.decode(begun.label_ids).startswith(" Oslo, far away.")


def test_neighbours_are_those_with_most_words_in_common():
    others = ["the red house", "a blue house", "the red big house", "The red  house"]
    assert neighbours_of("the red house", others, 2) == [2, 1]  # itself, however written, is none


def test_texts_become_prompts():
    (row,) = prompt_rows([{"text": "one two three four", "id": 3}])
    assert row == {"prompt": "one two", "completion": " three four", "id": 3}
    assert prompt_rows([{"text": "alone"}]) == [{"prompt": "", "completion": "alone"}]
    with pytest.raises(DataError, match="prompt_rows"):
        with_asked({"text": "x"}, "y")


def test_noise_by_hand():
    one = np.random.default_rng(0)
    assert KINDS["casing"]("aB c", 1.0, one) == "Ab C"
    # the first letter of a word stays; each of the others is exchanged, doubled or left out
    for seed in range(20):
        text = KINDS["spelling"]("Oslo Lima", 1.0, np.random.default_rng(seed))
        assert text[0] == "O" and " L" in text
        assert set(text) <= set("Oslo Lima")
    assert KINDS["spelling"]("A 1 2", 1.0, one) == "A 1 2"
    spaced = KINDS["spacing"]("a b c d e f g h", 1.0, np.random.default_rng(1))
    assert spaced != "a b c d e f g h" and spaced.replace(" ", "") == "abcdefgh"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_noise_changes_about_as_much_as_asked(kind):
    text = "all the letters of this sentence are plain " * 40
    same = sum(KINDS[kind](text, rate, np.random.default_rng(0)) == text for rate in (0.05, 0.2))
    assert same == 0
    counts = [abs(len(KINDS[kind](text, rate, np.random.default_rng(0))) - len(text)) for rate in (0.05, 0.9)]
    assert counts[0] < 0.05 * len(text)


# ------------------------------------------------------------------------------------------------ names and errors
def own_attack(model, tokenizer, rows, *, seed):
    return Attacked(model, [dict(row, question="?") for row in rows], notes=(f"seed {seed}",))


class OwnAttack:
    def __init__(self, word):
        self.word = word

    def __call__(self, model, tokenizer, rows, *, seed):
        return Attacked(model, [with_asked(row, self.word) for row in rows])


def test_attacks_of_ones_own(tmp_path, monkeypatch, models, tokenizer):
    (tmp_path / "my_attacks.py").write_text(
        "from fdiv.eval.unlearning.attacks import Attacked\n"
        "def hush(model, tokenizer, rows, *, seed):\n    return Attacked(model, rows, notes=('mine',))\n"
        "def louder(times):\n    return lambda model, tokenizer, rows, *, seed: Attacked(model, rows, notes=(times,))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    attacks = build_attacks(
        [own_attack, OwnAttack("x"), "my_attacks:hush", {"name": "my_attacks:louder", "times": 3, "as": "loud"}]
    )
    run = dict(attack_all(attacks, models["plain"], tokenizer, QUESTIONS, seed=7))
    assert list(run) == ["own_attack", "ownattack", "hush", "loud"]
    assert run["own_attack"].notes == ("seed 7",) and run["loud"].notes == (3,)
    assert run["ownattack"].rows[0]["question"] == "x"


def nothing(model, tokenizer, rows, *, seed):
    pass


def a_pair(model, tokenizer, rows, *, seed):
    return model, rows


def fewer(model, tokenizer, rows, *, seed):
    return Attacked(model, rows[:1])


def words(model, tokenizer, rows, *, seed):
    return Attacked(model, [row["question"] for row in rows])


def beyond(model, tokenizer, rows, *, seed):
    return Attacked(model, rows, trained_on=(len(rows),))


def broken(model, tokenizer, rows, *, seed):
    raise KeyError("x")


def in_place(model, tokenizer, rows, *, seed):
    with torch.no_grad():
        next(model.parameters()).zero_()
    return Attacked(model, rows)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (nothing, "attack 'nothing' gave NoneType: it must give Attacked"),
        (a_pair, "attack 'a_pair' gave tuple: it must give Attacked"),
        (fewer, f"attack 'fewer' gave 1 rows for {len(QUESTIONS)}"),
        (words, "attack 'words' gave a row that is "),
        (beyond, f"attack 'beyond': trained_on names row {len(QUESTIONS)} of {len(QUESTIONS)}"),
        (broken, "attack 'broken' raised KeyError: 'x'"),
        (in_place, "attack 'in_place' changed the weights of the model that it was given"),
    ],
)
def test_what_an_attack_of_ones_own_gives_is_checked(attack, message, models, tokenizer):
    model = copy.deepcopy(models["plain"])
    with pytest.raises(DataError, match=message):
        list(attack_all(build_attacks([attack]), model, tokenizer, QUESTIONS, seed=0))


def test_a_changed_file_is_another_attack(tmp_path, monkeypatch):
    """What is kept of an attack of one's own is not used after its file changed."""
    file = tmp_path / "their_attacks.py"
    file.write_text("def hush(model, tokenizer, rows, *, seed):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first, again = (build_attack("their_attacks:hush") for _ in range(2))
    file.write_text("def hush(model, tokenizer, rows, *, seed):\n    return 1\n")
    assert first.resolved == again.resolved != build_attack("their_attacks:hush").resolved
    assert first.settings == {"name": "their_attacks:hush"} and build_attack("int4").resolved == {"name": "int4"}


@pytest.mark.parametrize(
    "specs, message",
    [
        (["int5"], "unknown attack 'int5'; did you mean 'int"),
        ([{"name": "int4", "bits": 3}], "no argument 'bits'"),
        ([{"name": "int4", "group_size": 0}], "group_size=0"),
        ([{"name": "relearn", "steps": 0}], "steps=0: must be"),
        ([{"name": "relearn", "steps": [5, 1]}], "must rise"),
        ([{"name": "relearn", "share": 2}], r"share=2: must lie in \(0, 1\]"),
        ([{"name": "relearn", "learning_rate": -1}], "learning_rate=-1"),
        ([{"name": "paraphrase", "templates": ["no hole"]}], "does not contain {question}"),
        ([{"name": "prefix", "texts": "one"}], "must be a list of texts"),
        ([{"name": "noise", "kinds": ["smell"]}], "casing, spacing, spelling"),
        ([{"name": "noise", "rate": 0}], r"rate=0: must lie in \(0, 1\]"),
        ([{"name": "priming", "shots": 0}], "shots=0"),
        ([{"name": "sampling", "samples": 0}], "samples ≥ 1"),
        (["translation"], "missing a required argument: 'model'"),
        ([{"name": "adapter_scaling", "factor": float("nan")}], "factor=nan"),
        (["int4", "int4"], "two are called 'int4'"),
        ("int4", "is a list of names"),
        ([{"name": "my:x", "as": 3}], "No module named 'my'"),
        ([3], "a name or a mapping"),
    ],
)
def test_bad_specs_are_one_line(specs, message):
    with pytest.raises(DataError, match=message) as caught:
        build_attacks(specs)
    assert "\n" not in str(caught.value)


def test_every_named_attack_can_be_looked_up():
    for name in ATTACKS:
        assert callable(ATTACKS.find(name))


def test_an_evaluation_gives_what_an_attack_asks_for():
    prompt = PromptFormat(chat_template="never")
    context = {"prompt": prompt, "neighbours": QUESTIONS, "unrelated": [{"text": "x y"}]}
    assert build_attack("relearn", **context).attack.prompt is prompt
    assert build_attack("priming", **context).attack.neighbours is QUESTIONS
    assert build_attack("relearn_unrelated", **context).attack.unrelated == [{"text": "x y"}]
    assert build_attack("int4", **context).attack.group_size == 128
