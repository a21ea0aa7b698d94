"""What the files of a Hugging Face model hold, by their headers, and what a class leaves in them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NO_WEIGHTS = re.compile(
    r"(inv_freq|(attn|attention)\.((masked_)?bias|causal_mask)|position_ids)$"
)  # buffers of old files, which classes make anew


def stored_tensors(path: str, revision: str | None) -> dict[str, tuple[str, int]]:
    """Each tensor's dtype, as the file calls it, and number of dimensions, by name; empty where no file is found."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = cached_file(path, f"{whole}.index.json", revision=revision, **quiet)
        names = sorted({*json.loads(Path(index).read_text())["weight_map"].values()}) if index else [whole]
        files = [cached_file(path, name, revision=revision, **quiet) for name in names]
        types: dict[str, tuple[str, int]] = {}
        for file in filter(None, files):
            if whole.endswith(".bin"):
                state = torch.load(file, map_location="meta", weights_only=True)
                types |= {name: (str(t.dtype), t.ndim) for name, t in state.items() if isinstance(t, Tensor)}
            else:
                with safe_open(file, "pt") as tensors:
                    slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                    types |= {name: (part.get_dtype(), len(part.get_shape())) for name, part in slices.items()}
        if any(files):
            return types
    return {}


def integer_weight(stored: dict[str, tuple[str, int]]) -> str | None:
    """A weight among them of a type that needs a scale, as integers and 8-bit floats do; None if there is none."""
    for name, (dtype, ndim) in stored.items():
        # int64 is of indices, as DeepSeek V4's table of experts; int32 holds packed weights of 4 bits.
        is_scaled = re.match(r"(torch\.)?(u?int(?!64)|float8|[IU](?!64)\d|F[48])", dtype)
        if is_scaled and ndim > 1 and not _NO_WEIGHTS.search(name):
            return f"{name} is stored as {dtype.removeprefix('torch.')}"
    return None


def stored_dtype(stored: dict[str, tuple[str, int]]) -> torch.dtype:
    """The floating type of most tensors; float32 where there is none."""
    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    names |= {str(dtype): dtype for dtype in names.values()}
    types = Counter(names[dtype] for dtype, _ in stored.values() if dtype in names)
    return types.most_common(1)[0][0] if types else torch.float32


def lost_of(names: Iterable[str]) -> list[str]:
    """The weights among the names that a class did not take from a file."""
    return sorted(name for name in names if not _NO_WEIGHTS.search(name))


def left_behind(lm: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """The weights among the `stored` names that the class of `lm` says it ignores, as a vision tower or a head of its own."""
    ignored = [re.compile(pattern) for pattern in lm._keys_to_ignore_on_load_unexpected or ()]
    own = lm.state_dict().keys()  # where a pattern, of layer 61 say, meets a model that has it
    return lost_of(name for name in stored if name not in own and any(each.search(name) for each in ignored))


def identity_of(path: str, revision: str | None) -> str:
    """What changes when the model at `path` does: a folder's files with sizes and times, or a Hub name and revision.

    Of an adapter's folder, its base's too.
    """
    folder = Path(path).expanduser()
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    with suppress(OSError, ValueError, KeyError, TypeError):
        adapter = json.loads((folder / "adapter_config.json").read_text())
        stamps.append(identity_of(adapter["base_model_name_or_path"], adapter.get("revision")))
    return json.dumps([path, revision, *stamps])
