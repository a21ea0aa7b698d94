"""What log-probs depend on beside the tokens: a digest of the weights, the config, dtype, kernels and versions."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import torch
from torch import Tensor, nn

from rpo import dist
from rpo.files import sha256
from rpo.model import lora
from rpo.model.policy import Policy

CODE_VERSION = 2  # of the code between token ids and log-probs: raise it when its values change
# Of a model's config: where it came from and what it is stored as, not what it computes.
NOT_COMPUTED = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def weights_digest(lm: nn.Module | None, *, adapter: bool = True) -> str:
    """sha256 of all weights and persistent buffers: names, dtypes, shapes, bytes; tied weights once.

    Without its `adapter` it is that of the base by itself. For a whole model on the CPU, before it is sharded or cast. A collective: rank 0, which alone needs it, hashes in threads.
    """
    return dist.broadcast(hash_of(lm, adapter=adapter) if dist.is_main() else None)


def hash_of(lm: nn.Module, *, adapter: bool = True) -> str:
    """`weights_digest` of one process."""
    named = [(lora.base_name(name), name, tensor) for name, tensor in lm.state_dict(keep_vars=True).items()]
    tensors = {id(tensor): (base or name, tensor) for base, name, tensor in named if base or adapter}
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the GIL
        return sha256(b"".join(pool.map(_hash_tensor, sorted(tensors.values()))))


def _hash_tensor(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().flatten().view(torch.uint8).numpy())
    return digest.digest()


def identity(weights: str, policy: Policy, *, compute_dtype: torch.dtype, device: torch.device, layout: str) -> dict:
    """What the log-probs of `policy` depend on beside the tokens, JSON-able; `weights` is its `weights_digest`."""
    module = type(policy.lm).__module__  # of a model's own code: it names a hash or commit of the files
    return {
        **({} if module.startswith("transformers.") else {"code": module}),
        "weights": weights,
        "config": computed(json.loads(policy.lm.config.to_json_string(use_diff=False))),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "layout": layout,
        **({"base": f"nf4 by bitsandbytes {version('bitsandbytes')}"} if policy.load_in_4bit else {}),
        "attention": policy.attention if layout == "packed" else "the model's own",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "compile": policy.compile_tiles,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "code_version": CODE_VERSION,
    }


def computed(config: dict) -> dict:
    """A model's config, and those nested in it, without NOT_COMPUTED."""
    kept = {name: value for name, value in config.items() if name not in NOT_COMPUTED}
    return {name: computed(value) if isinstance(value, dict) else value for name, value in kept.items()}
