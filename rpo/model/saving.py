"""A model in Hugging Face's format: gathered, cast and written a file at a time, and read back before it counts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rpo import config, dist, files
from rpo.model import hf, lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rpo.model.policy import Policy

FILE_BYTES = 5 * 10**9  # of one file, and what rank 0 holds at most
AGAIN = "repeat the command, which continues from the last checkpoint if there is one (checkpoint.every)"


def save(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str = "auto") -> None:
    """Writes `folder` in Hugging Face format: config, generation config, tokenizer, chat template, weights in `dtype`.

    auto is the type of the files that the model came from (float64 for a float64 model). Of a model with an adapter that
    alone, in PEFT's format (`lora.save`). A collective: every rank calls it, rank 0 writes. The folder appears whole or not
    at all.
    """
    if lora.named(policy):
        return lora.save(policy, tokenizer, folder)
    if dist.is_main() and (target := saved_dtype(policy.lm, dtype)).itemsize < policy.compute_dtype.itemsize:
        said = (
            "as the files that it came from; model.save_dtype=float32 keeps all digits"
            if dtype == "auto"
            else "as asked"
        )
        print(f"{folder}: the weights are rounded to {str(target)[6:]}, {said}", flush=True)
    write(policy, policy.lm, tokenizer, folder, dtype, AGAIN, on_main=dist.on_main)


def save_run(policy: Policy, tokenizer: PreTrainedTokenizerBase, run_dir: Path, cfg: config.Model) -> None:
    """RUN/model, and of an adapter RUN/model_merged where that is asked for. A collective."""
    save(policy, tokenizer, run_dir / "model", cfg.save_dtype)
    if cfg.save_merged:
        merged, trust = run_dir / "model_merged", cfg.trust_remote_code
        dist.on_main(merge, run_dir / "model", tokenizer, merged, cfg.save_dtype, trust)


def saved_dtype(lm: PreTrainedModel, dtype: str) -> torch.dtype:
    """What model.save_dtype comes to for this model."""
    if dtype != "auto":
        return getattr(torch, dtype)
    masters = max((p.dtype for p in lm.parameters()), key=lambda dtype: dtype.itemsize)
    return masters if masters == torch.float64 else getattr(lm, "stored_dtype", torch.float32)


def write(
    module: nn.Module,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: str,
    then: str,
    *,
    on_main: Callable[..., Any] | None = None,
    card: str | None = None,
) -> None:
    """Writes the model `lm`, which may be sharded within `module`, and a README.md.

    A collective with dist's `on_main`, else of one process.
    """
    state, target = module.state_dict(keep_vars=True), saved_dtype(lm, dtype)
    kept = [*(lm._keep_in_fp32_modules or ()), *(lm._keep_in_fp32_modules_strict or ())]
    seen: set[int] = set()
    names = [name for name, tensor in state.items() if not (id(tensor) in seen or seen.add(id(tensor)))]  # tied: once

    def type_of(name: str) -> torch.dtype:
        own = state[name].dtype
        return target if own.is_floating_point and not any(part in name for part in kept) else own

    def size(name: str) -> int:
        return state[name].numel() * type_of(name).itemsize

    with torch.device("meta"):
        whole = type(lm)(lm.config).to(target)
    whole.generation_config = lm.generation_config
    total, part = sum(map(size, names)), files.part_of(folder)
    writes = on_main is None or dist.is_main()  # the others only take part in gathering
    on_main = on_main or (lambda work, *args: work(*args))

    def step(work: Callable[..., None], *args: Any) -> None:
        with files.discarding(part, folder, total, then):
            work(*args)

    on_main(step, _begin, part)
    placed: list[list[str]] = []  # on rank 0, by file: the names of its tensors
    for i, group in enumerate(_groups(names, size)):
        tensors = {}
        for name in group:
            tensor = _whole(state[name])
            if writes:
                tensors[name.removeprefix("lm.")] = tensor.to("cpu", type_of(name))
        on_main(step, _write_file, whole, tensors, part, placed, i)
    on_main(step, _finish, placed, tokenizer, card, part, folder)


def _begin(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _groups(names: Iterable[str], size: Callable[[str], int]) -> Iterator[list[str]]:
    """The names by file; a layer's stay together, for some classes write a layer's tensors cut otherwise."""
    layers: dict[str, list[str]] = {}
    for name in names:
        numbered = re.match(r".*?\.\d+\.", name)
        layers.setdefault(numbered[0] if numbered else "", []).append(name)
    group: list[str] = []
    for layer in layers.values():
        if group and sum(map(size, group + layer)) > FILE_BYTES:
            yield group
            group = []
        group = group + layer
    yield group


def _whole(tensor: Tensor) -> Tensor:
    """The whole tensor. A collective where it is sharded."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        if tensor.device.type != mesh.device_type:  # offloaded
            tensor = tensor.to(mesh.device_type)
        tensor = tensor.full_tensor()
    return tensor.detach()


def _write_file(
    whole: PreTrainedModel, tensors: dict[str, Tensor], part: Path, placed: list[list[str]], i: int
) -> None:
    from safetensors import safe_open

    before = _bits(tensors.values())
    whole.save_pretrained(part, state_dict=tensors)  # which empties it
    file = part / "model.safetensors"
    with safe_open(file, "pt") as there:
        names = list(there.keys())
        if _bits(map(there.get_tensor, names)) != before:
            raise RuntimeError(
                f"{part}: {type(whole).__name__} does not write what was trained; the weights are not saved"
            )
    placed.append(names)
    file.rename(part / f"{i}.safetensors")


def _bits(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """How many numbers there are, and the sum of their bits: the same however they are named, ordered and cut."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [(t.numel(), t.contiguous().view(integer[t.element_size()]).sum().item()) for t in tensors]
    return sum(count for count, _ in sums), sum(bits for _, bits in sums)


def _finish(
    placed: list[list[str]], tokenizer: PreTrainedTokenizerBase, card: str | None, part: Path, folder: Path
) -> None:
    if len(placed) == 1:
        (part / "0.safetensors").rename(part / "model.safetensors")
    else:
        weight_map = {}
        for i, names in enumerate(placed):
            file = f"model-{i + 1:05d}-of-{len(placed):05d}.safetensors"
            (part / f"{i}.safetensors").rename(part / file)
            weight_map |= dict.fromkeys(names, file)
        size = sum(file.stat().st_size for file in part.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        files.write_atomic(part / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    tokenizer.save_pretrained(part)
    if card is not None:
        (part / "README.md").write_text(card)
    files.put(part, folder)


def merge(folder: Path, tokenizer: PreTrainedTokenizerBase, out: Path, dtype: str, trust_remote_code: bool) -> None:
    """Writes the adapter in `folder` merged into its base, W + (alpha / r) B A in fp32, as a model of its own. Of one process."""
    lm = hf.load(str(folder), None, torch.float32, trust_remote_code=trust_remote_code)
    lora.merge(lm)
    if (target := saved_dtype(lm, dtype)) != torch.float32:
        print(
            f"{out}: the weights are rounded to {str(target)[6:]}, as {'its base' if dtype == 'auto' else 'asked'}",
            flush=True,
        )
    write(lm, lm, tokenizer, out, dtype, AGAIN)
