"""One fingerprint of data, one of weights."""

import json

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from fdiv.inference.cache import fingerprint
from fdiv.models import fingerprints
from fdiv.models.fingerprints import data_fingerprint, weights_fingerprint


def test_rows_between_the_sampled_ones_count_where_every_row_is_asked_for():
    rows = [{"text": f"row {number}"} for number in range(200)]
    changed = [{"text": "other"} if number == 1 else row for number, row in enumerate(rows)]
    sampled = {round(place * 199 / 63) for place in range(64)}
    assert 1 not in sampled and {0, 199} <= sampled
    assert data_fingerprint(rows) == data_fingerprint(changed)
    assert data_fingerprint(rows, every_row=True) != data_fingerprint(changed, every_row=True)
    changed[199] = {"text": "other"}
    assert data_fingerprint(rows) != data_fingerprint(changed)
    assert data_fingerprint(rows).startswith("200 rows, ")
    assert data_fingerprint(rows) != data_fingerprint(rows[:199])
    assert data_fingerprint([]) is data_fingerprint(None) is data_fingerprint(iter(rows)) is None


def test_the_digest_of_every_row_is_that_of_release_0_1():
    """Pre-sampling stores it: a folder of release 0.1 can be gone on with."""
    rows = Dataset.from_list([{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}])
    lines = [json.dumps({"prompt": p, "answer": a}, sort_keys=True) for p, a in (("a", 1), ("b", 2))]
    assert data_fingerprint(rows, every_row=True) == fingerprint(["prompt", "answer"], lines)


def test_weights_are_told_apart_whatever_type_they_are_loaded_in(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    digest = weights_fingerprint(model)
    assert digest == weights_fingerprint(model.to(torch.bfloat16))
    model.get_output_embeddings().weight.data[-1, -1] += 0.1
    assert digest != weights_fingerprint(model)
    assert fingerprints.model_fingerprint is weights_fingerprint  # its name in release 0.1
