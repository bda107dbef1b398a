"""What `fdiv unlearn` sets and builds: defaults of every method, rows held back, the time plan, the rule that stops."""

import json
from types import SimpleNamespace

import pytest

from fdiv.errors import DataError, RecipeError
from fdiv.eval.unlearning.attacks.rows import encode
from fdiv.eval.unlearning.general import GENERAL_QUESTIONS
from fdiv.models.loading import load_tokenizer
from fdiv.unlearning.request import defaults, estimate
from fdiv.unlearning.request.builder import OwnRowsConfig, held_out
from fdiv.unlearning.request.recipe import Request, look, recipe_of
from tests.support.unlearned import FORGET, RETAIN, rows_of, write


@pytest.mark.parametrize("name", sorted(defaults.unlearning_methods()))
@pytest.mark.parametrize("retain", [True, False])
def test_every_method_has_defaults_that_its_config_takes(name, retain):
    """With retain rows a retain term; without, none, or a refusal that names the methods that can."""
    trainer = defaults.unlearning_methods()[name]
    choices = defaults.retain_choices(trainer)
    if not retain and "none" not in choices:
        with pytest.raises(RecipeError, match=f"--method {name} needs rows to keep"):
            defaults.method_keys(name, retain, 30)
        return
    keys = defaults.method_keys(name, retain, 30)
    config = trainer.config_class("out", bf16=False, use_cpu=True, **keys)
    assert config.retain_term == keys["retain_term"] and 1e-5 < config.learning_rate < 1e-2
    if retain and len(set(choices) - {"none"}):
        assert keys["retain_term"] != "none"
    if name == "rmu":
        assert config.layer == 12 and defaults.method_keys("rmu", retain, 2)["layer"] == 0


def test_the_default_method_can_do_without_retain_rows():
    assert defaults.method_keys(defaults.DEFAULT_METHOD, False, 4)["retain_term"] == "none"
    with pytest.raises(RecipeError, match="--method f_dpo: not a method that unlearns; those are alt_po, ce_u"):
        defaults.method_keys("f_dpo", True, 4)


def test_an_unknown_method_is_answered_with_those_that_unlearn():
    with pytest.raises(RecipeError, match="--method: unknown method 'simpno'; did you mean 'simnpo'"):
        defaults.method_keys("simpno", True, 4)
    with pytest.raises(RecipeError, match="--method: unknown method 'nope'; there are: alt_po, ce_u, flat") as raised:
        defaults.method_keys("nope", True, 4)
    assert "d2o" not in str(raised.value) and "f_dpo" not in str(raised.value)
    with pytest.raises(RecipeError, match="--method d2o: not a method that unlearns; those are alt_po, ce_u, flat"):
        defaults.method_keys("d2o", True, 4)


@pytest.mark.parametrize(("rows", "batch", "epochs"), [(40, 4, 5), (400, 4, 5), (8, 4, 25), (6, 4, 25), (1, 1, 50)])
def test_few_rows_get_as_many_epochs_as_make_fifty_steps(rows, batch, epochs):
    assert defaults.length_keys(rows, batch) == {"num_train_epochs": epochs}


@pytest.mark.parametrize(("count", "apart"), [(0, 0), (9, 0), (10, 2), (40, 8), (1000, 50)])
def test_rows_held_back(count, apart):
    assert held_out(count) == apart


def test_a_build_is_files_with_one_set_of_columns(tmp_path):
    (tmp_path / "build").mkdir()
    write(tmp_path / "forget.jsonl", [{**FORGET[0], "secret": "Porto"}, FORGET[1]])
    write(tmp_path / "retain.jsonl", rows_of(tuple(f"Person {n}" for n in range(10))))
    write(tmp_path / "words.jsonl", [{"question": "Tell me"}, {"question": "Say"}])
    config = OwnRowsConfig(
        forget=str(tmp_path / "forget.jsonl"),
        retain=str(tmp_path / "retain.jsonl"),
        paraphrases=str(tmp_path / "words.jsonl"),
    )
    keys = config.build(tmp_path / "build")
    read = {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in (tmp_path / "build").glob("*.jsonl")
    }
    assert set(read) == {"forget", "retain", "neighbours"} and set(keys) == {"dataset_name", "retain_dataset_name"}
    assert read["forget"][0] == {**FORGET[0], "secret": ["Porto"], "paraphrase": ["Tell me"]}
    assert (len(read["retain"]), len(read["neighbours"])) == (16, 4)
    assert not {row["question"] for row in read["retain"]} & {row["question"] for row in read["neighbours"]}


@pytest.mark.parametrize("name", ["neighbours", "holdout"])
def test_what_is_measured_is_not_trained_on(name, tmp_path):
    for file, rows in (("forget", FORGET), ("retain", RETAIN), (name, [RETAIN[3]])):
        write(tmp_path / f"{file}.jsonl", rows)
    files = {file: str(tmp_path / f"{file}.jsonl") for file in ("forget", "retain", name)}
    message = rf"1 of 1 {name} rows also stand in the retain rows \(first: .*{name}\.jsonl, line 1"
    with pytest.raises(DataError, match=message):
        OwnRowsConfig(**files).read()


def test_a_request_of_rows_needs_its_file():
    for keys, message in (
        ({}, "prepare.forget is not set"),
        ({"forget": "x", "sample_retain": -1}, "must be at least 0"),
        ({"forget": "x", "sample_retain": 2}, "needs prepare.model"),
    ):
        with pytest.raises(ValueError, match=message):
            OwnRowsConfig(**keys)


@pytest.fixture(scope="module")
def looked(known_models):
    rows = {"forget": str(known_models / "forget.jsonl"), "retain": str(known_models / "retain.jsonl")}
    request = Request(str(known_models / "model"), rows, "out", "npo")
    return request, look(request)


def test_the_recipe_bounds_rows_by_the_longest(looked, known_models):
    request, found = looked
    keys = recipe_of(request, found)
    longest = found.longest("forget", "retain")
    assert longest <= keys["max_length"] < longest + 8 and keys["max_length"] % 8 == 0
    assert keys["eval"]["forget"] == keys["epoch_evaluation"]["forget"] == "${prepare}/forget.jsonl"
    assert "neighbours" not in keys["eval"] and "prompt_format" not in keys  # six retain rows; a chat template
    assert keys["prepare"]["forget"] == str(known_models / "forget.jsonl") and keys["per_device_train_batch_size"] == 4


def test_no_text_is_too_short_to_be_trained_on(known_models, tmp_path):
    """The prompt of running text is at most half of the shortest: none is left without a token that is scored."""
    model, long = str(known_models / "model"), "Ann Lee lives in Porto and works as a baker. " * 20
    tokenizer = load_tokenizer(model)
    for texts, expected in (
        ([long], 16),
        ([long, "Ann Lee lives."], len(tokenizer("Ann Lee lives.")["input_ids"]) // 2),
    ):
        write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
        request = Request(model, {"forget": str(tmp_path / "texts.jsonl")}, str(tmp_path / "out"), "npo")
        assert recipe_of(request, look(request))["text_prompt_tokens"] == expected < 17


@pytest.mark.parametrize(("words", "expected"), [(1, None), (5, None), (400, 256)])
def test_the_recipe_has_room_for_sampled_rows(words, expected, known_models, tmp_path):
    """The longest question of the file, its answer's frame, and 128 tokens of an answer; at most the context."""
    write(tmp_path / "asked.jsonl", [{"question": "Who?"}, {"question": "Who is it " * words}])
    rows = {"forget": str(known_models / "forget.jsonl")}
    request = Request(
        str(known_models / "model"), rows, "out", "npo", sample_retain=3, questions=str(tmp_path / "asked.jsonl")
    )
    tokenizer = load_tokenizer(str(known_models / "model"))
    longest = len(encode({"question": "Who is it " * words, "answer": "A"}, tokenizer).input_ids) + 128
    assert recipe_of(request, look(request))["max_length"] == (expected or -(-longest // 8) * 8)


def test_the_recipe_has_room_for_questions_that_are_not_written_yet(known_models):
    """300 characters of a forget row's question, and 128 tokens of an answer, in a context of 256."""
    rows = {"forget": str(known_models / "forget.jsonl")}
    plain = Request(str(known_models / "model"), rows, "out", "npo", sample_retain=3, prompt_format="{question}")
    tokenizer = load_tokenizer(str(known_models / "model"))
    general = [encode({"question": text, "answer": "A"}, tokenizer, plain.prompt()) for text in GENERAL_QUESTIONS]
    assert look(plain).sampled == 128 + max(len(text.input_ids) for text in general)
    found = look(Request(plain.model, rows, "out", "npo", sample_retain=3))
    texts = [(f"{row['question']} " * 20)[:300] for row in FORGET]
    longest = max(len(encode({"question": text, "answer": "A"}, tokenizer).input_ids) for text in texts)
    assert found.sampled == 128 + longest and look(Request(plain.model, rows, "out", "npo")).sampled == 0


def test_the_time_plan_by_hand(looked):
    """1,000 weights, 10^6 operations and 10^9 bytes a second: every part from the counted tokens."""
    request, found = looked
    request = Request(request.model, request.rows, "out", "npo", measures={"samples": 0, "profile": "cheap"})
    forget, other = found.tokens("forget"), 600
    per_token = 2 * 1000 / (0.6 * 1e6)
    plan = estimate.estimate(request, found, estimate.Speed(1e6, 1e9), 1000, 3)
    scoring = (2 * forget + other) * per_token
    assert plan["before"] == pytest.approx(scoring + forget * per_token) and plan["after"] == pytest.approx(scoring)
    # Forget and retain rows: forward and back (4 of 2), and the reference's forward.
    assert plan["training, 3 epochs"] == pytest.approx(3 * (2 * forget * 3 * per_token + scoring))
    assert plan["attacks"] == 0 and plan["sum"] == pytest.approx(sum(plan.values()) - plan["sum"])
    quick = estimate.estimate(
        Request(request.model, request.rows, "out", "npo"), found, estimate.Speed(1e6, 1e9), 1000, 3
    )
    assert quick["attacks"] > 0 and quick["before"] > plan["before"]
    speed = estimate.measured_speed(0.02)
    assert speed.operations > 1e8 and speed.bytes > 1e8
    from fdiv.models.loading import load_model

    loaded = load_model(request.model)
    assert estimate.parameter_count(request.model) == sum(p.numel() for p in loaded.parameters())


# ---------------------------------------------------------------- the rule
def evaluated(callback, value, step=5, greater=True, metric="selection"):
    control = SimpleNamespace(should_training_stop=False)
    args = SimpleNamespace(metric_for_best_model=metric, greater_is_better=greater)
    callback.on_evaluate(args, SimpleNamespace(global_step=step), control, metrics={"eval_selection": value})
    return control.should_training_stop


def test_a_run_stops_where_its_metric_reaches_the_value():
    from fdiv.training.evaluation import _StopAt

    stop = _StopAt(0.9)
    assert evaluated(stop, 0.9) and evaluated(stop, 1.0) and not evaluated(stop, 0.89)
    assert not evaluated(stop, 1.0, step=0)  # before the first step there was nothing to stop
    assert evaluated(stop, 0.3, greater=False) and not evaluated(stop, 0.95, greater=False)
    assert evaluated(stop, 0.95, metric="eval_selection") and not evaluated(stop, 0.95, metric="other")


def test_a_run_that_had_stopped_is_not_gone_on_with():
    from fdiv.training.evaluation import _StopAt

    def stops(*entries, step=10):
        control = SimpleNamespace(should_training_stop=False)
        args = SimpleNamespace(metric_for_best_model="selection", greater_is_better=True)
        _StopAt(0.9).on_train_begin(args, SimpleNamespace(global_step=step, log_history=list(entries)), control)
        return control.should_training_stop

    assert stops({"step": 5, "eval_selection": 0.5}, {"step": 10, "eval_selection": 0.95})
    assert not stops(
        {"step": 0, "eval_selection": 0.95}, {"step": 10, "eval_selection": 0.5}, {"step": 9, "loss": 1.0}
    )
    assert not stops(step=0)
    # The private hook that makes no further step then.
    import inspect

    from transformers import Trainer

    loop = inspect.getsource(Trainer._inner_training_loop)
    assert loop.index("on_train_begin") < loop.index("self._run_epoch(") < loop.index("should_training_stop")


def test_stop_at_needs_a_metric(tmp_path):
    from fdiv.unlearning import NPOConfig

    with pytest.raises(ValueError, match="stop_at=0.9 needs metric_for_best_model"):
        NPOConfig(str(tmp_path), bf16=False, use_cpu=True, stop_at=0.9)


def test_the_selection_on_rows_of_ones_own(monkeypatch):
    """`forgotten` where `kept` is at its floor, else how far below; larger is better."""
    from fdiv.unlearning import selection

    found = {}
    monkeypatch.setattr(selection, "evaluated", lambda trainer, evaluation: dict(found))
    history = [{"eval_kept": 0.5}]
    args = SimpleNamespace(selection_by=None, utility_floor=0.9, metric_for_best_model="selection")
    trainer = SimpleNamespace(args=args, state=SimpleNamespace(log_history=history))
    for forgotten, kept, expected in ((0.8, 0.46, 0.8), (0.8, 0.36, 0.36 / 0.45 - 1), (0.2, 0.6, 0.2)):
        found.update(forgotten=forgotten, kept=kept)
        assert selection.evaluate_epoch(trainer, None)["eval_selection"] == pytest.approx(expected)
