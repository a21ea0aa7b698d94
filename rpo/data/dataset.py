"""Tokenised rows, and a report that accounts for every row that was read.

Letters: P, C, R token counts of a row's prompt, chosen and rejected response; max_length bounds P + max(C, R).
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rpo import dist
from rpo.config import Data, EvalData, Model
from rpo.data import parts, repeats
from rpo.data.batch import longest
from rpo.data.chat import Chat, alike, closing, left_out
from rpo.data.formats import Example, Messages, RowError, is_empty, parse, parse_prompt
from rpo.data.parts import Kept, Part
from rpo.data.sources import UNINFORMATIVE, WELL_FORMED, Source, Spec, check_file, open_sources, parse_rows
from rpo.data.tokenizer import (
    Encoded,
    Facts,
    encode,
    facts_of,
    identity,
    load_tokenizer,
    prompt_ids,
    texts_of,
    tokenize,
    with_bos,
    with_eos,
)
from rpo.errors import UserError
from rpo.files import digest, read_arrays, sha256, write_arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = 7  # raise it when the tokens of the same rows change: it is part of the cache's key
BATCH = 1024  # rows tokenised in one call


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokenised rows, each laid out [prompt | chosen | rejected]; every response token is scored."""

    ids: np.ndarray  # int32, all rows end to end
    prompt: np.ndarray  # int32 P, per row
    chosen: np.ndarray  # int32 C
    rejected: np.ndarray  # int32 R, 0 in supervised rows
    file: np.ndarray  # int32, index into files
    line: np.ndarray  # int32, 1-based line (jsonl) or row number
    files: tuple[str, ...]
    ref_logps: np.ndarray | None = None  # float64 (rows, 2): the reference's log-probs of chosen and rejected, in nats

    @classmethod
    def of(cls, triples: Sequence[Sequence[Sequence[int]]], name: str) -> Rows:
        """Rows of prompt, chosen and rejected ids that are in no file; `name` is what their places begin with."""
        sizes = np.array([[len(part) for part in triple] for triple in triples], np.int32)
        ids = np.concatenate([part for triple in triples for part in triple]).astype(np.int32)
        number = np.arange(1, len(triples) + 1, dtype=np.int32)
        return cls(ids, *np.ascontiguousarray(sizes.T), file=np.zeros_like(number), line=number, files=(name,))

    def __len__(self) -> int:
        return len(self.prompt)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64, where each row begins in `ids`, and one last entry for where they end."""
        return np.concatenate([[0], np.cumsum(self.prompt + self.chosen + self.rejected, dtype=np.int64)])

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The prompt, chosen and rejected ids of row `i`, views into `ids`."""
        ids = self.ids[self.starts[i] : self.starts[i + 1]]
        border = self.prompt[i] + self.chosen[i]
        return ids[: self.prompt[i]], ids[self.prompt[i] : border], ids[border:]

    def where(self, i: int) -> str:
        """FILE:LINE that row `i` was read from."""
        return f"{self.files[self.file[i]]}:{self.line[i]}"

    def head(self, count: int) -> Rows:
        """The first `count` rows (all, where there are fewer)."""
        first = {name: getattr(self, name)[:count] for name in ARRAYS if name != "ids"}
        return replace(self, ids=self.ids[: self.starts[: count + 1][-1]], **first)

    def take(self, indices: np.ndarray) -> Rows:
        """The rows at `indices`, in their order."""
        columns = {name: getattr(self, name)[indices] for name in ARRAYS if name != "ids"}
        ids = [self.ids[self.starts[i] : self.starts[i + 1]] for i in indices]
        return replace(self, ids=np.concatenate(ids) if ids else self.ids[:0], ref_logps=None, **columns)


ARRAYS = ("ids", "prompt", "chosen", "rejected", "file", "line")


# ---- one row


def _truncate(row: Encoded, tok: Facts, max_length: int, policy: str) -> Encoded | None:
    """The row cut to P + max(C, R) <= max_length by `data.truncation`, or None if it must be dropped."""
    (prompt, *responses), longest = row, max(map(len, row[1:]))
    if len(prompt) + longest <= max_length:
        return row
    if policy == "prompt_left":
        own = tok.prefix or [tok.bos]  # Llama and Gemma without their BOS are other models
        head = own if prompt[: len(own)] == own else []
        kept = max_length - longest - len(head)
        return Encoded(head + prompt[-kept:], *responses) if kept >= 1 else None
    room = max_length - len(prompt)
    return Encoded(prompt, *[side[:room] for side in responses]) if policy == "response_right" and room >= 1 else None


def _settle(
    tok: Facts, cfg: Data | EvalData, example: Example, texts: list[str], ids: list[list[int]], plain: str | None
) -> tuple[list[Encoded], dict[str, int]]:
    """(rows of an example, how often they are not what it says, by kind). Raises RowError if nothing is kept.

    `plain` is the `closing` of plain exchanges.
    """
    if any(is_empty(side) for side in (example.chosen, example.rejected) if side is not None):
        raise RowError("empty_response", "a response has no text")
    if example.prompt is None:
        document = with_eos(with_bos(ids[0], tok), tok)
        # Blocks of max_length tokens, every token but a block's first scored.
        starts = range(0, len(document) - 1, cfg.max_length)
        blocks = [Encoded(document[i : i + 1], document[i + 1 : i + cfg.max_length], []) for i in starts]
        lonely_eos = len(document) % cfg.max_length == 1  # alone in its block, with nothing to predict it from
        return blocks, {"lost_end_of_turn": 1} if lonely_eos else {}
    row = encode(tok, example, texts, ids, Chat.of(cfg), plain)
    if row.chosen == row.rejected:
        raise RowError("identical_responses", "chosen and rejected are the same tokens")
    cut = _truncate(row, tok, cfg.max_length, cfg.truncation)
    lengths = f"P={len(row.prompt)} C={len(row.chosen)} R={len(row.rejected)}, data.max_length={cfg.max_length}"
    if cut is None:
        raise RowError("too_long", lengths)
    if cut.chosen == cut.rejected:
        raise RowError("identical_after_truncation", lengths)
    lost = (cut.chosen != row.chosen) + (cut.rejected != row.rejected)
    changes = {"truncated_prompt": cut.prompt != row.prompt, "truncated_response": lost > 0, "lost_end_of_turn": lost}
    if isinstance(example.prompt, list):  # as with the reasoning of earlier turns
        changes["left_out_of_prompt"] = left_out(example.prompt, texts[0]) is not None
    return [cut], {kind: int(count) for kind, count in changes.items() if count}


# ---- all rows


def _tokenised(
    batch: list[tuple[int, Any]], cfg: Data | EvalData, tokenizer: PreTrainedTokenizerBase, pairs: bool
) -> Iterator[tuple[int, Example | RowError, list[str], list[list[int]]]]:
    """Line number, example (or its RowError), its texts and their ids, of each raw row."""
    chat, parsed = Chat.of(cfg), []
    for line, raw in batch:
        try:
            example = parse(raw, pairs, partial(alike, tokenizer, chat))
            texts = texts_of(tokenizer, example, chat)
            _check_size(example, texts, cfg, tokenizer)
            parsed.append((line, example, texts))
        except RowError as error:
            parsed.append((line, error, []))
    ids = iter(tokenize(tokenizer, [text for _, _, texts in parsed for text in texts]))
    for line, example, texts in parsed:
        yield line, example, texts, list(islice(ids, len(texts)))


def _check_size(example: Example, texts: list[str], cfg: Data | EvalData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RowError for a pair that its length alone says is dropped, before megabytes of it are tokenised."""
    if example.prompt is None or max(map(len, texts)) <= parts.CHARACTERS * cfg.max_length:
        return
    if example.chosen == example.rejected:
        raise RowError("identical_responses", "chosen and rejected are the same text")
    responses = texts[1:]
    if isinstance(example.prompt, list):  # whose texts are of the whole conversation
        responses = [text.removeprefix(texts[0]) for text in responses if text.startswith(texts[0])]
    decisive = {"drop": texts, "prompt_left": responses, "response_right": texts[:1]}[cfg.truncation]
    for text in decisive:
        if parts.is_over(tokenizer, text, cfg.max_length):
            raise RowError("too_long", f"{len(text)} characters, data.max_length={cfg.max_length}")


def _next_part(
    rows: Iterator[tuple[int, Any]], place: tuple[int, str, int], cfg: Data | EvalData, tokenizer: Any, pairs: bool
) -> tuple[Part, bool]:
    """(what the next rows became, until they or parts.SECONDS are out; whether there may be more).

    `place` is the file's index and name, and how many of its rows came before. Raises UserError as `load`.
    """
    file, name, start = place
    tok, part, end = facts_of(tokenizer), Part(), time.monotonic() + parts.SECONDS
    plain = None if tokenizer.chat_template is None else closing(tokenizer, Chat.of(cfg))
    with parts.progress(name, start, part):
        while batch := list(islice(rows, BATCH)):
            for line, example, texts, ids in _tokenised(batch, cfg, tokenizer, pairs):
                part.read += 1
                try:
                    if isinstance(example, RowError):
                        raise example
                    part.unread |= example.unread
                    encoded, changes = _settle(tok, cfg, example, texts, ids, plain)
                except RowError as error:
                    if cfg.on_bad_row == "error" and error.kind not in WELL_FORMED:
                        raise UserError(f"{name}:{line}: {error} (or data.on_bad_row=drop)") from None
                    part.dropped.add(error.kind, (file, line), str(error))
                    continue
                for kind, count in changes.items():
                    why = "a message's part" if kind == "left_out_of_prompt" else f"data.max_length={cfg.max_length}"
                    part.changed.add(kind, (file, line), why, count)
                if example.prompt is None:
                    part.documents, part.blocks = part.documents + 1, part.blocks + len(encoded)
                part.add(encoded, (file, line))
                for kind, why in repeats.odd(example):
                    part.noticed.add(kind, (file, line), why)
            if time.monotonic() > end:
                return part, True
    return part, False


def _build(
    sources: list[Source], cfg: Data | EvalData, tokenizer: PreTrainedTokenizerBase, pairs: bool, kept: Kept
) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of `Rows` and the report, from the files, or the `kept` parts of an earlier start. UserError as `load`."""
    whole, read_per_file = Part(), []
    for file, source in enumerate(sources):
        rows, before, uninformative, more = iter(source.rows()), whole.read, whole.dropped.count(*UNINFORMATIVE), True
        while more:
            start = whole.read - before
            if (part := kept.read(file, start)) is not None:
                next(islice(rows, part.read - 1, None))  # past what it holds
            else:
                part, more = _next_part(rows, (file, source.name, start), cfg, tokenizer, pairs)
                if more:
                    kept.write(file, start, part)
            whole.extend(part)
        read_per_file.append(whole.read - before)
        check_file(source.name, read_per_file[-1], whole.dropped.count(*UNINFORMATIVE) - uninformative)
    if not whole.ids:
        names = ", ".join(source.name for source in sources)
        counts = ", ".join(f"{entry['count']} {kind}" for kind, entry in whole.dropped.kinds.items())
        limits = f"data.max_length={cfg.max_length}, data.truncation={cfg.truncation}"
        raise UserError(f"{names}: none of {sum(read_per_file)} rows is left ({counts}; {limits}); change these")
    columns = np.column_stack([whole.lengths, whole.places]).astype(np.int32).T
    arrays = dict(zip(ARRAYS, (np.concatenate(whole.ids), *map(np.ascontiguousarray, columns)), strict=True))
    repeats.notice(Rows(**arrays, files=()), whole.noticed)
    report = {
        "read": sum(read_per_file),
        "read_per_file": read_per_file,
        "kept": sum(read_per_file) - whole.dropped.count(),
        "dropped": whole.dropped.kinds,
        "changed": whole.changed.kinds,
        "noticed": whole.noticed.kinds,
        "unread_columns": sorted(whole.unread),
        "text": {"documents": whole.documents, "blocks": whole.blocks},
        "rows": len(whole.ids),  # kept, with every block of a document a row
        "tokens": len(arrays["ids"]),
        "lengths": _quantiles(arrays),
    }
    return arrays, report


def _weighted(arrays: dict[str, np.ndarray], report: dict, sources: list[Source]) -> tuple[dict, dict]:
    """Arrays and report with each row as often as its part's weight says. Raises UserError where that is never."""
    times, part_of_file = np.zeros(len(arrays["file"]), np.int64), np.array([source.part for source in sources])
    for part in dict.fromkeys(part_of_file.tolist()):  # all files of a pattern together: rounded once
        of_part = np.flatnonzero(part_of_file[arrays["file"]] == part)
        first = sources[np.flatnonzero(part_of_file == part)[0]]
        weight = Fraction(str(first.weight))
        ends = [int((i + 1) * weight) for i in range(len(of_part))]
        if len(of_part) and not ends[-1]:
            raise UserError(f"{first.name}: weight={first.weight} of {len(of_part)} rows leaves none; raise it")
        times[of_part] = np.diff([0, *ends])
    chosen = np.repeat(np.arange(len(times)), times)
    rows = Rows(**arrays, files=()).take(chosen)
    arrays = {name: getattr(rows, name) for name in ARRAYS}
    of_rows = {"rows": len(rows), "tokens": len(rows.ids), "lengths": _quantiles(arrays)}
    return arrays, report | of_rows | {"weights": [source.weight for source in sources]}


def _quantiles(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, int]]:
    lengths = {name: arrays[name] for name in ("prompt", "chosen", "rejected")}
    lengths["total"] = sum(lengths.values())
    points = (0, 5, 50, 95, 100)
    return {
        name: {f"p{q}": int(v) for q, v in zip(points, np.percentile(values, points, method="nearest"), strict=True)}
        for name, values in lengths.items()
    }


def load(
    spec: Spec, cfg: Data | EvalData, tokenizer: PreTrainedTokenizerBase, *, pairs: bool, cache_dir: Path
) -> tuple[Rows, dict]:
    """The rows of `spec` as tokens, and a JSON-able report in which read = kept + all dropped.

    With `pairs` every row needs a rejected response; without, `rejected` is ignored (R = 0) and supervised forms are
    read too. The tokenizer has the chat template (`load_tokenizer`). Results are cached in `cache_dir`/tokens, keyed
    by the content of all inputs.

    Warns once of uninformative rows. Raises UserError: a file that cannot be read; the first malformed row, unless
    `cfg.on_bad_row` is drop; more than 5% uninformative rows in a file; no row left; messages without a chat template.
    """
    sources = open_sources(spec, cfg.revision)
    facts = [CODE_VERSION, version("transformers"), version("tokenizers"), *identity(tokenizer)]
    facts += [Chat.of(cfg), cfg.max_length, cfg.truncation, cfg.on_bad_row, pairs, *(s.digest for s in sources)]
    key = sha256(json.dumps(facts).encode())
    folder = Path(cache_dir).expanduser() / "tokens" / key
    if (cached := read_arrays(folder)) is None:
        kept = Kept(folder.with_name(f"{key}.parts"))  # of a start that was killed
        cached = _build(sources, cfg, tokenizer, pairs, kept)
        write_arrays(folder, *cached)
        kept.remove()
    arrays, report = cached
    if any(source.weight != 1 for source in sources):
        arrays, report = _weighted(arrays, report, sources)
    names = tuple(source.name for source in sources)
    report = {"files": list(names), **report, "cache_key": key}
    report |= {part: _named(report[part], names) for part in parts.TALLIES}
    if useless := {kind: report["dropped"][kind] for kind in UNINFORMATIVE if kind in report["dropped"]}:
        counts = ", ".join(f"{entry['count']} {kind} (first {entry['examples'][0]})" for kind, entry in useless.items())
        warnings.warn(f"dropped of {report['read']} rows: {counts}", stacklevel=2)
    return Rows(**arrays, files=names), report


def load_prompts(
    spec: Spec, cfg: EvalData, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[str | Messages], list[str], dict]:
    """The prompts of `spec` as the ids that training would use; as in the file; their places (FILE:LINE); a report.

    Reads every form that `load` reads, and rows without an answer: {prompt}, {messages}, {instruction, input}.
    Raises UserError as `load` does; a prompt longer than data.max_length is a bad row.
    """

    def encoded(row: Any) -> tuple[list[int], str | Messages]:
        example = parse_prompt(row)
        if len(str(example.prompt)) > parts.CHARACTERS * cfg.max_length:
            bare = example._replace(chosen="", rejected=None)
            if parts.is_over(tokenizer, texts_of(tokenizer, bare, Chat.of(cfg))[0], cfg.max_length):
                raise RowError("too_long", f"the prompt has over data.max_length={cfg.max_length} tokens")
        ids, prompt = prompt_ids(tokenizer, example, Chat.of(cfg)), example.prompt
        if not 1 <= len(ids) <= cfg.max_length:
            raise RowError("too_long", f"the prompt has {len(ids)} tokens, expected 1 to data.max_length")
        return ids, prompt

    sources = open_sources(spec, cfg.revision)
    rows, read, dropped = parse_rows(sources, encoded, cfg.on_bad_row)
    if not rows:
        raise UserError(f"data.eval={spec}: none of {read} rows has a prompt that is kept; give other data or settings")
    names = [source.name for source in sources]
    report = {"files": names, "read": read, "kept": len(rows), "dropped": _named(dropped.kinds, names)}
    return [ids for _, (ids, _) in rows], [prompt for _, (_, prompt) in rows], [place for place, _ in rows], report


@dataclass(frozen=True, eq=False)
class Splits:
    """A run's rows: data.train, data.eval (None without), the report of each, and their tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    train: Rows
    eval: Rows | None
    reports: dict[str, dict | None]

    @cached_property
    def by_name(self) -> dict[str, Rows]:
        """The rows of train and, if there is one, eval."""
        return {"train": self.train} | ({} if self.eval is None else {"eval": self.eval})

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text that a model will see: max of P + max(C, R)."""
        return max(map(longest, self.by_name.values()))

    @cached_property
    def largest_id(self) -> int:
        """The largest token id of any row."""
        return max(int(rows.ids.max()) for rows in self.by_name.values())

    @cached_property
    def used_ids(self) -> np.ndarray:
        """int64, each token id of any row once, in order."""
        is_used = np.zeros(self.largest_id + 1, bool)
        for rows in self.by_name.values():
            is_used[rows.ids] = True
        return np.flatnonzero(is_used)

    @cached_property
    def facts(self) -> dict[str, str]:
        """Digests of tokenizer and rows, by key, for a checkpoint to compare."""
        facts = {"model.tokenizer": digest(json.dumps(identity(self.tokenizer)).encode())}
        for name, rows in self.by_name.items():
            arrays = rows.ids, rows.prompt, rows.chosen, rows.rejected
            facts[f"data.{name}"] = f"{len(rows)} rows of {len(rows.ids)} tokens, {digest(*arrays)}"
        return facts

    @property
    def summary(self) -> str:
        """The rows kept and dropped in each split, and the columns that are not read, in one line."""
        parts, unread = [], set()
        for name, report in self.reports.items():
            if report:
                kinds = report["dropped"], report["changed"] | report["noticed"]
                dropped, told = (", ".join(f"{e['count']} {k}" for k, e in each.items()) for each in kinds)
                note = f" ({report['read']} read, dropped: {dropped})" if dropped else ""
                parts.append(f"{name} {report['rows']} rows{note}" + f" ({told})" * bool(told))
                unread |= set(report["unread_columns"])
        names = ", ".join(sorted(unread)[:9]) + ", ..." * (len(unread) > 9)
        return ", ".join(parts) + f"; columns not read: {names}" * bool(unread)

    def with_reference(self, logps: dict[str, np.ndarray]) -> Splits:
        """These splits with the reference's log-probs of each (float64, rows x 2)."""
        return replace(self, **{name: replace(self.by_name[name], ref_logps=sums) for name, sums in logps.items()})


def load_splits(cfg: Data, model: Model, *, pairs: bool, cache_dir: str) -> Splits:
    """The rows of data.train and data.eval, tokenised by rank 0 into the cache and read from there by all.

    `pairs`: rows need a rejected response. Raises UserError as `load` and `load_tokenizer` do.
    """
    tokenizer = load_tokenizer(
        model.tokenizer or model.path,
        revision=model.revision,
        chat_template=cfg.chat_template,
        trust_remote_code=model.trust_remote_code,
    )

    folder, held_out, held_out_report = Path(cache_dir), None, None
    with dist.main_first():
        train, train_report = load(cfg.train, cfg, tokenizer, pairs=pairs, cache_dir=folder)
        if cfg.eval is not None:
            held_out, held_out_report = load(cfg.eval, cfg, tokenizer, pairs=pairs, cache_dir=folder)
    if held_out is not None and dist.is_main():
        noticed = repeats.notice_train(held_out, train).kinds
        held_out_report["noticed"] |= _named(noticed, held_out.files)
    return Splits(tokenizer, train, held_out, {"train": train_report, "eval": held_out_report})


def _named(kinds: dict[str, dict], names: Sequence[str]) -> dict[str, dict]:
    """A tally's kinds with each example as one line of text."""
    return {
        kind: entry | {"examples": [f"{names[file]}:{line}: {why}" for file, line, why in entry["examples"]]}
        for kind, entry in kinds.items()
    }
