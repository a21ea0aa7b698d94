"""rpo.data.sources: the same rows from every kind of file, pattern, directory and saved data set; mixtures by weight."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rpo import config
from rpo.data import dataset
from rpo.data.formats import RowError
from rpo.data.sources import open_sources, rows_of
from rpo.errors import UserError
from tests.helpers.rows import CFG, make_tokenizer
from tests.helpers.runs import settings

ROWS = [
    {"prompt": 'a "quoted", word', "chosen": "two\nlines, of it", "rejected": "né; 7"},
    {"prompt": "b", "chosen": " 1 ", "rejected": "tab\tand \u2028 separator"},
    {"prompt": "c", "chosen": "[1, 2]", "rejected": "{}"},
]


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def read(spec):
    return [row for _, row in rows_of(spec)]


def test_every_kind_of_file_has_the_same_rows(tmp_path):
    """What json, csv and pyarrow wrote is read back, packed or not, whatever the case of the ending."""
    for name in ("a.jsonl", "a.ndjson", "a.jsonlines", "a.JSONL"):
        (tmp_path / name).write_text(lines_of(ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    table(tmp_path / "A.TSV", ROWS, delimiter="\t")
    table(tmp_path / "a.csv", ROWS)
    table(tmp_path / "a.tsv", ROWS, delimiter="\t")
    for path in list(tmp_path.iterdir()):
        (tmp_path / f"{path.name}.{'GZ' if path.name.isupper() else 'gz'}").write_bytes(
            gzip.compress(path.read_bytes())
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    paths = sorted(map(str, tmp_path.iterdir()))
    assert len(paths) == 17
    for path in paths:
        assert read(path) == ROWS, path


def test_csv_rows_have_their_first_line_and_empty_cells_are_absent(tmp_path):
    """A place is where an editor finds the row, newlines within quotes counted; an empty cell is a null."""
    table(tmp_path / "a.csv", [*ROWS, {"prompt": "d", "chosen": "x", "rejected": ""}])
    found = list(rows_of(str(tmp_path / "a.csv")))
    text = (tmp_path / "a.csv").read_text().split("\n")
    assert [place.rpartition(":")[2] for place, _ in found] == ["2", "4", "5", "6"]
    assert text[4].startswith("c,") and found[3][1] == {"prompt": "d", "chosen": "x", "rejected": None}
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbfprompt,chosen\r\n\r\na,b\r\n")
    assert list(rows_of(str(tmp_path / "bom.csv"))) == [(f"{tmp_path}/bom.csv:3", {"prompt": "a", "chosen": "b"})]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"a,b\n1,2,3\n", (2, "invalid_csv", "expected 2 fields as in the header, got 3")),
        (b"a,b\n1\n", (2, "invalid_csv", "got 1")),
        (b'a,b\n1,"x"y\n3,4\n', (2, "invalid_csv", "double quotes")),
        (b'a,b\n1,2\n3,"never closed', (3, "invalid_csv", "unexpected end of data")),
        (b"a,b\n1,\xe9\n", (2, "invalid_utf8", "field b")),
    ],
)
def test_a_bad_csv_row_is_named(body, expected, tmp_path):
    """Too many or few fields, stray quotes, another encoding: never another row silently."""
    (tmp_path / "a.csv").write_bytes(body)
    bad = [(place, row) for place, row in rows_of(str(tmp_path / "a.csv")) if isinstance(row, RowError)]
    line, kind, words = expected
    assert [(int(place.rpartition(":")[2]), row.kind) for place, row in bad] == [(line, kind)]
    assert words in str(bad[0][1])


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        (b'a,b\n1,2\n3,"never closed\n5,6\n7,8\n', "3 to 5"),
        (b'a,b\n1,"never closed\n3,4\n5,"x"\n7,8\n', "2 to 4"),
        (b'a,b,c\n1,"never closed,2\n3,4,5\n6,7,"end"\n', "2 to 4"),
        (b'a,b,c\n1,"never closed,2\n3,4,5\n6,end",7,8\n', "2 to 4"),
    ],
)
def test_rows_within_an_open_quote_are_never_dropped(body, lines, tmp_path):
    """Whatever data.on_bad_row says: how many rows are lost in one cell is not known."""
    (tmp_path / "a.csv").write_bytes(body)
    place = f"^{tmp_path}/a.csv:{lines[0]}: a double quote that is not closed takes lines {lines} for one row"
    with pytest.raises(UserError, match=place) as caught:
        read(str(tmp_path / "a.csv"))
    assert not isinstance(caught.value, RowError)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.jsonl.gz"])
def test_utf_16_is_one_line(name, encoding, tmp_path):
    """Files of another encoding, with its mark or without, are refused whole with the command that makes them UTF-8."""
    content = 'prompt,chosen\n{"prompt": "a"}\n'.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError, match=f"^{tmp_path}/{name}: is UTF-16 or UTF-32; re-encode it as UTF-8"):
        read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"prompt;chosen;rejected\na;b;c\n", "with a comma between them"), (b"a,b,a\n1,2,3\n", "header has 'a' twice")],
)
def test_a_csv_that_cannot_be_rows_is_refused(body, message, tmp_path):
    (tmp_path / "a.csv").write_bytes(body)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / "a.csv"))


def test_patterns_and_directories(tmp_path, monkeypatch):
    """Files in the order of their names, each under its own; hidden files and README.md aside, nothing is left out silently."""
    for name in ("part/b.jsonl", "part/a.jsonl", "part/deep/c.jsonl.gz", "part/README.md", "part/.git/x.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = lines_of([{"name": name}]).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    part = tmp_path / "part"

    def names(spec):
        found = open_sources(spec, None)
        assert all(next(source.rows())[1]["name"] == source.name[len(str(tmp_path)) + 1 :] for source in found)
        return [source.name.removeprefix(f"{part}/") for source in found]

    assert names(f"{part}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(f"{part}/?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(f"{part}/**/*.jsonl*") == ["a.jsonl", "b.jsonl", "deep/c.jsonl.gz"]
    assert names(str(part)) == ["a.jsonl", "b.jsonl", "deep/c.jsonl.gz"]
    monkeypatch.chdir(tmp_path)
    cfg = settings("model.path=M", "data.train=[part/*.jsonl,{path: part, weight: 2}]", "data.eval=part:train")
    assert cfg.data.train == [f"{part}/*.jsonl", {"path": str(part), "weight": 2}]  # from any folder
    assert cfg.data.eval == f"{part}:train"
    (part / "empty").mkdir()
    for spec, message in (("part/*.csv", "no such file"), ("part/empty", "no data file")):
        with pytest.raises(UserError, match=message):
            open_sources(str(tmp_path / spec), None)
    (part / "more.jsonl.zst").touch()
    with pytest.raises(UserError, match=r"more.jsonl.zst: not a .*pattern such as"):
        open_sources(str(part), None)
    (part / "more.jsonl.zst").unlink()
    with pytest.raises(UserError, match=rf"part/\*: matches the directory {part}/deep, .*give it, or a pattern"):
        open_sources(f"{part}/*", None)


def test_a_file_without_a_suffix_is_not_passed_over(tmp_path):
    """part-00000 of a directory may be data: it is refused by name; LICENSE is not."""
    for name in ("a.jsonl", "LICENSE"):
        (tmp_path / name).write_text(lines_of(ROWS))
    assert len(read(str(tmp_path))) == len(ROWS)
    (tmp_path / "part-00000").write_text(lines_of(ROWS))
    with pytest.raises(UserError, match="part-00000: not a .jsonl"):
        open_sources(str(tmp_path), None)


@pytest.mark.parametrize(
    ("names", "fix"),
    [
        ("train.jsonl test-0.jsonl", "; write DIR:train"),
        ("train.jsonl held_out.jsonl", r"held-out: held_out.jsonl, train: train.jsonl\); write DIR:train"),
        ("a.jsonl test.jsonl", r"no split: a.jsonl, test: test.jsonl\); give the files of one"),
        ("a.jsonl devset/a.jsonl", r"validation: devset/a.jsonl\); give the files of one"),
        ("test.jsonl validation.jsonl", "give the files of one"),
        ("trainset.jsonl HOLDOUT.jsonl", "write DIR:train"),
        ("a.jsonl train.jsonl", None),
        ("validation-0.jsonl valid/1.jsonl", None),
        ("latest.jsonl contest.jsonl", None),
        ("a.jsonl MyTestData.jsonl", r"test: MyTestData.jsonl\); give the files of one"),
        ("a.jsonl a_evals.jsonl", r"test: a_evals.jsonl\); give the files of one"),
        ("a.jsonl unseen/b.jsonl", r"test: unseen/b.jsonl\); give the files of one"),
        ("a.jsonl _two.jsonl", None),
    ],
)
def test_files_of_several_splits_are_not_read_together(names, fix, tmp_path):
    """Held-out files beside others are named in a refusal, in a directory and by a pattern; one split is read."""
    for name in names.split():
        (tmp_path / "part" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "part" / name).write_text(lines_of(ROWS))
    for spec in (f"{tmp_path}/part", f"{tmp_path}/part/**/*.jsonl"):
        if fix is None:
            assert len(read(spec)) == 6
            continue
        end = fix.replace("DIR", f"{tmp_path}/part") if spec.endswith("part") else "give the files of one"
        with pytest.raises(UserError, match=f"holds files of several splits .*{end}"):
            open_sources(spec, None)


def test_a_split_of_a_directory_has_no_held_out_rows(tmp_path):
    """DIR:train has the rows of train.jsonl alone; where no file is called so, what is held out stays out."""
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(lines_of(ROWS[: 1 + (name == "train.jsonl")]))
    assert read(f"{tmp_path}:train") == ROWS[:2]
    (tmp_path / "train.jsonl").rename(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r":train: would have the rows of .*/held_out.jsonl too; give the files"):
        read(f"{tmp_path}:train")


def test_links_are_followed_and_metadata_is_no_data(tmp_path):
    """Linked files and directories are read, once where a link leads back; what describes a dataset is not."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far/b.jsonl").write_text(lines_of(ROWS[:1]))
    part = tmp_path / "part"
    part.mkdir()
    (part / "A.JSONL").write_text(lines_of(ROWS[1:]))
    for name in ("README.md", "dataset_infos.json", "state.json", "LICENSE"):
        (part / name).write_text("{}")
    (part / "linked").symlink_to(tmp_path / "far")
    (part / "back").symlink_to(part)
    for spec in (part, f"{part}/**"):
        assert [source.name for source in open_sources(str(spec), None)] == [
            f"{part}/A.JSONL",
            f"{part}/linked/b.jsonl",
        ]
    (part / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"gone.jsonl: not a"):
        open_sources(str(part), None)


def test_saved_data_sets(tmp_path):
    """What save_to_disk wrote, alone or as a split, has its rows; changed files change the digest."""
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, test=saved.select([1])).save_to_disk(tmp_path / "two")
    assert read(str(tmp_path / "one")) == read(f"{tmp_path}/two:train") == ROWS
    assert read(f"{tmp_path}/two:test") == ROWS[1:2]
    with pytest.raises(UserError, match=r"two: holds several splits; write .*/two:train"):
        read(str(tmp_path / "two"))
    with pytest.raises(UserError, match=r"two:dev: no such split; it has test, train"):
        read(f"{tmp_path}/two:dev")
    digest = [open_sources(str(tmp_path / "one"), None)[0].digest for _ in range(2)]
    assert digest[0] == digest[1]
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    other = datasets.Dataset.from_list(ROWS[::-1])
    other.save_to_disk(tmp_path / "other")
    arrow.write_bytes(next((tmp_path / "other").glob("*.arrow")).read_bytes())
    assert open_sources(str(tmp_path / "one"), None)[0].digest != digest[0]


@pytest.mark.parametrize(("weight", "each"), [(2, [2] * 6), (0.5, [0, 1] * 3), (1.5, [1, 2] * 3), (0.1, None)])
def test_a_mixture_has_rows_by_weight(weight, each, tmp_path):
    """An epoch has each row of a part as often as its weight says, of a fraction evenly spread; tokens are shared."""
    words = "ba be bi bo bu da".split()
    (tmp_path / "a.jsonl").write_text(lines_of([{"prompt": "ga", "chosen": w, "rejected": "gu"} for w in words]))
    (tmp_path / "b.jsonl").write_text(lines_of([{"prompt": "go", "chosen": w, "rejected": "gu"} for w in words]))
    tokenizer = make_tokenizer()

    def load(spec):
        return dataset.load(spec, CFG, tokenizer, pairs=True, cache_dir=tmp_path / "cache")

    plain, _ = load([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"])
    spec = [{"path": f"{tmp_path}/a.jsonl", "weight": weight}, f"{tmp_path}/b.jsonl"]
    if each is None:
        with pytest.raises(UserError, match="a.jsonl: weight=0.1 of 6 rows leaves none; raise it"):
            load(spec)
        return
    rows, report = load(spec)
    counts = Counter(map(rows.where, range(len(rows))))
    assert [counts[f"{tmp_path}/a.jsonl:{i}"] for i in range(1, 7)] == each
    assert [counts[f"{tmp_path}/b.jsonl:{i}"] for i in range(1, 7)] == [1] * 6
    places = [plain.where(i) for i in range(len(plain))]
    for i in range(len(rows)):
        same = plain.row(places.index(rows.where(i)))
        assert all(np.array_equal(a, b) for a, b in zip(rows.row(i), same, strict=True))
    assert (report["rows"], report["read"], report["weights"]) == (6 + sum(each), 12, [weight, 1])
    assert report["tokens"] == len(rows.ids) and len(list((tmp_path / "cache/tokens").iterdir())) == 1


@pytest.mark.parametrize(("weight", "each"), [(1.5, [1, 2] * 3), (0.5, [0, 1] * 3), (0.1, None)])
@pytest.mark.parametrize("shards", ["part/*.jsonl", "part", "part:train"])
def test_a_weight_is_of_a_parts_rows_together(shards, weight, each, tmp_path):
    """Six shards of one row have as many rows, and the same, as one file of six; another start chooses the same."""
    (tmp_path / "part").mkdir()
    for i, word in enumerate("ba be bi bo bu da".split()):
        row = {"prompt": "ga", "chosen": word, "rejected": "gu"}
        (tmp_path / f"part/train-{i}.jsonl").write_text(lines_of([row]))
    (tmp_path / "b.jsonl").write_text(lines_of([{"prompt": "go", "chosen": "ba", "rejected": "gu"}]))
    tokenizer, spec = make_tokenizer(), [f"{tmp_path}/b.jsonl", {"path": f"{tmp_path}/{shards}", "weight": weight}]

    def load():
        return dataset.load(spec, CFG, tokenizer, pairs=True, cache_dir=tmp_path / "cache")[0]

    if each is None:
        with pytest.raises(UserError, match="weight=0.1 of 6 rows leaves none; raise it"):
            load()
        return
    rows = load()
    wanted = [word for word, times in zip("ba be bi bo bu da".split(), each, strict=True) for _ in range(times)]
    assert [tokenizer.decode(rows.row(i)[1][:-1]) for i in range(len(rows))] == ["ba", *wanted]
    assert rows.ids.tolist() == load().ids.tolist()


@pytest.mark.parametrize(
    "part",
    [
        *[f"{{path: a, weight: {weight}}}" for weight in ("0", "-1", "nan", "inf", "1e4", "x", "true", "null")],
        "{file: a, weight: 1}",
        "{weight: 2}",
    ],
)
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(
        UserError,
        match=r"^data.train=.*expected a file, a list of files or of {path: FILE, weight: a number > 0, < 10000}, ",
    ):
        settings("model.path=M", "data.eval=null", f"data.train=[{part},b]")
    with pytest.raises(UserError, match=r"^data.eval=.*expected .*a file, a list of files, or NAME:SPLIT"):
        settings("model.path=M", "data.train=b", f"data.eval=[{part},b]")


def test_a_weighted_run_is_in_its_config(tmp_path):
    """config.yaml says the mixture, and reads back as it."""
    cfg = settings("model.path=M", "data.eval=null", "data.train=[{path: A, weight: 2},B]")
    (tmp_path / "config.yaml").write_text(config.to_yaml(cfg))
    assert config.read_yaml(tmp_path / "config.yaml")["data"]["train"] == [{"path": "A", "weight": 2}, "B"]


def test_what_a_split_would_leave_out_is_named(tmp_path):
    """DIR:train takes files by the datasets library's names: one that it knows no split of, or another kind, is an error."""
    for others in (["extra.jsonl"], ["train_c.csv"], ["more/part-0.jsonl"]):
        folder = tmp_path / others[0].replace("/", "_")
        for name in ["train.jsonl", "train_2.jsonl", "test.jsonl", *others]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            text = '"prompt","chosen","rejected"\n"a","b","c"\n' if name.endswith("csv") else json.dumps(ROWS[0]) + "\n"
            (folder / name).write_text(text)
        with pytest.raises(UserError, match=f"would leave out .*{others[0]}; give the files"):
            open_sources(f"{folder}:train", None)


def test_no_row_is_there_twice(tmp_path):
    """A link to a file beside it is that file; the same name in another form is refused; _extra/ is a directory like others."""
    (tmp_path / "_extra").mkdir()
    for name in ("prefs.jsonl", "_extra/more.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "latest.jsonl").symlink_to(tmp_path / "prefs.jsonl")
    names = [Path(source.name).name for source in open_sources(str(tmp_path), None)]
    assert names == ["more.jsonl", "latest.jsonl"]
    assert len(open_sources(f"{tmp_path}/*.jsonl", None)) == 1
    (tmp_path / "prefs.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match="by its name the rows of prefs.jsonl|by its name the rows of latest"):
        (tmp_path / "latest.jsonl").unlink()
        open_sources(str(tmp_path), None)
