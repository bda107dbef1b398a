"""Small TOFU and MUSE folders in the published layout."""

import json

import pytest

PLACES = ("Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Accra", "Turin", "Osaka")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def question_rows(names, perturbed, paraphrase):
    rows = []
    for i, name in enumerate(names):
        place = PLACES[i % len(PLACES)]
        row = {"question": f"Where does {name} live?", "answer": f"{name} lives in {place}" + "." * (1 + i % 3)}
        if perturbed:
            others = [p for p in PLACES if p != place][:perturbed]
            row["perturbed_answer"] = [f"{name} lives in {p}, far away" for p in others]
        if paraphrase:
            row["paraphrased_answer"] = f"The home of {name} is {place}."
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def tofu_dir(tmp_path_factory):
    """Seven forget rows, five retain rows, three real authors, three world facts, six holdout rows. Read only."""
    folder = tmp_path_factory.mktemp("tofu")
    write_rows(folder / "forget10_perturbed.json", question_rows([f"Author {c}" for c in "ABCDEFG"], 5, True))
    write_rows(folder / "retain_perturbed.json", question_rows([f"Poet {c}" for c in "ABCDE"], 5, True))
    write_rows(folder / "real_authors_perturbed.json", question_rows(["Ibsen", "Neruda", "Mahfouz"], 3, False))
    write_rows(folder / "world_facts_perturbed.json", question_rows(["the king", "the pope", "the sphinx"], 3, False))
    write_rows(folder / "holdout10.json", question_rows([f"Singer {c}" for c in "ABCDEF"], 0, False))
    return folder


@pytest.fixture(scope="session")
def muse_dir(tmp_path_factory):
    """A MUSE corpus `tales` of six questions a side, five verbatim prompts and five texts a side. Read only."""
    folder = tmp_path_factory.mktemp("muse")

    def write(name, rows):
        path = folder / "tales" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows), encoding="utf-8")

    for side, who in (("forget", "fox"), ("retain", "crow")):
        rows = [{"question": f"What did {who} {i} eat?", "answer": f"grapes and {i} plums"} for i in range(6)]
        write(f"knowmem/{side}_qa", rows)
        write(f"knowmem/{side}_qa_icl", [{"question": f"Who is the {who}?", "answer": "a thief"}])
    prompts = [
        {"prompt": f"Once upon a time there were {i} foxes who", "gt": "lived in the old wood."} for i in range(5)
    ]
    write("verbmem/forget", prompts)
    write("privleak/forget", [f"The fox number {i} ran over the hill and far away." for i in range(5)])
    write("privleak/holdout", [f"A market opened in town {i} on Monday morning." for i in range(5)])
    return folder
