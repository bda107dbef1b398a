"""Empty places: what a removed row leaves behind in a batch, in the loss and in the log."""

import pytest
import torch
from datasets import Dataset

from fdiv.training.places import EMPTY, Places, RowNumbers, _Collate, _Numbered, held_rows, with_empty_places
from tests.support.runs import all_trainers, f_distill, f_dpo, unlearning

SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}


def weights(trainer):
    return torch.cat([parameter.detach().flatten().clone() for parameter in trainer.model.parameters()])


def removed(trainer, *numbers):
    trainer.places = Places(trainer.rows_at(), {"train": frozenset(numbers)}, {"train": [f"d{n}" for n in range(99)]})
    return trainer


# ---------------------------------------------------------------- places
def test_a_place_is_empty_where_any_of_its_rows_is_removed():
    pairs = {0: [("train", 5), ("retain", 1)], 1: [("train", 6), ("retain", 2)], 2: [("train", 7), ("retain", 1)]}
    digests = {"train": list("abcdefgh"), "retain": list("xyz")}
    places = Places(pairs.__getitem__, {"train": frozenset({6}), "retain": frozenset({1})}, digests)
    assert [places.is_empty(n) for n in range(3)] == [True, True, True]
    places = Places(pairs.__getitem__, {"retain": frozenset({2})}, digests)
    places.note([0, 1])
    places.note([2])
    assert places.taken() == [["f", "y", None], ["h", "y"]]
    assert places.taken() == []
    assert places.removes
    assert not Places(RowNumbers(), {"train": frozenset()}).removes


def test_row_numbers_follow_the_rows_that_were_kept():
    assert RowNumbers()(3) == (("train", 3),)
    assert RowNumbers([0, 2, 5])(2) == (("train", 5),)


def test_the_collator_sees_the_rows_that_are_there_and_nothing_of_the_others():
    seen = []

    def collate(items):
        seen.extend(items)
        return {"sum": torch.tensor(sum(items))}

    rows = _Numbered([10, 20, 30, 40])
    batch = _Collate(collate, {1, 2}.__contains__)(rows.__getitems__([0, 1, 3]))
    assert seen == [10, 40]
    assert (batch["sum"].item(), batch["fdiv_place"].tolist(), batch[EMPTY].tolist()) == (
        50,
        [0, 1, 3],
        [False, True, False],
    )
    assert _Collate(collate, lambda _: True)([rows[2]]) == [{"fdiv_place": 2, EMPTY: True}]
    # A trainer that samples takes its rows as a list.
    rows = _Numbered(Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]))
    made = _Collate(list, {0}.__contains__)(rows.__getitems__([1, 0, 1]))
    assert made == [{"prompt": "b", "fdiv_place": 1}, {"fdiv_place": 0, EMPTY: True}, {"prompt": "b", "fdiv_place": 1}]
    assert held_rows(made) == [made[0], made[2]]


def test_blank_rows_stand_in_empty_places():
    batch = {
        "prompt_ids": torch.tensor([[0, 5], [6, 7]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[8], [9]]),
        "completion_mask": torch.tensor([[1], [1]]),
        "teacher_prompt_ids": torch.tensor([[4, 5], [6, 7]]),
        "teacher_prompt_mask": torch.tensor([[1, 1], [1, 1]]),
        "advantages": torch.tensor([0.5, -0.5]),
        "num_items_in_batch": torch.tensor(2),
        "nothing": None,
    }
    filled = with_empty_places(batch, [{}, {EMPTY: True}, {}], pad=3)
    assert filled["prompt_ids"].tolist() == [[0, 5], [3, 3], [6, 7]]
    assert filled["prompt_mask"].tolist() == [[0, 1], [0, 1], [1, 1]]
    assert filled["teacher_prompt_ids"].tolist() == [[4, 5], [3, 3], [6, 7]]
    assert filled["teacher_prompt_mask"].tolist() == [[1, 1], [0, 1], [1, 1]]
    assert filled["completion_ids"].tolist() == [[8], [3], [9]]
    assert filled["completion_mask"].tolist() == [[1], [0], [1]]
    assert filled["advantages"].tolist() == [0.5, 0.0, -0.5]
    assert filled[EMPTY].tolist() == [False, True, False]
    assert (filled["num_items_in_batch"].item(), filled["nothing"]) == (2, None)
    assert with_empty_places(batch, [{}, {}], pad=3) == batch


# ---------------------------------------------------------------- the loss
@pytest.mark.parametrize("steps", [1, 2])
def test_each_other_row_keeps_its_weight(tmp_path, tiny_model_dir, steps):
    """f-DPO, one optimizer step over 4 rows, without row 1: what a step over the other three at 3/4 of the rate does,
    for with the place the mean is over 4."""
    rows = f_dpo.preference_rows(4)
    options = {**SGD, "per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps, "max_steps": 1}
    one = f_dpo.make_trainer(tiny_model_dir, Dataset.from_list(rows), tmp_path / "a", **options)
    before = weights(one)
    removed(one, 1).train()
    others = Dataset.from_list([row for number, row in enumerate(rows) if number != 1])
    options |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "learning_rate": 0.1 * 3 / 4}
    other = f_dpo.make_trainer(tiny_model_dir, others, tmp_path / "b", **options)
    other.train()
    assert (weights(one) - before).abs().max() > 1e-4
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=2e-6)


def test_the_rows_of_an_unlearning_step_keep_their_weight(tmp_path, tiny_model_dir):
    """GradDiff over 4 pairs without forget row 2: −F + R of the other three pairs, each over 4."""
    rows, retain = unlearning.forget_rows(4), unlearning.retain_rows(1)  # one partner, so that the pairs are the same
    options = {**SGD, "per_device_train_batch_size": 4, "max_steps": 1}
    one = unlearning.make_trainer("GradDiff", str(tiny_model_dir), tmp_path / "a", rows=rows, retain=retain, **options)
    before = weights(one)
    removed(one, 2).places.digests = {"train": list("abcd"), "retain": ["r"]}
    one.train()
    others = rows.select([0, 1, 3])
    options |= {"per_device_train_batch_size": 3, "learning_rate": 0.1 * 3 / 4}
    other = unlearning.make_trainer(
        "GradDiff", str(tiny_model_dir), tmp_path / "b", rows=others, retain=retain, **options
    )
    other.train()
    assert (weights(one) - before).abs().max() > 1e-4
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=2e-6)


def test_a_mean_over_tokens_is_over_those_that_are_there(tmp_path, tiny_model_dir):
    """Distillation on given completions: without row 0 the step is that of the other three rows."""
    teacher = f_distill.make_teacher(tmp_path / "teacher")
    rows = f_distill.rows(4)
    options = {
        **SGD,
        "learning_rate": 1.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
    }
    one = f_distill.make_trainer(tiny_model_dir, teacher, rows, tmp_path / "a", **options)
    before = weights(one)
    removed(one, 0).train()
    options |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}
    other = f_distill.make_trainer(tiny_model_dir, teacher, rows[1:], tmp_path / "b", **options)
    other.train()
    assert (weights(one) - before).abs().max() > 1e-4
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", ["f_dpo", "f_distill"])
def test_a_step_of_empty_places_changes_no_weight_and_the_schedule_goes_on(tmp_path, tiny_model_dir, make):
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "max_steps": -1,
    }
    options |= {"learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    if make == "f_dpo":
        rows = Dataset.from_list(f_dpo.preference_rows(12))
        trainer = f_dpo.make_trainer(tiny_model_dir, rows, tmp_path / "a", **options)
    else:
        teacher = f_distill.make_teacher(tmp_path / "teacher")
        trainer = f_distill.make_trainer(tiny_model_dir, teacher, f_distill.rows(12), tmp_path / "a", **options)
    log = removed(trainer).places

    # Which rows the second step holds is known once it was made: run twice.
    held = []
    trainer.add_callback(_OnStep(lambda: held.append({d for batch in log.taken() for d in batch})))
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    second = {int(digest[1:]) for digest in held[1]}
    assert len(second) == 4

    if make == "f_dpo":
        again = f_dpo.make_trainer(tiny_model_dir, rows, tmp_path / "b", **options)
    else:
        again = f_distill.make_trainer(tiny_model_dir, teacher, f_distill.rows(12), tmp_path / "b", **options)
    removed(again, *second)
    states = []
    again.add_callback(_OnStep(lambda: states.append(weights(again))))
    again.train()
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])
    assert [e["learning_rate"] for e in again.state.log_history if "learning_rate" in e] == rates
    assert again.state.global_step == 3


def _OnStep(function):
    from transformers import TrainerCallback

    class OnStep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            function()

    return OnStep()


def test_a_step_of_empty_places_leaves_the_multiplier_of_pdu(tmp_path, tiny_model_dir):
    options = {"per_device_train_batch_size": 12, "max_steps": 1, "dual_warmup_epochs": 0.0}
    trainer = unlearning.make_trainer("PDU", str(tiny_model_dir), tmp_path, **options)
    trainer.places = Places(
        trainer.rows_at(), {"train": frozenset(range(12))}, {"train": [""] * 12, "retain": [""] * 7}
    )
    trainer.train()
    assert trainer.multiplier == trainer.args.retain_weight


# ---------------------------------------------------------------- which rows
def test_rows_that_were_dropped_keep_the_numbers_of_the_others(tmp_path, tiny_model_dir):
    rows = f_dpo.preference_rows(6)
    rows[2] = {**rows[2], "prompt": "long " * 60}
    trainer = f_dpo.make_trainer(tiny_model_dir, Dataset.from_list(rows), tmp_path, max_length=48)
    assert len(trainer.train_dataset) == 5
    assert [trainer.rows_at()(place) for place in range(5)] == [(("train", n),) for n in (0, 1, 3, 4, 5)]


def test_chunks_of_raw_text_know_their_text(tmp_path, tiny_model_dir):
    texts = [
        "one two three four five six seven eight nine ten " * 3,
        "  ",
        "eleven twelve",
        "a b c d e f g h i j k l m " * 4,
    ]
    rows = Dataset.from_list([{"text": text} for text in texts])
    retain = Dataset.from_list(
        [{"text": "z"}, {"text": "This is kept, and it is long enough for a chunk or two of its own."}]
    )
    trainer = unlearning.make_trainer(
        "GradDiff", str(tiny_model_dir), tmp_path, rows=rows, retain=retain, max_length=16
    )
    data = trainer.train_dataset
    found = {data.rows_at(place)[0][1] for place in range(len(data))}
    assert found == {0, 2, 3}
    assert {data.rows_at(place)[1] for place in range(len(data))} == {("retain", 1)}
    # A chunk's own tokens are those of the text it names.
    tokenizer = unlearning.load_tokenizer(tiny_model_dir)
    for place in range(len(data)):
        row, name = data[place]["forget"], data.rows_at(place)[0][1]
        assert tokenizer.decode([*row.prompt_ids, *row.answer_ids], skip_special_tokens=True).strip() in texts[name]


@pytest.mark.parametrize("name", all_trainers.EVERY)
def test_watching_the_places_changes_no_run(name, tmp_path, tiny_model_dir):
    """Every trainer, those that cannot leave rows out too: the same weights, and each row is noted."""
    plain = all_trainers.build(name, tiny_model_dir, tmp_path / "a", max_steps=2)
    plain.train()
    watched = all_trainers.build(name, tiny_model_dir, tmp_path / "b", max_steps=2)
    numbers = {part: [f"{part}{n}" for n in range(99)] for part in ("train", "retain")}
    watched.places = Places(watched.rows_at(), {}, numbers)
    steps = []
    watched.add_callback(_OnStep(lambda: steps.append(watched.places.taken())))
    watched.train()
    assert torch.equal(weights(plain), weights(watched))
    assert len(steps) == 2
    assert all(batch and None not in batch for batches in steps for batch in batches)
    assert {digest for batches in steps for batch in batches for digest in batch} <= {
        d for n in numbers.values() for d in n
    }


def test_worker_processes_empty_the_places_too(tmp_path, tiny_model_dir):
    rows = Dataset.from_list(f_dpo.preference_rows(6))
    options = {"per_device_train_batch_size": 3, "max_steps": 2}
    runs = []
    for workers in (0, 1):
        trainer = f_dpo.make_trainer(tiny_model_dir, rows, tmp_path, dataloader_num_workers=workers, **options)
        removed(trainer, 1, 4).train()
        runs.append((weights(trainer), trainer.places.taken()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert sum(digest is None for batch in runs[0][1] for digest in batch) == 2


def test_the_partner_at_an_address_is_the_one_that_is_met(tmp_path, tiny_model_dir):
    trainer = unlearning.make_trainer("NPO", str(tiny_model_dir), tmp_path)
    data = trainer.train_dataset
    for address in range(3 * len(data)):
        (_, forget), (_, retain) = data.rows_at(address)
        assert data[address]["forget"] == data.forget[forget]
        assert data[address]["retain"] == data.retain[retain]
