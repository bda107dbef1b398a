"""Published logs re-aggregated: open-unlearning's stored aggregates, the TOFU authors' golden values, MUSE's AUCs."""

import json

import pytest

from fdiv.eval.benchmark.log import STAMP, read_eval_log, write_eval_log
from fdiv.eval.benchmark.presets import get_preset
from fdiv.eval.metrics.text_overlap import rouge_scores
from fdiv.eval.muse.aggregate import aggregate_muse
from fdiv.eval.tofu.aggregate import aggregate_tofu

MODEL = "tofu_Llama-3.2-1B-Instruct_"
TOFU_LOGS = {
    "full__evals_forget01": "retain99",
    "full__evals_forget05": "retain95",
    "full__evals_forget10": "retain90",
    "retain99": None,
    "retain95": None,
    "retain90": None,
}
MUSE_LOGS = ("News_retrain", "News_target")


@pytest.fixture(scope="module")
def logs(shared_data):
    return shared_data / "data" / "open_unlearning_eval_logs"


@pytest.fixture(scope="module")
def authors(shared_data):
    folder = shared_data / "data" / "tofu_eval_logs_locuslab"
    name = "ft_epoch5_lr1e-05_llama2-7b_{}_wd0.01.eval_log_aggregated.json"
    return {which: read_eval_log(folder / name.format(which)) for which in ("full", "retain90")}


def stored_aggregates(node, path=""):
    """Every `agg_value` and `auc` of a raw log, by path."""
    for key, value in node.items():
        if key in ("agg_value", "auc"):
            yield f"{path}{key}", value
        elif isinstance(value, dict) and key != "value_by_index":
            yield from stored_aggregates(value, f"{path}{key}/")


def assert_reproduces(raw, summary, aggregates, needs_retain):
    ours = dict(stored_aggregates(aggregates.log.metrics))
    checked = 0
    for path, stored in stored_aggregates(raw):
        if stored is None:  # published retain logs hold no forget quality
            assert path == "forget_quality/agg_value" and aggregates.values["forget_quality"] is None
            continue
        assert ours[path] == pytest.approx(stored, rel=1e-6), path
        checked += 1
    for name, stored in summary.items():
        assert aggregates.values[name] == pytest.approx(stored, rel=1e-6), name
    assert ("ASSUMED" in aggregates.notes.get("privleak", "")) == needs_retain
    return checked


@pytest.mark.parametrize("name", TOFU_LOGS)
def test_open_unlearning_tofu_aggregates(logs, name):
    path, retain = logs / f"{MODEL}{name}__TOFU_EVAL.json", TOFU_LOGS[name]
    retain_log = read_eval_log(logs / f"{MODEL}{retain}__TOFU_EVAL.json") if retain else None
    result = aggregate_tofu(read_eval_log(path, "tofu"), get_preset("open_unlearning"), retain_log)
    summary = json.loads((logs / f"{MODEL}{name}__TOFU_SUMMARY.json").read_text())
    checked = assert_reproduces(json.loads(path.read_text()), summary, result, retain is None)
    assert checked >= 40
    assert result.values["forget_truth_ratio"] == pytest.approx(
        json.loads(path.read_text())["forget_truth_ratio"]["agg_value"], rel=3e-8
    )


@pytest.mark.parametrize("name", MUSE_LOGS)
def test_open_unlearning_muse_aggregates(logs, name):
    stem = f"numbers_only.muse_Llama-2-7b-hf_{name}__MUSE"
    path = logs / f"{stem}_EVAL.json"
    retain = None
    if name == "News_target":
        retain = read_eval_log(logs / "numbers_only.muse_Llama-2-7b-hf_News_retrain__MUSE_EVAL.json")
    result = aggregate_muse(read_eval_log(path, "muse"), get_preset("open_unlearning"), retain)
    summary = json.loads((logs / f"{stem}_SUMMARY.json").read_text())
    checked = assert_reproduces(json.loads(path.read_text()), summary, result, retain is None)
    assert checked >= 25
    expected = {"News_retrain": 0.5236, "News_target": 0.9991}[name]
    assert result.values["mia_min_k"] == pytest.approx(expected, abs=1e-12)
    assert result.values["forget_quality"] is None and "TOFU metric" in result.notes["forget_quality"]


def test_printed_values_of_the_open_unlearning_logs(logs):
    """flat_tofu_muse.md section 6.2: FQ, truth ratio, Min-40 AUC, ES, EM for full and retain model, and PrivLeak."""
    rows = {
        "10": (3.905471e-22, (0.4756, 0.6275), (0.99665, 0.38261), (0.7063, 0.0590), (0.9739, 0.5849)),
        "05": (1.427570e-12, (0.4725, 0.6343), (0.99995, 0.3624), (0.7272, 0.0634), (0.9744, 0.5935)),
        "01": (6.760732e-3, (0.4728, 0.6516), (1.0000, 0.4706), (0.7432, 0.0693), (0.9804, 0.6450)),
    }
    names = ("forget_truth_ratio", "mia_min_k", "extraction_strength", "exact_memorization")
    for split, (quality, *pairs) in rows.items():
        retain = read_eval_log(logs / f"{MODEL}retain{100 - int(split)}__TOFU_EVAL.json")
        log = read_eval_log(logs / f"{MODEL}full__evals_forget{split}__TOFU_EVAL.json")
        full, base = (aggregate_tofu(x, get_preset("open_unlearning"), retain) for x in (log, retain))
        assert full.values["forget_quality"] == pytest.approx(quality, rel=1e-6)
        assert base.values["forget_quality"] == 1.0
        assert base.values["privleak"] == 0.0
        assert full.values["model_utility"] == pytest.approx(0.599153, abs=1e-6)
        for name, pair in zip(names, pairs, strict=True):
            assert (full.values[name], base.values[name]) == pytest.approx(pair, abs=5e-5), (split, name)
        _, min_k, strength, _ = (abs(pair[0] - pair[1]) for pair in pairs)
        assert full.values["retrained_distance"] == pytest.approx((min_k + strength) / 2, abs=1e-4)
        assert base.values["retrained_distance"] == 0.0
        if split == "10":
            assert full.values["privleak"] == pytest.approx(-99.457, abs=5e-4)


def test_golden_values_of_the_authors_logs(authors):
    full = aggregate_tofu(authors["full"], get_preset("tofu_2024"), authors["retain90"]).values
    base = aggregate_tofu(authors["retain90"], get_preset("tofu_2024")).values
    assert full["forget_quality"] == pytest.approx(1.834066410994743e-21, rel=1e-12)
    assert full["forget_quality_ks_statistic"] == pytest.approx(0.3967, abs=5e-5)
    assert full["model_utility"] == pytest.approx(0.6226773637427153, rel=1e-12)
    assert base["model_utility"] == pytest.approx(0.613744995233942, rel=1e-12)
    assert full["forget_Q_A_Prob"] == pytest.approx(0.9909386, abs=5e-8)
    assert base["forget_Q_A_Prob"] == pytest.approx(0.1475628, abs=5e-8)
    assert (full["forget_truth_ratio"], base["forget_truth_ratio"]) == pytest.approx((0.5159854, 0.6740193), abs=5e-8)
    parts = [
        full[name]
        for name in (
            *("retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"),
            *("ra_Q_A_Prob_normalised", "ra_Q_A_ROUGE", "ra_Truth_Ratio"),
            *("wf_Q_A_Prob_normalised", "wf_Q_A_ROUGE", "wf_Truth_Ratio"),
        )
    ]
    printed = [0.9895, 0.9857, 0.4747, 0.4555, 0.9330, 0.5962, 0.4186, 0.8825, 0.5390]
    assert parts == pytest.approx(printed, abs=5e-5)
    for name in ("privleak", "extraction_strength"):
        assert full[name] is None


def test_arithmetic_truth_ratio_of_the_authors_logs(authors):
    full = aggregate_tofu(authors["full"], get_preset("tofu_paper"), authors["retain90"]).values
    base = aggregate_tofu(authors["retain90"], get_preset("tofu_paper")).values
    assert full["model_utility"] == pytest.approx(0.5859, abs=5e-5)
    assert base["model_utility"] == pytest.approx(0.5752, abs=5e-5)
    assert full["forget_quality"] == pytest.approx(6.03e-23, rel=5e-4)


def test_rouge_recomputed_wherever_a_log_keeps_its_text(logs, authors):
    """Every kept text of one log of each format and size; the others hold the same retain and fact rows."""
    compared = 0
    some = [read_eval_log(logs / f"{MODEL}{n}__TOFU_EVAL.json") for n in TOFU_LOGS]
    for log in [*some, *authors.values()]:
        for metric in ("forget_Q_A_ROUGE", "retain_Q_A_ROUGE", "ra_Q_A_ROUGE", "wf_Q_A_ROUGE"):
            for index, row in log.items(metric).items():
                ours = rouge_scores(row["ground_truth"], row["generation"])
                for name in ("rouge1_recall", "rougeL_recall", "rougeL_f1"):
                    if name in row:
                        assert ours[name] == pytest.approx(row[name], rel=1e-9), (log.source, metric, index, name)
                compared += 1
    assert compared == 2 * 3 * 617 + 2 * (40 + 200 + 400) + 2 * (300 + 300 + 217)


def test_writer_round_trip_and_stamp(logs, tmp_path):
    log = read_eval_log(logs / f"{MODEL}full__evals_forget01__TOFU_EVAL.json")
    before = aggregate_tofu(log, get_preset("open_unlearning"))
    before.log.stamp["split"] = "forget01"
    write_eval_log(tmp_path / "TOFU_EVAL.json", before.log)
    raw = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    assert raw[STAMP].pop("digest").startswith("sha256:")
    assert raw[STAMP] == {"benchmark": "tofu", "preset": "open_unlearning", "split": "forget01"}
    assert raw["mia_min_k"]["forget"]["value_by_index"]["0"].keys() == {"score"}
    again = read_eval_log(tmp_path / "TOFU_EVAL.json")
    assert again.split() == "forget01"
    assert aggregate_tofu(again, get_preset("open_unlearning")).values == before.values


def test_retain_log_of_another_split_or_preset_is_refused(logs, authors):
    preset = get_preset("open_unlearning")
    log = read_eval_log(logs / f"{MODEL}full__evals_forget10__TOFU_EVAL.json")
    with pytest.raises(ValueError, match="made on split forget05, the model's values on forget10"):
        aggregate_tofu(log, preset, read_eval_log(logs / f"{MODEL}retain95__TOFU_EVAL.json"))
    with pytest.raises(ValueError, match="made with preset tofu_2024"):
        aggregate_tofu(log, preset, authors["retain90"])
    muse = read_eval_log(logs / "numbers_only.muse_Llama-2-7b-hf_News_retrain__MUSE_EVAL.json")
    with pytest.raises(ValueError, match="a muse log"):
        aggregate_tofu(log, preset, muse)


def test_muse_original_preset_on_a_stemmed_log_without_text(logs):
    log = read_eval_log(logs / "numbers_only.muse_Llama-2-7b-hf_News_target__MUSE_EVAL.json")
    result = aggregate_muse(log, get_preset("muse_original"), corpus="News")
    assert result.values["forget_verbmem_ROUGE"] is None
    assert "with stemming" in result.notes["forget_verbmem_ROUGE"]
    # muse_bench's own constant: A_retain = .4772, so a target with A = .0009 has 100 (.0009 - .4772) / .4772
    assert result.values["privleak"] == pytest.approx(100 * (0.0009 - 0.4772) / 0.4772, rel=1e-9)
    assert "ASSUMED to be 0.5228" in result.notes["privleak"]
