"""What a task runs on: a run folder that it resumes in; models, their answers, the reference and a judge, opened on demand.

RUN_DIR/answers.jsonl    answers of models, as they are sampled
RUN_DIR/points.jsonl     whatever else a task has computed so far

Both hold one object per line under a key that is a digest of all that it was made of, so that a killed evaluation
computes nothing twice. Importing this module is cheap: what needs transformers is imported where it is used.
"""

import gc
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rpo import config, dist
from rpo.errors import UserError
from rpo.evals.settings import Answers, Eval, listed
from rpo.files import JsonLines, short_hash
from rpo.judging import client, judge
from rpo.model import shard
from rpo.runs import folder as run_folder
from rpo.text import redacted

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from rpo.data.dataset import Rows
    from rpo.data.formats import Messages
    from rpo.judging.client import Reply, Request
    from rpo.model.policy import Policy
    from rpo.model.sampling import Sampling
    from rpo.runs.state import Tensors

UNKNOWN = 0.01  # share of unknown tokens that is reported: answers to prompts that cannot be read look like any others
CHUNK = 8  # batches between two writes; not the number of ranks, or the samples would depend on it
_OWN_FILES = {"config.yaml", "status.json", "lock"}  # of a folder in which nothing was computed yet


# ---- what is on disk


class Store:
    """Values by key, on disk as soon as they are known. A collective: rank 0 reads and writes, all ranks know them."""

    def __init__(self, file: Path):
        self.file = file
        self._lines: JsonLines | None = None  # on rank 0 alone
        self._rows: dict[str, dict] = dict(dist.on_main(self._read))

    def _read(self) -> dict[str, dict]:
        self._lines = JsonLines(self.file)
        return self._lines.rows

    def get(self, key: str) -> Any | None:
        row = self._rows.get(key)
        return None if row is None else row["value"]

    def add(self, key: str, value: Any, **about: Any) -> Any:
        """Writes the value, with what a reader of the file should know `about` it; returns it."""
        row = {"key": key, **redacted(about), "value": value}  # texts stay as they are, a path may hold a secret
        self._rows[key] = row
        dist.on_main(lambda: self._lines.append([row]))
        return value

    def once(self, key: str, compute: Callable[[], Any], **about: Any) -> Any:
        """The value under `key`: known already, or what `compute` returns now (JSON types)."""
        known = self.get(key)
        return self.add(key, compute(), **about) if known is None else known


# ---- models


@dataclass(frozen=True)
class Loaded:
    """A sharded model, its tensors, the digest of the weights that it was loaded with, and the dtype it computes in."""

    policy: "Policy"
    weights: "Tensors"
    digest: str
    compute: torch.dtype


def load(
    source: tuple[str, str | None], key: str, device: torch.device, *, dtype: str, asked: str, trust_remote_code: bool
) -> Loaded:
    """The model at `source` (folder or Hub name, revision), ready to score, to sample, to have checkpoints laid over it.

    Its weights are as wide as those of a run with model.dtype=`dtype`; it computes in `asked` (auto: as the run did).
    """
    from rpo.model import hf, shard
    from rpo.model.fingerprint import weights_digest
    from rpo.model.policy import prepare
    from rpo.runs.state import weights_of

    compute = shard.compute_dtype(dtype if asked == "auto" else asked, device)
    master = torch.promote_types(shard.compute_dtype(dtype, device), torch.float32)
    if torch.promote_types(compute, master) != master:
        raise UserError(f"model.dtype={asked}: the run's weights are {str(master)[6:]}; give auto, or no wider a type")
    path, revision = source
    lm = hf.load(path, revision, master, key=key, trust_remote_code=trust_remote_code)
    weights = weights_digest(lm)
    mesh = shard.mesh(device, shard.PLAIN)
    policy = prepare(lm, mesh, shard.PLAIN, compute_dtype=compute, compile=False, trainable=False)
    return Loaded(policy, weights_of(policy), weights, compute)


def lay_over(model: Loaded, folder: Path, facts: dict[str, str | None]) -> None:
    """Makes `model` the policy of the checkpoint in `folder`.

    `facts` is what the checkpoint's run began with as it is now (model.path, reference.path, model.tokenizer: digests).
    Raises UserError: a damaged checkpoint, one of another model, or a fact that differs from the recorded one.
    """
    from rpo.runs import checkpoint

    found = checkpoint.read(folder)
    for key, now in facts.items():
        then = found.state["facts"].get(key)
        if then is not None and then != now:
            raise UserError(
                f"{folder}: its run began with {key} of digest {then[:24]}, now it is {now[:24]}; restore it"
            )
    shard.reshard(model.policy)
    found.lay_over(model.weights)


def identity_of(path: str, revision: str | None) -> str:
    """What changes when the model at `path` does: a folder's files with sizes and times, or a Hub name and revision."""
    files = sorted(Path(path).expanduser().glob("*")) if Path(path).expanduser().is_dir() else []
    return json.dumps([path, revision, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)])


def sampling_of(task: Answers) -> "Sampling":
    """As a task's settings say: temperature, top_p and max_new_tokens, and top_k where it has one."""
    from rpo.model.sampling import Sampling

    return Sampling(task.temperature, task.top_p, getattr(task, "top_k", 0), task.max_new_tokens)


class Answer(NamedTuple):
    """`text` without the stop token; `ended` where the model came to one, else it was cut at max_new_tokens; `ids`: its
    `tokens`, stop token included."""

    text: str
    tokens: int
    ended: bool
    ids: Sequence[int] = ()


class Prompts(NamedTuple):
    """`ids` as training would make them; `said` as their rows say them; `places`: FILE:LINE of each."""

    ids: list[list[int]]
    said: list["str | Messages"]
    places: list[str]


# ---- one evaluation


class Context:
    """Everything that the evaluation `cfg` reads or writes. All methods are collectives.

    The folder is chosen at once and made by `begin`, which whatever writes or loads a model calls first: an evaluation
    that is refused for its settings or data leaves nothing. Raises UserError where run_dir holds another evaluation.
    """

    def __init__(self, cfg: Eval, device: torch.device):
        if cfg.judge.model is not None:
            client.check(cfg.judge)
        self.cfg, self.device = cfg, device
        self.paths = listed(cfg.model.path)
        done = cfg.run_dir is not None and dist.on_main((Path(cfg.run_dir).expanduser() / "results.json").exists)
        marks = "results.json" if done else "config.yaml"
        self.run_dir = run_folder.choose(cfg.run_dir, f"eval_{cfg.task.kind}", continues=marks)
        self._seen = run_folder.stamp(self.run_dir)
        dist.on_main(self._check_resumes)
        self._stack, self._begun = ExitStack(), False
        self._opened: dict[str, tuple[PreTrainedTokenizerBase, int]] = {}
        self._loaded: tuple[str, Loaded] | None = None
        self._stores: dict[str, Store] = {}
        self._account = client.Account()

    def __enter__(self) -> "Context":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._loaded = None
        self._stack.__exit__(*raised)

    def _check_resumes(self) -> None:
        file = self.run_dir / "config.yaml"
        if not file.is_file() and not (self.run_dir / "results.json").exists():
            return
        there = config.read_yaml(file)
        if not isinstance(there, dict) or "task" not in there:
            raise UserError(
                f"run_dir={self.run_dir}: already contains a different kind of run (config.yaml); choose another folder"
            )
        begun = {path.name for path in self.run_dir.iterdir()} - _OWN_FILES
        here = redacted(config.to_dict(self.cfg))
        if begun and (differing := config.differences(there, here, config.may_change(Eval))):
            raise UserError(
                f"run_dir={self.run_dir}: holds an evaluation with other settings ({'; '.join(differing[:5])}); give its "
                "settings, or another run_dir"
            )

    def begin(self) -> None:
        """Makes and locks the folder, and from now on keeps status.json true; the second call does nothing."""
        if not self._begun:
            self._begun = True
            settings = config.to_yaml(self.cfg)
            self._stack.enter_context(run_folder.recording(self.run_dir, settings, seen=self._seen))
            if dist.is_main():
                folder = redacted(str(self.run_dir))
                print(f"to resume after an interruption, repeat this command with run_dir={folder}", flush=True)

    def store(self, name: str) -> Store:
        """RUN_DIR/NAME.jsonl."""
        if name not in self._stores:
            self.begin()
            self._stores[name] = Store(self.run_dir / f"{name}.jsonl")
        return self._stores[name]

    # ---- what the models' own runs say

    @cached_property
    def runs(self) -> list[dict | None]:
        """The settings of the run that each model is the model/ of; None for any other model."""
        return [run_folder.settings_of(path) for path in self.paths]

    def from_runs(self, key: str) -> str | list[str]:
        """What all the models' runs used for `key`; UserError where one has no run, or used nothing or something else."""
        group, name = key.split(".")
        if None in self.runs:
            raise UserError(f"{key}=null: a model is not the model/ of a run, so there is none to take; give {key}=...")
        used = [run[group][name] for run in self.runs]
        if key == "reference.path":  # a run without one was compared with its own starting weights
            used = [value or run["model"]["path"] for value, run in zip(used, self.runs, strict=True)]
        if used[0] is None or any(value != used[0] for value in used):
            raise UserError(
                f"{key}=null: the models' runs used {' and '.join(sorted(set(map(str, used))))}; give {key}=..."
            )
        return used[0]

    def note_other_settings(self) -> None:
        """Says where rows are read otherwise than in a model's own run, so that the numbers may differ from its own."""
        for path, run in zip(self.paths, self.runs, strict=True):
            for name in ("max_length", "truncation", "template_date", "chat_template", "on_bad_row"):
                ours, theirs = getattr(self.cfg.data, name), run["data"][name] if run else None
                if run is not None and ours != theirs and dist.is_main():
                    print(f"note: data.{name}={ours}, but the run of {path} had {theirs}", flush=True)

    # ---- data, before a model is loaded

    @cached_property
    def configs(self) -> dict[str, "PretrainedConfig"]:
        """The models' configs, and the reference's once `reference_path` was asked for, by what names them."""
        from rpo.model import hf

        given = self.cfg.model
        return {
            f"model.path={path}": hf.check(path, given.revision, trust_remote_code=given.trust_remote_code)
            for path in self.paths
        }

    @cached_property
    def reference_path(self) -> str:
        """reference.path, or what the models' runs started from."""
        from rpo.model import hf

        configs, trust = self.configs, self.cfg.model.trust_remote_code  # the models are checked first
        path = self.cfg.reference.path or self.from_runs("reference.path")
        configs[f"reference.path={path}"] = hf.check(path, key="reference.path", trust_remote_code=trust)
        return path

    @cached_property
    def data(self) -> str | list[str]:
        """data.eval, or what the models' runs were evaluated on."""
        return self.cfg.data.eval or self.from_runs("data.eval")

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """model.tokenizer, or the first model's."""
        return self._tokenizer(self.paths[0])

    def _tokenizer(self, path: str) -> "PreTrainedTokenizerBase":
        from rpo.data.tokenizer import load_tokenizer

        given = self.cfg.model
        return load_tokenizer(
            given.tokenizer or path,
            revision=given.revision,
            chat_template=self.cfg.data.chat_template,
            trust_remote_code=given.trust_remote_code,
        )

    @cached_property
    def positions(self) -> int:
        from rpo.model import hf

        return hf.positions_of(self.configs)

    def pairs(self, limit: int | None) -> tuple["Rows", dict]:
        """The first `limit` preference pairs of the data, and the report on all. Raises UserError: too long for a model."""
        from rpo.data import batch as data_batch
        from rpo.data import dataset
        from rpo.model import hf

        cache = Path(self.cfg.cache_dir).expanduser()
        with dist.main_first():  # rank 0 tokenises into the cache, the others read it
            rows, report = dataset.load(self.data, self.cfg.data, self.tokenizer, pairs=True, cache_dir=cache)
        rows = rows.head(limit or len(rows))
        hf.check_fit(self.configs, self.tokenizer, data_batch.longest(rows))
        return rows, report

    def prompts(self, limit: int | None, max_new_tokens: int) -> tuple[Prompts, dict]:
        """The first `limit` prompts of the data, and the report on all. Raises UserError: no room for the answers."""
        from rpo.data import dataset
        from rpo.model import hf

        ids, said, places, report = dataset.load_prompts(self.data, self.cfg.data, self.tokenizer)
        prompts = Prompts(ids[:limit], said[:limit], [redacted(place) for place in places[:limit]])
        _note_unknown(self.paths[0], self.tokenizer, prompts.ids)
        longest = max(map(len, prompts.ids))
        _check_room(self.positions, longest, max_new_tokens)
        hf.check_fit(self.configs, self.tokenizer, longest)
        return prompts, report

    def write_report(self, report: dict) -> None:
        """data_report.json: what became of the rows that were read."""
        self.begin()
        dist.on_main(run_folder.write_json, self.run_dir / "data_report.json", report)

    # ---- models

    def identity(self, path: str) -> str:
        """A digest of what the model at `path` is known by on disk, and of the dtype that it computes in."""
        return short_hash(dist.on_main(identity_of, path, self.cfg.model.revision), str(self.cfg.model.dtype))

    def model(self, path: str) -> Loaded:
        """The model at `path`, of model.path; the one before it is let go."""
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None
            gc.collect()  # a sharded model is full of cycles; the next one needs its memory
            self._loaded = path, self._load((path, self.cfg.model.revision), "model.path")
        return self._loaded[1]

    @cached_property
    def reference(self) -> Loaded:
        """The reference. Raises UserError where it is a run's and its weights are not those that the run recorded."""
        loaded = self._load((self.reference_path, None), "reference.path")
        if self.cfg.reference.path is None:
            self._check_reference(loaded)
        return loaded

    def _load(self, source: tuple[str, str | None], key: str) -> Loaded:
        self.begin()
        given = self.cfg.model
        trust = given.trust_remote_code
        return load(source, key, self.device, dtype=given.dtype, asked="auto", trust_remote_code=trust)

    def _check_reference(self, loaded: Loaded) -> None:
        from rpo.model import shard

        def width(dtype: str) -> torch.dtype:
            return torch.promote_types(shard.compute_dtype(dtype, self.device), torch.float32)

        for path, run in zip(self.paths, self.runs, strict=True):
            then = _recorded_reference(Path(path).parent / "environment.json")
            same_width = width(self.cfg.model.dtype) == width(run["model"]["dtype"])  # digests are of all bits
            if same_width and then not in (None, loaded.digest):
                raise UserError(
                    f"reference.path=null: the run of {path} was compared with {self.reference_path} of digest "
                    f"{then[:24]}, now it is {loaded.digest[:24]}; restore it, or give "
                    f"reference.path={self.reference_path} to compare with its present weights"
                )

    # ---- answers

    def answer(
        self, path: str, conversations: Sequence["str | Messages"], sampling: "Sampling | Sequence[Sampling]"
    ) -> list[Answer]:
        """One answer of the model at `path` per conversation, in order, by its own tokenizer.

        Messages end in a user turn and take the chat template; a string is tokenised as it is. Raises UserError: no such
        model, a template that refuses the messages, no room for the answer. Samples depend on cfg.seed, the conversations
        and the batch size, and neither on ranks nor on where an earlier start was killed.
        """
        from rpo.data.tokenizer import encode_prompt
        from rpo.model.sampling import Sampling

        tokenizer, positions = self._open(path)
        prompts = [encode_prompt(tokenizer, said, self.cfg.data.template_date) for said in conversations]
        _note_unknown(path, tokenizer, prompts)
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        for prompt, own in zip(prompts, each, strict=True):  # of all, before the first is answered
            _check_room(positions, len(prompt), own.max_new_tokens, f" {path}")
        found: dict[int, Answer] = {}
        for group, own in enumerate(dict.fromkeys(each)):
            members = [i for i, other in enumerate(each) if other == own]
            for start, chunk in self._chunks(members):
                some, seed = [prompts[i] for i in chunk], [self.cfg.seed, group, start]
                found |= zip(chunk, self._sampled(path, tokenizer, some, own, seed, first=0), strict=True)
        return [found[i] for i in range(len(prompts))]

    def complete(self, path: str, prompts: Sequence[list[int]], sampling: "Sampling") -> list[Answer]:
        """One answer of the model at `path` per prompt (ids by `tokenizer`), in order; resumes as `answer` does."""
        found = []
        for start, chunk in self._chunks(prompts):
            first = start // self.cfg.task.batch_size
            found += self._sampled(path, self.tokenizer, chunk, sampling, [self.cfg.seed], first=first)
        return found

    def _chunks(self, items: Sequence[Any]) -> list[tuple[int, Sequence[Any]]]:
        """(start, the items that are sampled between two writes)."""
        size = CHUNK * self.cfg.task.batch_size
        return [(start, items[start : start + size]) for start in range(0, len(items), size)]

    def _sampled(
        self,
        path: str,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: Sequence[list[int]],
        sampling: "Sampling",
        seed: list[int],
        *,
        first: int,
    ) -> list[Answer]:
        """The answers to `prompts`: those on disk where all of them are, else sampled now and written."""
        from rpo.data.tokenizer import stop_ids
        from rpo.model.sampling import sample

        size = self.cfg.task.batch_size
        key = short_hash(self.identity(path), str(sampling), [seed, first, size, *prompts])

        def compute() -> list[Answer]:
            completions = sample(
                self.model(path).policy,
                prompts,
                sampling,
                stop_ids(tokenizer, self.cfg.data.template_date),
                device=self.device,
                seed=seed,
                batch_size=size,
                reshard=True,
                first=first,
            )
            texts = tokenizer.batch_decode([one.text_ids for one in completions])
            return [
                Answer(text, len(one.ids), one.ended, one.ids) for text, one in zip(texts, completions, strict=True)
            ]

        return [Answer(*each) for each in self.store("answers").once(key, compute, model=path)]

    def _open(self, path: str) -> tuple["PreTrainedTokenizerBase", int]:
        """The tokenizer of `path`, and how many positions the model has."""
        if path not in self._opened:
            from rpo.model import hf

            given = self.cfg.model
            found = hf.check(path, given.revision, trust_remote_code=given.trust_remote_code)
            tokenizer = self._tokenizer(path)
            hf.check_fit({f"model.path={path}": found}, tokenizer, 1)
            self._opened[path] = tokenizer, hf.positions_of({path: found})
        return self._opened[path]

    # ---- the judge

    def ask(self, requests: Sequence["Request"]) -> list["Reply"]:
        """The judge's replies, in the order of the requests; those of an earlier start come from the cache."""
        self.begin()
        cache = Path(self.cfg.cache_dir).expanduser() / "judgments"
        return judge.ask(requests, self.cfg.judge, cache, self._account)


def _recorded_reference(environment: Path) -> str | None:
    """The digest of the weights that a run had for its reference; None where nothing says so."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return run_folder.read_json(environment)["reference"]["train"]["weights"]
    return None


def _check_room(positions: int, longest: int, max_new_tokens: int, model: str = "") -> None:
    room = positions - longest
    if max_new_tokens > room:
        raise UserError(
            f"task.max_new_tokens={max_new_tokens}: the longest prompt is {longest} tokens and the context of the model"
            f"{model} is {positions}; set task.max_new_tokens={max(room, 0)} or less"
        )


def _note_unknown(path: str, tokenizer: "PreTrainedTokenizerBase", prompts: list[list[int]]) -> None:
    """Says so where more than 1% of the prompts' tokens are unknown to the model's tokenizer."""
    from rpo.data.tokenizer import unknown_share

    if (share := unknown_share(tokenizer, prompts)) > UNKNOWN and dist.is_main():
        print(redacted(f"note: {path}: its tokenizer does not know {share:.0%} of the prompts' tokens"), flush=True)
