"""What a task runs on: a run folder that it resumes in; models, their answers, the reference and a judge, opened on demand.

RUN_DIR/answers.jsonl    answers of models, as they are sampled
RUN_DIR/points.jsonl     whatever else a task has computed so far

Importing this module is cheap: what needs transformers is imported where it is used.
"""

import gc
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rpo import config, dist
from rpo.errors import UserError
from rpo.evals.settings import Answers, Eval, answerers
from rpo.evals.store import Store
from rpo.files import short_hash
from rpo.judging import client, judge
from rpo.model.stored import identity_of
from rpo.runs import folder as run_folder
from rpo.text import redacted

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from rpo.data.dataset import Rows
    from rpo.data.formats import Messages
    from rpo.judging.client import Reply, Request
    from rpo.model.policy import Loaded
    from rpo.model.sampling import Sampling

UNKNOWN = 0.01  # share of unknown tokens that is reported: answers to prompts that cannot be read look like any others
CHUNK = 8  # batches between two writes; not the number of ranks, or the samples would depend on it
_READ_BY = "revision max_length truncation template_date chat_template chat_template_kwargs on_bad_row".split()
_OWN_FILES = {"config.yaml", "status.json", "lock"}  # of a folder in which nothing was computed yet


def sampling_of(task: Answers) -> "Sampling":
    """As a task's settings say: temperature, top_p and max_new_tokens, and top_k where it has one."""
    from rpo.model.sampling import Sampling

    return Sampling(task.temperature, task.top_p, getattr(task, "top_k", 0), task.max_new_tokens)


def tokenizer_of(cfg: Eval, path: str) -> "PreTrainedTokenizerBase":
    """model.tokenizer, or that of the model at `path`."""
    from rpo.data.tokenizer import load_tokenizer

    model = cfg.model
    name, template, trust = model.tokenizer or path, cfg.data.chat_template, model.trust_remote_code
    return load_tokenizer(name, revision=model.revision, chat_template=template, trust_remote_code=trust)


class Answer(NamedTuple):
    """`text` without the stop token; `ended`: the model came to one, and was not cut; `ids`: the tokens, stop token included."""

    text: str
    tokens: int
    ended: bool
    ids: Sequence[int] = ()


class Prompts(NamedTuple):
    """`ids` as training would make them; `texts` as their rows have them; `places`: FILE:LINE of each."""

    ids: list[list[int]]
    texts: list["str | Messages"]
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
        if cfg.server.model is not None:
            client.check(cfg.server.asked("", 0, 1))
        self.cfg, self.device = cfg, device
        self.paths = answerers(cfg)
        is_done = cfg.run_dir is not None and dist.on_main((Path(cfg.run_dir).expanduser() / "results.json").exists)
        continues = "results.json" if is_done else "config.yaml"
        self.run_dir = run_folder.choose(cfg.run_dir, f"eval_{cfg.task.kind}", continues=continues)
        self._seen = run_folder.stamp(self.run_dir)
        dist.on_main(self._check_resumes)
        self._stack, self._has_begun = ExitStack(), False
        self._opened: dict[str, tuple[PreTrainedTokenizerBase, dict[str, PretrainedConfig]]] = {}
        self._loaded: tuple[str, Loaded] | None = None
        self._stores: dict[str, Store] = {}
        self._account = client.Account()
        self.notes: list[str] = []  # on answers of a server

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
            raise UserError(f"run_dir={self.run_dir}: already contains a different kind of run; choose another folder")
        computed = {path.name for path in self.run_dir.iterdir()} - _OWN_FILES
        here = redacted(config.to_dict(self.cfg))
        if computed and (differing := config.differences(there, here, config.may_change(Eval))):
            changed = "; ".join(differing[:5])
            raise UserError(f"run_dir={self.run_dir}: holds an evaluation with other settings ({changed}); use another")

    def begin(self) -> None:
        """Makes and locks the folder, and from now on keeps status.json true; the second call does nothing."""
        if not self._has_begun:
            self._has_begun = True
            settings = config.to_yaml(self.cfg)
            self._stack.enter_context(run_folder.recording(self.run_dir, settings, seen=self._seen))
            print_main(f"to resume after an interruption, repeat this command with run_dir={self.run_dir}")

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
            values = " and ".join(sorted(set(map(str, used))))
            raise UserError(f"{key}=null: the models' runs used {values}; give {key}=...")
        return used[0]

    # ---- data, before a model is loaded

    @cached_property
    def configs(self) -> dict[str, "PretrainedConfig"]:
        """The models' configs, and the reference's once `reference_path` was asked for, by what names them."""
        from rpo.model import hf

        revision, trust = self.cfg.model.revision, self.cfg.model.trust_remote_code
        return {f"model.path={path}": hf.check(path, revision, trust_remote_code=trust) for path in self.paths}

    @cached_property
    def reference_path(self) -> str:
        """reference.path, or what the models' runs started from."""
        from rpo.model import hf

        configs, trust = self.configs, self.cfg.model.trust_remote_code  # the models are checked first
        path, revision = self.cfg.reference.path or self.from_runs("reference.path"), self._reference_revision
        configs[f"reference.path={path}"] = hf.check(path, revision, key="reference.path", trust_remote_code=trust)
        self._check_vocabulary(self.tokenizer, path, "reference.path", revision)
        return path

    @property
    def _reference_revision(self) -> str | None:
        """What the first model's run started from, where that is the reference."""
        own = self.cfg.reference.path is None and self.runs[0]["reference"]["path"] is None
        return self.runs[0]["model"]["revision"] if own else None

    @cached_property
    def data(self) -> str | list[str]:
        """data.eval, or what the models' runs were evaluated on."""
        return self.cfg.data.eval or self.from_runs("data.eval")

    @cached_property
    def data_facts(self) -> dict[str, str | list[str]]:
        """For an evaluation's details: the data's name, and a digest of its content, without which FILE:LINE names no row."""
        from rpo.data.sources import open_sources

        sources = dist.on_main(lambda: [one.digest for one in open_sources(self.data, self.cfg.data.revision)])
        return {"files": self.data, "digest": short_hash(sources)}

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """model.tokenizer, or the first model's. Raises UserError where another model's contradicts it."""
        tokenizer = tokenizer_of(self.cfg, self.paths[0])
        for path in self.paths[1:] if self.cfg.model.tokenizer is None else self.paths:
            self._check_vocabulary(tokenizer, path, "model.path", self.cfg.model.revision)
        return tokenizer

    def _check_vocabulary(
        self, tokenizer: "PreTrainedTokenizerBase", path: str, key: str, revision: str | None
    ) -> None:
        from rpo.data.tokenizer import check_vocabulary

        check_vocabulary(tokenizer, path, revision, key=key, trust=self.cfg.model.trust_remote_code)

    @cached_property
    def positions(self) -> int:
        from rpo.model import hf

        return hf.positions_of(self.configs)

    def pairs(self, limit: int | None) -> tuple["Rows", str]:
        """The first `limit` preference pairs of the data, and the digest of all, on which it writes the report.

        Raises UserError: too long for a model.
        """
        from rpo.data import batch, dataset
        from rpo.model import hf

        cache = Path(self.cfg.cache_dir).expanduser()
        with dist.main_first():  # rank 0 tokenises into the cache, the others read it
            rows, report = dataset.load(self.data, self.cfg.data, self.tokenizer, pairs=True, cache_dir=cache)
        rows = rows.head(limit or len(rows))
        hf.check_fit(self.configs, batch.longest(rows), int(rows.ids.max()))
        self._report(report)
        return rows, report["cache_key"]

    def prompts(self, limit: int | None, max_new_tokens: int, path: str | None = None) -> Prompts:
        """The first `limit` prompts of the data as the model at `path` (None: the first) is asked them.

        Writes the report on all of them. Raises UserError: no room for answers.
        """
        from rpo.data import dataset
        from rpo.model import hf

        first, path = self.tokenizer, path or self.paths[0]  # the vocabularies of all are checked first
        tokenizer = first if path == self.paths[0] else self._open(path)[0]
        ids, texts, places, report = dataset.load_prompts(self.data, self.cfg.data, tokenizer)
        prompts = Prompts(ids[:limit], texts[:limit], [redacted(place) for place in places[:limit]])
        _note_unknown(path, tokenizer, prompts.ids)
        longest = max(map(len, prompts.ids))
        check_room(self.positions, longest, max_new_tokens)
        hf.check_fit(self.configs, longest, max(map(max, prompts.ids)))
        self._report(report)
        return prompts

    def _report(self, report: dict) -> None:
        """Writes it, and says where rows are read otherwise than in a model's own run: numbers may differ from its own."""
        for path, run in zip(self.paths, self.runs, strict=True):
            for name in _READ_BY:
                if run is not None and (ours := getattr(self.cfg.data, name)) != run["data"][name]:
                    print_main(f"note: data.{name}={ours}, but the run of {path} had {run['data'][name]}")
        self.write_report(report)

    def write_report(self, report: dict) -> None:
        """data_report.json: what became of the rows that were read."""
        self.begin()
        dist.on_main(run_folder.write_json, self.run_dir / "data_report.json", report)

    # ---- models

    def identity(self, path: str) -> str:
        """A digest of what the model at `path` is known by on disk, and of what computes with it: dtype, device, versions."""
        from rpo.model.shard import compute_dtype

        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        computes = [
            str(compute_dtype(self.cfg.model.dtype, self.device)),
            kind,
            version("torch"),
            version("transformers"),
        ]
        return short_hash(dist.on_main(identity_of, path, self.cfg.model.revision), computes)

    def model(self, path: str) -> "Loaded":
        """The model at `path`, of model.path; the one before it is let go."""
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None
            gc.collect()  # a sharded model is full of cycles; the next one needs its memory
            self._loaded = path, self._load(path, self.cfg.model.revision, "model.path")
        return self._loaded[1]

    @cached_property
    def reference(self) -> "Loaded":
        """The reference. Raises UserError where it is a run's and its weights are not those that the run recorded."""
        loaded = self._load(self.reference_path, self._reference_revision, "reference.path")
        if self.cfg.reference.path is None:
            self._check_reference(loaded.digest)
        return loaded

    def _load(self, path: str, revision: str | None, key: str) -> "Loaded":
        from rpo.model.policy import load_policy

        self.begin()
        dtype, trust = self.cfg.model.dtype, self.cfg.model.trust_remote_code
        return load_policy(path, revision, device=self.device, dtype=dtype, key=key, trust_remote_code=trust)

    def _check_reference(self, digest: str) -> None:
        from rpo.model import shard

        def width(dtype: str) -> torch.dtype:
            return torch.promote_types(shard.compute_dtype(dtype, self.device), torch.float32)

        for path, run in zip(self.paths, self.runs, strict=True):
            then = None  # the digest of the weights that the run had for its reference; an old run does not say
            with suppress(OSError, ValueError, KeyError, TypeError):
                environment = run_folder.read_json(Path(path).parent / "environment.json")
                then = environment["reference"]["train"]["weights"]
            same_width = width(self.cfg.model.dtype) == width(run["model"]["dtype"])  # digests are of all bits
            if same_width and then not in (None, digest):
                raise UserError(
                    f"reference.path=null: the run of {path} was compared with {self.reference_path} of digest "
                    f"{then[:24]}, now it is {digest[:24]}; restore it, or give "
                    f"reference.path={self.reference_path} to compare with its present weights"
                )

    # ---- answers

    def answer(
        self, path: str, conversations: Sequence["str | Messages"], sampling: "Sampling | Sequence[Sampling]"
    ) -> list[Answer]:
        """One answer of the model at `path`, or of that name on the server, per conversation, in order, by its own tokenizer.

        Messages end in a user turn and take the chat template; a string is tokenised as it is. Raises UserError: no such
        model, a template that refuses the messages, no room for the answer. Samples depend on cfg.seed, the conversations
        and the batch size, and neither on ranks nor on where an earlier start was killed.
        """
        from rpo.data.chat import Chat
        from rpo.data.tokenizer import encode_prompt
        from rpo.evals import served
        from rpo.model import hf
        from rpo.model.sampling import Sampling

        if self.cfg.server.model is not None:
            self.begin()
            each = [sampling] * len(conversations) if isinstance(sampling, Sampling) else list(sampling)
            replies = served.ask(path, conversations, each, self.cfg, self.run_dir / "answers", self._account)
            self.notes += (noted := served.notes(path, replies))
            for note in noted:
                print_main(f"note: {note}")
            return [Answer(one.text, one.output_tokens, one.finish_reason != "length") for one in replies]
        tokenizer, configs = self._open(path)
        prompts = [encode_prompt(tokenizer, text, Chat.of(self.cfg.data)) for text in conversations]
        _note_unknown(path, tokenizer, prompts)
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        for prompt, own in zip(prompts, each, strict=True):  # of all, before the first is answered
            check_room(hf.positions_of(configs), len(prompt), own.max_new_tokens, f" {path}")
            hf.check_fit(configs, len(prompt), max(prompt))
        answers: dict[int, Answer] = {}
        for group, own in enumerate(dict.fromkeys(each)):
            members = [i for i, other in enumerate(each) if other == own]
            for start, chunk in self._chunks(members):
                some, seed = [prompts[i] for i in chunk], [self.cfg.seed, group, start]
                answers |= zip(chunk, self._sampled(path, tokenizer, some, own, seed), strict=True)
        return [answers[i] for i in range(len(prompts))]

    def complete(self, path: str, prompts: Sequence[list[int]], sampling: "Sampling") -> list[Answer]:
        """One answer of the model at `path` per prompt (ids by its tokenizer), in order; resumes as `answer` does."""
        answers, tokenizer = [], self._open(path)[0]
        for start, chunk in self._chunks(prompts):
            first = start // self.cfg.task.batch_size
            answers += self._sampled(path, tokenizer, chunk, sampling, [self.cfg.seed], first)
        return answers

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
        first: int = 0,
    ) -> list[Answer]:
        """The answers to `prompts`: those on disk where all of them are, else sampled now and written."""
        from rpo.data.chat import Chat
        from rpo.data.tokenizer import stop_ids
        from rpo.model.sampling import sample

        size, stops = self.cfg.task.batch_size, stop_ids(tokenizer, Chat.of(self.cfg.data))
        key = short_hash(self.identity(path), str(sampling), [seed, first, size, *prompts])

        def compute() -> list[Answer]:
            policy, device = self.model(path).policy, self.device
            completions = sample(
                policy, prompts, sampling, stops, device=device, seed=seed, batch_size=size, reshard=True, first=first
            )
            texts = tokenizer.batch_decode([one.text_ids for one in completions])
            both = zip(texts, completions, strict=True)
            return [Answer(text, len(one.ids), one.ended, one.ids) for text, one in both]

        return [Answer(*each) for each in self.store("answers").once(key, compute, model=path)]

    def _open(self, path: str) -> tuple["PreTrainedTokenizerBase", dict[str, "PretrainedConfig"]]:
        """The tokenizer of `path`, and the model's config by what names it."""
        from rpo.model import hf

        if path not in self._opened:
            model = self.cfg.model
            configs = {f"model.path={path}": hf.check(path, model.revision, trust_remote_code=model.trust_remote_code)}
            self._opened[path] = tokenizer_of(self.cfg, path), configs
        return self._opened[path]

    # ---- the judge

    def ask(self, requests: Sequence["Request"]) -> list["Reply"]:
        """The judge's replies, in the order of the requests; those of an earlier start come from the cache."""
        self.begin()
        cache = Path(self.cfg.cache_dir).expanduser() / "judgments"
        return judge.ask(requests, self.cfg.judge, cache, self._account)


def check_room(positions: int, longest: int, max_new_tokens: int, model: str = "") -> None:
    """Raises UserError where `max_new_tokens` do not fit behind the longest prompt; `model` says which, after "the model"."""
    room = positions - longest
    if max_new_tokens > room:
        raise UserError(
            f"task.max_new_tokens={max_new_tokens}: the longest prompt is {longest} tokens and the context of the model"
            f"{model} is {positions}; set task.max_new_tokens={max(room, 0)} or less"
        )


def _note_unknown(path: str, tokenizer: "PreTrainedTokenizerBase", prompts: list[list[int]]) -> None:
    """Says so where more than 1% of the prompts' tokens are unknown to the model's tokenizer."""
    from rpo.data.tokenizer import unknown_share

    if (share := unknown_share(tokenizer, prompts)) > UNKNOWN:
        print_main(f"note: {path}: its tokenizer does not know {share:.0%} of the prompts' tokens")


def print_main(line: str) -> None:
    """Prints `line` on rank 0 alone, without secrets."""
    if dist.is_main():
        print(redacted(line), flush=True)
