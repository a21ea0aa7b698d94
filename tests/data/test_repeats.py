"""data_report.json's `noticed`: what a plain search over the raw rows finds, and who is named."""

import random

from rpo.data import dataset
from tests.helpers.rows import CFG, make_tokenizer, write_jsonl
from tests.helpers.runs import settings


def noticed(rows, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows)
    _, report = dataset.load(str(tmp_path / "a.jsonl"), CFG, make_tokenizer(), pairs=True, cache_dir=tmp_path / "cache")
    return report["noticed"]


def test_repeats_and_conflicts_are_those_of_a_plain_search(tmp_path):
    """On random rows of few prompts and responses: each count is that of a double loop over the texts."""
    rng, words = random.Random(0), ["ba", "be", "bi", "bo"]
    rows = []
    for _ in range(60):
        chosen, rejected = rng.sample(words, 2)
        rows.append({"prompt": rng.choice(["ga", "ge", "gi", "go", "gu"]), "chosen": chosen, "rejected": rejected})
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    expected = {
        "repeated_pair": sum(row in rows[:i] for i, row in enumerate(rows)),
        "label_conflict": sum(row in rows[:i] for i, row in enumerate(swapped)),
        "chosen_is_rejected": sum(
            any(other["prompt"] == row["prompt"] and other["rejected"] == row["chosen"] for other in rows)
            for row in rows
        ),
    }
    assert min(expected.values()) > 0
    assert {kind: entry["count"] for kind, entry in noticed(rows, tmp_path).items()} == expected


def test_examples_name_both_rows(tmp_path):
    """Each example is the later row, with the line of the earlier one; a clean file has nothing noticed."""
    clean = [{"prompt": "ga", "chosen": "ba", "rejected": "be"}, {"prompt": "ge", "chosen": "be", "rejected": "ba"}]
    assert noticed(clean, tmp_path) == {}
    found = noticed([*clean, clean[0], {"prompt": "ge", "chosen": "ba", "rejected": "be"}], tmp_path)
    assert found["repeated_pair"] == {"count": 1, "examples": [f"{tmp_path}/a.jsonl:3: as line 1"]}
    assert found["label_conflict"] == {"count": 1, "examples": [f"{tmp_path}/a.jsonl:4: as line 2"]}


def test_responses_that_repeat_their_prompt(tmp_path):
    """Of strings and messages, either response; a short prompt, or one that the answer quotes later, is no echo."""
    long = "ba be bi bo bu da de di do"
    rows = [
        {"prompt": long, "chosen": f"{long} ga", "rejected": "ge"},
        {"prompt": [{"role": "user", "content": long}], "chosen": "ga", "rejected": f" {long} ge"},
        {"prompt": "ba", "chosen": "ba ga", "rejected": "ge"},
        {"prompt": long, "chosen": f"ga {long}", "rejected": "ge"},
    ]
    found = noticed(rows, tmp_path)
    assert found["response_repeats_prompt"]["count"] == 2
    assert [place.split(":")[1] for place in found["response_repeats_prompt"]["examples"]] == ["1", "2"]


def test_held_out_rows_that_train_holds(group, tiny, tmp_path):
    """The report of data.eval counts pairs, in either order, and prompts that are in data.train, and names both places."""
    train = [{"prompt": f"ba {word}", "chosen": "ga", "rejected": "ge"} for word in ("be", "bi", "bo", "bu")]
    held_out = [
        train[1],
        train[2] | {"chosen": "ge", "rejected": "ga"},
        train[3] | {"chosen": "gi"},
        train[0] | {"prompt": "du"},
    ]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", train), ("eval", held_out))]
    cfg = settings(f"model.path={tiny / 'model'}", f"data.train={files[0]}", f"data.eval={files[1]}")
    splits = dataset.load_splits(cfg.data, cfg.model, pairs=True, cache_dir=str(tmp_path / "cache"))
    found = splits.reports["eval"]["noticed"]
    assert {kind: entry["count"] for kind, entry in found.items()} == {"pair_in_train": 2, "prompt_in_train": 3}
    assert found["pair_in_train"]["examples"][0] == f"{files[1]}:1: as {files[0]}:2"
    assert "pair_in_train" not in splits.reports["train"]["noticed"]
