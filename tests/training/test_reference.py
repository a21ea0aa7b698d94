"""rpo.training.reference: the reference's own log-probs, scored once, found again whenever nothing that they depend on changed."""

import copy
import dataclasses
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rpo.data.batch import make_batch
from rpo.data.dataset import Rows
from rpo.errors import UserError
from rpo.files import key_of, read_arrays, write_arrays
from rpo.model import fingerprint
from rpo.model.policy import Policy
from rpo.training import reference
from tests.helpers import reference_ranks
from tests.helpers.models import make_lm, own_logps
from tests.helpers.rows import make_rows, make_tokenizer
from tests.helpers.runs import command, script_env

LENGTHS = [
    (5, 9, 4),
    (2, 3, 17),
    (8, 1, 2),
    (3, 12, 12),
    (6, 2, 7),
    (1, 8, 3),
    (4, 4, 20),
    (7, 15, 1),
    (2, 2, 2),
    (9, 1, 1),
]
VOCABULARY = len(make_tokenizer())
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("group")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of four pairs, so that these ten make three shards."""
    monkeypatch.setattr(reference, "CHUNK", 4)


def make_policy(lm=None, dtype=torch.float32):
    return Policy((make_lm() if lm is None else lm).to(dtype), compile_tiles=False)


def pairs(lengths=LENGTHS):
    return make_rows(lengths, vocab_size=VOCABULARY)


def facts_of(policy, dtype=torch.float32, layout="packed"):
    weights = fingerprint.weights_digest(policy.lm)
    return fingerprint.identity(weights, policy, compute_dtype=dtype, device=CPU, layout=layout)


def score(rows, cache_dir, *, policy=None, facts=None, layout="packed", noise_floor=1e-7):
    policy = policy or make_policy()
    how = {"name": "train", "budget": 60, "device": CPU, "layout": layout}
    how |= {"cache_dir": cache_dir, "noise_floor": noise_floor}
    return reference.score_rows(policy, rows, facts or facts_of(policy, layout=layout), **how)


def picked(rows, indices):
    """The rows `indices`, in that order."""
    columns = {name: getattr(rows, name)[indices] for name in ("prompt", "chosen", "rejected", "file", "line")}
    return Rows(np.concatenate([part for i in indices for part in rows.row(i)]), **columns, files=rows.files)


def live(rows, lm):
    """Sums of the library's own log-probs, one response at a time; float64 (rows, 2)."""
    sums = np.zeros((len(rows), 2))
    for i in range(len(rows)):
        prompt, *responses = rows.row(i)
        for side, response in enumerate(responses):
            if len(response):
                ids_T = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
                sums[i, side] = own_logps(lm, [(ids_T, len(prompt))]).double().sum().item()
    return sums


def shards(cache_dir):
    return sorted(path for path in cache_dir.glob("reference/*/*") if path.is_dir())


def edit(shard, change):
    """The shard with its log-probs through `change`, under a checksum that is right."""
    arrays, report = read_arrays(shard)
    arrays = {name: np.array(array) for name, array in arrays.items()}
    shutil.rmtree(shard)
    write_arrays(shard, arrays | {"logps": change(arrays["logps"])}, report)


# ---- values


@torch.no_grad()
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_values_are_a_live_references(tmp_path, layout, dtype, tolerance):
    """Sums, scored and again from the cache, equal the library's own logits, summed row by row."""
    rows, policy = pairs(), make_policy(dtype=dtype)
    how = {"policy": policy, "facts": facts_of(policy, dtype, layout), "layout": layout}
    scored, report = score(rows, tmp_path, **how)
    np.testing.assert_allclose(scored, live(rows, make_lm().to(dtype)), rtol=tolerance)
    assert scored.dtype == np.float64 and report["scored"] == len(rows)
    again, report = score(rows, tmp_path, **how)
    assert np.array_equal(again, scored) and (report["scored"], report["cached"]) == (0, len(rows))
    stored = [read_arrays(shard)[0]["logps"] for shard in shards(tmp_path)]
    assert {logps.dtype for logps in stored} == {np.dtype(str(dtype).removeprefix("torch."))}
    assert sum(map(len, stored)) == (rows.chosen + rows.rejected).sum()


def test_supervised_rows(tmp_path):
    """Rows without a rejected response have 0 there, and are not the same rows as pairs."""
    rows, policy = pairs([(p, c, 0) for p, c, _ in LENGTHS]), make_policy()
    for scored in (len(rows), 0):
        sums, report = score(rows, tmp_path, policy=policy)
        assert report["scored"] == scored and not sums[:, 1].any()
        with torch.no_grad():
            np.testing.assert_allclose(sums, live(rows, make_lm()), rtol=1e-5)


def test_sums_reach_the_batch(tmp_path):
    """Rows that carry the sums hand them to a batch in the order of its responses."""
    rows = pairs()
    sums, _ = score(rows, tmp_path)
    batch = make_batch(dataclasses.replace(rows, ref_logps=sums), np.array([7, 2]), "packed")
    assert batch.ref_S.tolist() == [sums[7, 0], sums[2, 0], sums[7, 1], sums[2, 1]]


# ---- what hits and what misses


def test_order_and_subsets_hit(tmp_path, capsys):
    """Other orders, subsets, repetitions and budgets find all, and every row its own sums; the log says so."""
    rows, policy = pairs(), make_policy()
    sums, _ = score(rows, tmp_path, policy=policy)
    assert "reference: scored 10 of 10 train pairs, 0 from the cache" in capsys.readouterr().out
    calls = []
    policy.register_forward_pre_hook(lambda *_: calls.append(1))
    for indices in (np.arange(10)[::-1], np.array([3, 1, 8]), np.array([5, 5, 0])):
        found, report = score(picked(rows, indices), tmp_path, policy=policy)
        assert np.array_equal(found, sums[indices]) and report["scored"] == 0
        assert capsys.readouterr().out == f"reference: all {len(indices)} train pairs from the cache\n"
    assert len(calls) <= 3 * 4, "only re-scored pairs went through the model"


def test_other_rows_of_one_model_share_a_folder(tmp_path):
    """Train and eval of one reference lie in one folder, and what the one has the other finds."""
    rows = pairs()
    first, report = score(picked(rows, np.arange(6)), tmp_path)
    both, more = score(rows, tmp_path)
    assert (more["cached"], more["scored"], more["folder"]) == (6, 4, report["folder"])
    assert np.array_equal(both[:6], first)


@pytest.mark.parametrize("change", ["a prompt token", "a chosen token", "a rejected token", "a cut", "what is scored"])
def test_a_changed_row_misses_alone(tmp_path, change):
    """One token more, less or other in one row, or another border between prompt and chosen: that row alone is scored."""
    rows = pairs()
    before, _ = score(rows, tmp_path)
    ids = {"a prompt token": 0, "a chosen token": 3, "a rejected token": -1}
    parts = [rows.row(i) for i in range(10)]
    prompt, chosen, rejected = (part.copy() for part in parts[3])
    if change in ids:
        part = {"a prompt token": prompt, "a chosen token": chosen, "a rejected token": rejected}[change]
        part[ids[change]] = part[ids[change]] % (VOCABULARY - 1) + 1
    elif change == "a cut":
        rejected = rejected[:-1]
    else:
        prompt, chosen = np.append(prompt, chosen[:1]), chosen[1:]
    parts[3] = prompt, chosen, rejected
    lengths = np.array([list(map(len, row)) for row in parts], np.int32)
    changed = dataclasses.replace(
        rows,
        ids=np.concatenate([part for row in parts for part in row]),
        **dict(zip(("prompt", "chosen", "rejected"), lengths.T, strict=True)),
    )
    after, report = score(changed, tmp_path)
    assert report["scored"] == 1
    assert (after != before).any(axis=1).nonzero()[0].tolist() == [3]


def test_what_the_key_depends_on():
    """One weight by its last bit, dtype, layout, attention, config, compile: each makes another key; the same facts the same."""
    policy = make_policy()
    key = key_of(facts_of(policy))
    assert key == key_of(json.loads(json.dumps(facts_of(make_policy()))))
    others = [facts_of(policy, torch.bfloat16), facts_of(policy, layout="padded")]
    others += [
        facts_of(Policy(policy.lm, compile_tiles=True)),
        facts_of(Policy(policy.lm, compile_tiles=False, attention="flex")),
    ]
    nudged = copy.deepcopy(policy)
    with torch.no_grad():
        weight = nudged.lm.model.layers[1].mlp.up_proj.weight
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(torch.inf))
    others.append(facts_of(nudged))
    nudged = copy.deepcopy(policy)
    nudged.lm.config.rms_norm_eps *= 2
    others.append(facts_of(nudged))
    assert len({key, *map(key_of, others)}) == 1 + len(others)


def test_what_the_key_does_not_depend_on(tmp_path):
    """A model saved and loaded from a folder is the same reference, also where its head is tied."""
    for family in ("llama", "gemma2"):
        lm = make_lm(family)
        lm.save_pretrained(tmp_path / family)
        loaded = type(lm).from_pretrained(tmp_path / family)
        assert loaded.config._name_or_path != lm.config._name_or_path
        assert facts_of(make_policy(loaded)) == facts_of(make_policy(lm))


def test_other_facts_miss_fully(tmp_path):
    """Weights that differ in one bit find nothing, and what is there stays."""
    policy, rows = make_policy(), pairs()
    score(rows, tmp_path, policy=policy)
    with torch.no_grad():
        weight = policy.lm.lm_head.weight
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(torch.inf))
    assert score(rows, tmp_path, policy=policy)[1]["scored"] == len(rows)
    assert score(rows, tmp_path)[1]["scored"] == 0


# ---- damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_damaged_shard_is_scored_again(tmp_path, capsys, damage):
    """One bit flipped, an empty file, a lost one: said in one line, and its pairs alone are scored again."""
    rows = pairs()
    sums, _ = score(rows, tmp_path)
    damaged = shards(tmp_path)[0]
    lost = read_arrays(damaged)[1]["pairs"]
    damage(damaged / "logps.npy")
    capsys.readouterr()
    again, report = score(rows, tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and str(damaged) in said[0] and "damaged" in said[0]
    assert report["scored"] == lost and not damaged.exists()
    np.testing.assert_allclose(again, sums, rtol=1e-5)
    assert score(rows, tmp_path)[1]["scored"] == 0


def test_an_edited_value_is_caught(tmp_path):
    """Log-probs changed by hand, under a right checksum: the re-score names folder, figure, causes and the fix."""
    rows = pairs()
    _, report = score(rows, tmp_path)
    for shard in shards(tmp_path):
        edit(shard, lambda logps: logps + np.float32(0.001))
    with pytest.raises(
        UserError, match=r"differ by 1.0e-03 nats per token .*usual causes.*delete that folder"
    ) as caught:
        score(rows, tmp_path)
    assert report["folder"] in str(caught.value) and "\n" not in str(caught.value)
    for shard in shards(tmp_path):
        edit(shard, lambda logps: logps * np.nan)
    with pytest.raises(UserError, match="differ by nan"):
        score(rows, tmp_path)
    assert score(rows, tmp_path / "other")[1]["scored"] == len(rows)


def test_fresh_values_are_held_to_the_policy(tmp_path):
    """Were two passes of one model to differ, as with dropout left on, a first run would stop at once."""
    policy = make_policy()
    policy.lm.config.attention_dropout = 0.3
    for layer in policy.lm.model.layers:
        layer.self_attn.attention_dropout = 0.3
    policy.lm.train()
    with torch.random.fork_rng(), pytest.raises(UserError, match="step 0: .*usual causes: dropout"):
        torch.manual_seed(0)
        score(pairs(), tmp_path, policy=policy, layout="padded")


def test_values_that_are_not_finite_are_refused(tmp_path):
    """A NaN from the reference is an error that names the row, and is not stored."""
    policy = make_policy()
    with torch.no_grad():
        policy.lm.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="a token of made:0 is not finite"):
        score(pairs(), tmp_path, policy=policy)
    assert not shards(tmp_path)


# ---- the disk


def must_not_run(*_):
    raise AssertionError("the pass began")


def test_a_folder_that_can_not_be_written(tmp_path):
    """Refused before the pass, by the key and with the bytes needed."""
    (tmp_path / "file").touch()
    policy = make_policy()
    policy.register_forward_pre_hook(must_not_run)
    with pytest.raises(UserError, match=r"reference.cache_dir=.*file: cannot be written \(.*\), 0.1 MiB are needed"):
        score(pairs(), tmp_path / "file", policy=policy)


def test_a_full_disk(tmp_path, monkeypatch):
    """Refused before the pass, with what is needed and what is free; a later full disk keeps what was written."""
    policy, rows = make_policy(), pairs()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=3 * 2**20))
    handle = policy.register_forward_pre_hook(must_not_run)
    with pytest.raises(UserError, match=r"3.0 MiB free, the log-probs of 1 pairs need 7.6 MiB; make room or give"):
        score(pairs([(5, 10**6, 10**6)]), tmp_path, policy=policy)
    handle.remove()
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference, "write_arrays", full)
    with pytest.raises(
        UserError, match=r"cannot be written \(No space left on device\), what was written before is kept"
    ):
        score(rows, tmp_path, policy=policy)


def test_an_interrupted_pass_keeps_its_chunks(tmp_path, monkeypatch):
    """Where the model fails in the third chunk, the next run scores only what that chunk had."""
    policy, rows, left = make_policy(), pairs(), [2]

    def fail(_module, _args, _logps):
        if not left[0]:
            raise KeyboardInterrupt

    handle = policy.register_forward_hook(fail)
    written = reference._write_shard

    def count(*args):
        written(*args)
        left[0] -= 1

    monkeypatch.setattr(reference, "_write_shard", count)
    with pytest.raises(KeyboardInterrupt):
        score(rows, tmp_path, policy=policy)
    handle.remove()
    monkeypatch.setattr(reference, "_write_shard", written)
    sums, report = score(rows, tmp_path, policy=policy)
    assert (report["cached"], report["scored"]) == (8, 2)
    assert np.array_equal(sums, score(rows, tmp_path / "other", policy=policy)[0])


def test_a_cache_given_by_path(tmp_path):
    """One cache's own folder serves its own reference and refuses another by what differs first."""
    rows = pairs()
    sums, report = score(rows, tmp_path)
    moved = tmp_path / "moved"
    shutil.move(report["folder"], moved)
    found, again = score(rows, moved)
    assert np.array_equal(found, sums) and again["folder"] == str(moved) and again["scored"] == 0
    other = make_policy(make_lm(seed=1))
    with pytest.raises(UserError, match=rf"reference.cache_dir={moved}: is the cache of another reference \(weights="):
        score(rows, moved, policy=other)
    policy = make_policy()
    with pytest.raises(UserError, match=r"\(compute_dtype=float32, here bfloat16\)"):
        score(rows, moved, policy=policy, facts=facts_of(policy, torch.bfloat16))
    facts = facts_of(policy)
    facts["config"]["rms_norm_eps"] = 1.0
    with pytest.raises(UserError, match=r"\(config.rms_norm_eps=1e-06, here 1.0\)"):
        score(rows, moved, policy=policy, facts=facts)


# ---- several processes


def test_two_runs_fill_one_cache(tmp_path, monkeypatch):
    """What another run has filled meanwhile is read, not scored again; both have the same sums, and a third finds all."""
    rows, policy = pairs(), make_policy()
    look_up, inner = reference._look_up, []

    def look_up_first(*args):  # the other run fills the cache after this one found it empty
        holes = look_up(*args)
        monkeypatch.setattr(reference, "_look_up", look_up)
        inner.append(score(rows, tmp_path, policy=policy))
        return holes

    monkeypatch.setattr(reference, "_look_up", look_up_first)
    sums, report = score(rows, tmp_path, policy=policy)
    assert (report["scored"], inner[0][1]["scored"]) == (0, 10) and np.array_equal(sums, inner[0][0])
    again, report = score(rows, tmp_path, policy=policy)
    assert report["scored"] == 0 and np.array_equal(again, sums)


def test_writers_and_readers_at_once(tmp_path):
    """While threads write the same shards over and over, a reader sees whole ones only."""
    rows = pairs()
    _, report = score(rows, tmp_path)
    folder = tmp_path / "threads"
    folder.mkdir()
    fresh = {}
    reference._look_up(type(tmp_path)(report["folder"]), rows, fresh)
    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(reference._write_shard, folder, rows, fresh) for _ in range(40)]
        while not all(w.done() for w in writing):
            reference._look_up(folder, rows, {})
        [w.result() for w in writing]
    assert len(list(folder.iterdir())) == 40, "a shard was taken for a damaged one"


def test_two_ranks_have_the_sums_of_one(tmp_path):
    """Two gloo ranks, FSDP, fillers: one process's sums in float64; every pair stored once; rank 1 touches no disk.

    Where rank 0 cannot write, both raise its error.
    """
    out = tmp_path / "sums.pt"
    args = command("tests/helpers/reference_ranks.py", out, tmp_path / "cache", ranks=2)
    subprocess.run(args, env=script_env(), check=True, capture_output=True, timeout=120)
    ((one, _), _), error = reference_ranks.score(tmp_path / "one")
    for rank in range(2):
        results, same_error = torch.load(f"{out}.{rank}", weights_only=False)
        assert same_error == error and "cannot be written" in error
        for (sums, report), scored in zip(results, (7, 0), strict=True):
            np.testing.assert_allclose(sums, one, rtol=1e-12)
            assert report["scored"] == scored
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["0"]
    stored = [read_arrays(shard)[0] for shard in shards(tmp_path / "cache/0")]
    assert sum(len(arrays["lengths"]) for arrays in stored) == len(reference_ranks.LENGTHS)
