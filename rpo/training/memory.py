"""What a training step holds in each GPU's memory, before anything is started; and the keys that would make it fit.

    python -m rpo.training.memory recipe=paper_beta gpus=1 gib=139
    python -m rpo.training.memory model.path=DIR data=files data.train=FILE gpus=16 gib=79 fsdp.replicate_degree=2

`gpus` is the number of processes, `gib` what one GPU has; all else are train.py's keys. Nothing is fetched and no weight
is read: a model's sizes are in the config at model.path (a folder, or what transformers' cache has), or in the
model.architecture that a recipe gives beside its model.path.

Weights, gradients and moments are arithmetic; what FSDP2 gathers and reduces is worked out in `moments` as its code does it
(torch 2.13); the trunk's activations are `trace.trace`'s. tests/training/test_memory.py holds the sum to the allocator's peaks on a
CPU. Not counted: the CUDA context, NCCL's buffers, fragmentation, sampling (`sample_every` gathers all layers).

Letters: N scored tokens, D model width, V vocabulary; m and c are the bytes of a master weight and of one in the compute
dtype.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from rpo import config
from rpo.config import Train
from rpo.errors import UserError, require
from rpo.model import four_bit, hf, shard
from rpo.model.logprobs import KEPT, TILES
from rpo.training import trace as training_trace
from rpo.training.trace import Sizes, Trace

GIB = 2**30
SPARE = 0.05  # of a GPU: with less than this left, what is not counted may decide
Parts = dict[str, float]  # bytes of each part at one moment
Change = tuple[str, Any]  # a key and its new value


@dataclass(frozen=True)
class Place:
    """Where a run takes place, and what its model comes to there."""

    gpus: int
    device: str  # cuda or cpu
    sizes: Sizes
    trace: Callable[[str], Trace]  # by fsdp.activation_checkpointing
    tokens: int | None = None  # of the largest micro-batch; None: all that tokens_per_microbatch allows
    several: bool | None = None  # micro-batches in a step; None: unless a rank's pairs, at their longest, fit in one


def widths(cfg: Train, place: Place) -> tuple[int, int, int]:
    """Bytes of a number in the compute dtype, of a master weight, and of a moment."""
    compute = shard.compute_dtype(cfg.model.dtype, torch.device(place.device))
    master = max(4, compute.itemsize)
    return compute.itemsize, master, 2 if cfg.optim.state_dtype == "bfloat16" else master


def shards_of(cfg: Train, place: Place) -> int:
    """Processes that share one copy of the weights. Raises UserError where the degrees do not make up place.gpus."""
    replicas = cfg.fsdp.replicate_degree
    shards = cfg.fsdp.shard_degree or max(1, place.gpus // replicas)
    if shards * replicas != place.gpus:
        product = f"{shards} x {replicas} = {shards * replicas}"
        raise UserError(f"gpus={place.gpus}: expected fsdp.shard_degree x fsdp.replicate_degree, {product}; change one")
    return shards


def longest_pair(cfg: Train) -> int:
    """Tokens that a pair may have in a micro-batch: P + C + R, or two padded rows; of supervised data one row."""
    return cfg.data.max_length * (1 + cfg.loss.has_pairs)


# ---- what a step holds, and when


def peak(cfg: Train, place: Place) -> tuple[str, Parts]:
    """The moment that holds most, and its parts in bytes."""
    return max(moments(cfg, place), key=lambda moment: sum(moment[1].values()))


def moments(cfg: Train, place: Place) -> Iterator[tuple[str, Parts]]:
    """The moments of a step's last micro-batch that can be its peak, each with the bytes of its parts on one rank.

    FSDP2 goes by units, a layer or the root. Gathering copies a unit at c, also at degree 1; beyond that the next one is
    gathered ahead. Reducing copies a unit's gradients into a buffer at m and makes a share of that, at degree 1
    of several replicas by way of a quotient; the buffer lives until the next unit is reduced.
    """
    sizes, shards, (c, m, moment) = place.sizes, shards_of(cfg, place), widths(cfg, place)
    whole, layer, root, trained = sizes.all, sizes.layer, sizes.root, sizes.trained or sizes
    learned, of_layer, of_root, head = trained.all, trained.layer, trained.root, trained.vocabulary * sizes.width
    tokens = place.tokens or cfg.tokens_per_microbatch
    kept, working, scored = (per_token * tokens for per_token in activations(cfg, place))
    whole, layer = whole - sizes.four_bit, layer - sizes.four_bit_layer  # whole on every rank, and never gathered
    packed, working = four_bit.BYTES * sizes.four_bit, working + c * sizes.largest

    held = m / shards * (not cfg.fsdp.cpu_offload)  # of a rank's share, per parameter of the model
    reshards = cfg.fsdp.reshard_after_forward
    weights = held * learned + held * c / m * (whole - learned) + packed  # an adapter's base is stored as it computes
    state: Parts = {"weights": weights, "moments": 2 * held * learned * moment / m}
    embedded = cfg.data.train == "gold" and cfg.data.eval is not None
    another = sizes.trained is None or cfg.reference.path is not None  # else it is the base with the adapter off
    if cfg.loss.has_reference and (cfg.reference.kind != "cached" or embedded) and another:
        # What it gathered and no backward pass frees: the root, and all where layers do not reshard.
        both = 2 if cfg.reference.kind == "moving" and embedded else 1  # KL is against one that stands still
        state["reference"] = both * (packed + held * whole + c * (root if reshards else whole))

    several = place.several
    if several is None:
        several = -(-cfg.batch_size // place.gpus) * longest_pair(cfg) > cfg.tokens_per_microbatch
    sums_whole = several and cfg.fsdp.accumulate == "unsharded"  # earlier micro-batches left every gradient at m
    at_once = sums_whole and c == m  # autograd adds to that; else a unit's gradients wait at c until it is reduced
    own = 0 if at_once else of_layer
    heads = 0 if at_once and not sizes.tied else head

    def gradients(reduced: int) -> Parts:
        """What is summed up, once so many parameters of this micro-batch are `reduced`."""
        if sums_whole:
            return {"gradients": m * (learned - reduced) + held * reduced}
        return {"gradients": held * (learned if several else reduced)}

    def reduction(unit: int) -> float:
        """What it takes to reduce a unit's gradients, beyond those sums that were there before."""
        share = 2 * m if shards == 1 < place.gpus else m / shards
        return unit * (m + (max(0, share - m) if sums_whole else max(c, share)))

    # Until the last micro-batch the root stays gathered, and layers that do not reshard; before it only `sharded` reduces.
    stays = c * (root if reshards else whole) * (several and cfg.fsdp.accumulate == "sharded")

    def gathered(layers: int) -> Parts:
        """The root and, where layers do not reshard, so many of them; beyond degree 1 the next one's buffer."""
        return {"gathered": max(stays, c * (root + (1 if reshards else layers) * layer)) + c * (shards > 1) * layer}

    if shards > 1:
        in_two = c * root * (2 + (c < m) / shards)  # the collective's output, its copy, and the share in another dtype
        yield "the root's gathering", state | gradients(0) | {"gathered": in_two}
    logits = {"logits": head_bytes(round(scored), sizes, place.device, c)}
    all_kept = {"activations": kept, "in flight": c * head}
    yield "the head's backward", state | gradients(0) | gathered(sizes.layers) | all_kept | logits
    for left in range(sizes.layers, 0, -1):
        live = state | gradients((sizes.layers - left) * of_layer)
        buffer = m * of_layer * (left < sizes.layers)
        at_work = {
            "activations": kept * left / sizes.layers,
            "working": working,
            "in flight": c * (heads + own) + buffer,
        }
        yield f"layer {left}'s backward", live | gathered(left) | at_work
        reduced = {"activations": kept * (left - 1) / sizes.layers, "in flight": c * heads + reduction(of_layer)}
        yield f"layer {left}'s reduction", live | gathered(left - 1) | reduced
    live = state | gradients(learned - of_root)
    both = of_root + sizes.tied * head  # a tied weight's two gradients are added up only here
    yield "the embedding's backward", live | {"gathered": max(stays, c * root), "in flight": c * both + m * of_layer}
    reduced = reduction(of_root)
    if place.device == "cpu" and c < m:  # the CPU casts a matrix at a time into sums or buffer, while all others wait
        cast = c * of_root + m * of_layer + sums_whole * m * head
        yield "the root's cast", live | {"gathered": max(stays, c * root), "in flight": cast}
        reduced = max(reduced, (shards > 1) * (not sums_whole) * ((m + c) * of_root + c * head))
    yield "the root's reduction", live | {"in flight": reduced, "gathered": stays}


def activations(cfg: Train, place: Place) -> tuple[float, float, float]:
    """Per token of a micro-batch: bytes kept for the backward pass, bytes that it works in, scored tokens.

    Compiled layers without checkpointing keep less than eager ones: what products and attention read or write, the
    layer's input, and the sum in its middle (17.1 D per token of Mistral's layers, and as much by Inductor).
    """
    how = cfg.fsdp.activation_checkpointing
    found = place.trace(how)
    kept = found.kept
    if shard.compiles(cfg.compile, place.device) and how == "none":
        middle = widths(cfg, place)[0] * place.sizes.width * place.sizes.layers
        kept = min(kept, found.products + place.trace("full").kept + middle)
    return kept, found.working, found.scored


def head_bytes(num_scored: int, sizes: Sizes, device: str, c: int) -> int:
    """What `logprobs.token_logps` holds in its backward pass, beyond its inputs and the head's gradient.

    All logits and one tile where they are within KEPT, else two tiles; the hidden states' gradient. Half inputs: sums of
    that and of one block of the head in fp32, and on a CPU both operands in fp32. A toy's logits are held three times.
    """
    n, v, d, wide = num_scored, sizes.vocabulary, sizes.width, max(4, c)
    tile_v = min(TILES[device][1], v)
    tile_n = TILES[device][0] * TILES[device][1] // tile_v
    if 4 * n * v <= tile_n * tile_v and c >= 4:
        return 3 * wide * n * v + c * n * d
    logits, tile = wide * n * v, wide * min(tile_n, n) * tile_v
    sums = wide * (n + tile_v) * d * (c < 4) * (1 if device == "cuda" else 2)
    return (logits + tile if logits <= KEPT[device] else 2 * tile) + c * n * d + sums


# ---- what would make it fit


def changes(cfg: Train, place: Place) -> list[list[Change]]:
    """What can be changed to need less, the cheapest in speed first; each with its choices, the mildest first."""
    how, num_tokens = cfg.fsdp.activation_checkpointing, cfg.tokens_per_microbatch
    stronger = {"none": ("selective", "full"), "selective": ("full",), "full": ()}[how]
    live = cfg.loss.has_reference and cfg.reference.kind == "live"
    halves = [n for k in range(1, 20) if (n := num_tokens >> k) >= longest_pair(cfg)]
    bf16 = widths(cfg, place)[1:] == (4, 4) and place.device == "cuda" and not cfg.fsdp.cpu_offload
    found = {
        "reference.kind": ["cached"] * live,
        "optim.state_dtype": ["bfloat16"] * bf16,
        "fsdp.accumulate": ["sharded"] * (cfg.fsdp.accumulate == "unsharded"),  # for more than one GPU
        "fsdp.reshard_after_forward": [True] * (not cfg.fsdp.reshard_after_forward),
        "fsdp.activation_checkpointing": stronger,
        "tokens_per_microbatch": halves,
        "gpus": [
            n for k in (1, 2, 3, 4) if (n := place.gpus * 2**k) <= cfg.batch_size and cfg.fsdp.shard_degree is None
        ],
    }
    return [[(key, value) for value in values] for key, values in found.items() if values]


def total(cfg: Train, place: Place, several: list[Change]) -> float:
    """Bytes at the peak of the run with these changes made."""
    for key, value in several:
        *group, name = key.split(".")
        if key == "gpus":
            place = replace(place, gpus=value)
        elif group:
            cfg = replace(cfg, **{group[0]: replace(getattr(cfg, group[0]), **{name: value})})
        else:
            cfg = replace(cfg, **{name: value})
    return sum(peak(cfg, place)[1].values())


def combination(cfg: Train, place: Place, limit: float) -> tuple[list[Change], float]:
    """Changes that together come to `limit` bytes or less, none stronger than needs be; the strongest where none do."""
    ladders = changes(cfg, place)
    rungs = [0] * len(ladders)  # 0: as it is

    def taken() -> list[Change]:
        return [ladder[rung - 1] for ladder, rung in zip(ladders, rungs, strict=True) if rung]

    for i, ladder in enumerate(ladders):
        while rungs[i] < len(ladder) and total(cfg, place, taken()) > limit:
            rungs[i] += 1
    fits = total(cfg, place, taken()) <= limit
    for i in reversed(range(len(ladders))):  # back down, the dearest first
        while fits and rungs[i]:
            rungs[i] -= 1
            if total(cfg, place, taken()) > limit:
                rungs[i] += 1
                break
    return taken(), total(cfg, place, taken())


# ---- the command


def place_of(cfg: Train, model: PreTrainedConfig, gpus: int, device: str = "cuda") -> Place:
    """`gpus` processes with `model`, and micro-batches full of pairs as long as data.max_length lets them be.

    Half of a pair's tokens are its prompt's. layout=auto is taken to come to packed.
    """
    unit = max(1, min(cfg.data.max_length, cfg.tokens_per_microbatch // 2) // 3)
    pair = (2 * unit, unit, unit * cfg.loss.has_pairs)
    how = {"layout": "padded" if cfg.layout.kind == "padded" else "packed", "device": device}
    how["dtype"] = shard.compute_dtype(cfg.model.dtype, torch.device(device))
    lengths = (pair,) * max(1, cfg.tokens_per_microbatch // sum(pair))
    adapter = cfg.model.lora
    require(adapter.r is not None or not cfg.model.load_in_4bit, "model.load_in_4bit=true: give model.lora.r=16 too")
    trace = partial(training_trace.trace, model, lengths=lengths, adapter=adapter, **how)
    sizes = training_trace.sizes(model, adapter, load_in_4bit=cfg.model.load_in_4bit)
    return Place(gpus, device, sizes, cache(trace))


def model_of(cfg: Train, given: list[str]) -> tuple[PreTrainedConfig, str]:
    """The config of the model that is trained, and its name. Raises UserError.

    `given` are the command line's overrides: a recipe's model.architecture is that of its own model.path only.
    """
    path, architecture = cfg.model.path, cfg.model.architecture
    keys = {argument.split("=")[0].lstrip("+") for argument in given}
    foreign = "model.path" in keys and not any(key.startswith("model.architecture") for key in keys)
    if path is not None and (Path(path).is_dir() or architecture is None or foreign):
        try:
            return hf.check_offline(path, cfg.model.revision), path
        except UserError as error:
            hint = "give model.path=DIR with its config.json, or its sizes as the model.architecture of a recipe"
            raise UserError(f"{error}; {hint}") from None
    if architecture is None or "vocab_size" not in architecture:
        hint = "it would be the tokenizer's; add +model.architecture.vocab_size=N, or give model.path=DIR"
        raise UserError(f"model.architecture: has no vocab_size, {hint}")
    return hf.config_for(architecture), path or architecture.get("model_type", "?")


def table(cfg: Train, place: Place) -> str:
    """The parts at the peak, one line each, and what they are made of; and what the host needs."""
    (name, parts), shards, (c, m, moment) = peak(cfg, place), shards_of(cfg, place), widths(cfg, place)
    kept, working, _ = activations(cfg, place)
    tokens, share = place.tokens or cfg.tokens_per_microbatch, f" / {shards} shards" if shards > 1 else ""
    trained = place.sizes.trained
    base = f"; of the {trained.all:,} of the adapter, {c} x all others" if trained else ""
    base += f", {four_bit.BYTES:.2f} x the {place.sizes.four_bit:,} in four bits" * (place.sizes.four_bit > 0)
    notes = {
        "weights": f"{m} bytes x parameters{share}{base}",
        "moments": f"2 x {moment} bytes x {'the adapter' if trained else 'parameters'}{share}",
        "reference": f"live: {m} bytes x parameters{share}, and what of it stays gathered",
        "gradients": f"sums at {m} bytes, fsdp.accumulate={cfg.fsdp.accumulate}",
        "gathered": f"weights at {c} bytes: embedding, head, and the layers at hand",
        "in flight": "gradients on their way into the sums: the head's, a layer's, the buffer they are reduced in",
        "logits": "of the head: those it keeps, tiles, and sums",
        "activations": f"what is left by then of {kept / 1e6:.3f} MB x {tokens} tokens",
        "working": f"{working / 1e6:.3f} MB x {tokens} tokens, of the layer at work",
    }
    lines = [f"{size / GIB:9.2f} GiB  {part:12} {notes[part]}" for part, size in parts.items()]
    lines.append(f"{sum(parts.values()) / GIB:9.2f} GiB  in all, when a step is at its fullest: {name}")

    def per_token(how: str) -> str:
        other = replace(cfg, fsdp=replace(cfg.fsdp, activation_checkpointing=how))
        return f"{how} {activations(other, place)[0] / 1e6:.2f} MB"

    layers = "compiled" if shard.compiles(cfg.compile, place.device) else "eager"
    each = ", ".join(map(per_token, ("none", "selective", "full")))
    lines.append(f"activations per token of {layers} layers by fsdp.activation_checkpointing: {each}")
    of_share = place.sizes.all / shards / GIB
    loading = "rank 0" if place.gpus > 1 else "it"
    hosts = [f"{m * place.sizes.all / GIB:.1f} GiB while {loading} loads the model"]
    saved = (trained or place.sizes).all / shards / GIB
    hosts += [f"{(m + 2 * moment) * saved:.1f} GiB from its first checkpoint on"] * (cfg.checkpoint.every > 0)
    hosts += [f"{2 * (m + moment) * of_share:.1f} GiB throughout (fsdp.cpu_offload)"] * cfg.fsdp.cpu_offload
    return "\n".join([*lines, f"host memory of each process: {', '.join(hosts)}"])


def advice(cfg: Train, place: Place, gib: float) -> str:
    """Whether it fits, and what would make it fit."""
    limit, spare = gib * GIB, gib - total(cfg, place, []) / GIB
    if spare >= 0:
        close = "; that is little, and fragmentation may decide" if spare < SPARE * gib else ""
        return f"fits {gib:g} GiB, {spare:.1f} GiB to spare{close}"

    def line(several: list[Change], size: float) -> str:
        words = {"reference.kind": "reference", True: "true"}  # a group is chosen by its own name
        text = " ".join(f"{words.get(key, key)}={words.get(value, value)}" for key, value in several)
        return f"{size / GIB:9.2f} GiB  {'fits' if size <= limit else 'does not fit':12} {text}"

    singles = [([change], total(cfg, place, [change])) for ladder in changes(cfg, place) for change in ladder]
    lines = [f"does not fit {gib:g} GiB by {-spare:.1f} GiB; with one key changed:"]
    lines += [line(*single) for single in singles if single[1] < limit - spare * GIB]
    if not any(size <= limit for _, size in singles):
        lines += ["with several:", line(*combination(cfg, place, limit))]
    return "\n".join(lines)


def plan(arguments: list[str]) -> str:
    """The report for a command line. Raises UserError."""
    from hydra import (
        compose,
        initialize_config_dir,
    )  # the arithmetic above does without: bench/gpu.py may have no hydra
    from hydra.errors import HydraException

    from rpo.training import command_line

    own = {"gpus": int, "gib": float}
    split = [argument.partition("=") for argument in arguments]
    given = [key + equals + value for key, equals, value in split if key not in own]
    numbers = {key: _number(key, value, own[key]) for key, _, value in split if key in own}
    if missing := [name for name in own if name not in numbers]:
        raise UserError(
            f"{missing[0]}: missing; for example python -m rpo.training.memory recipe=paper_beta gpus=1 gib=139"
        )
    command_line.check(given, config.Train, multirun=False)
    try:
        with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "conf"), version_base="1.3"):
            cfg = config.train_config(compose("train", overrides=given))
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from None
    if cfg.batch_size < numbers["gpus"]:
        raise UserError(
            f"gpus={numbers['gpus']}: more than the batch_size={cfg.batch_size} pairs of a step; raise that"
        )
    model, name = model_of(cfg, given)
    place = place_of(cfg, model, numbers["gpus"])
    title = f"{name}: {place.sizes.all:,} parameters, {place.sizes.layers} layers; on each of {place.gpus} GPU{'s' * (place.gpus > 1)}"
    return "\n".join([title, table(cfg, place), advice(cfg, place, numbers["gib"])])


def _number(name: str, text: str, kind: type) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise UserError(f"{name}={text}: expected {'a whole number' if kind is int else 'a number'} above 0")
    return value


def cli() -> None:
    """`rpo-memory`, and this module."""
    try:
        print(plan(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()
