"""All that a run's next update depends on beside its batch, in memory; `checkpoint` puts it on disk and back."""

import base64
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from rpo import dist
from rpo.model import four_bit, lora

if TYPE_CHECKING:
    from rpo.runs.checkpoint import Checkpoint

Tensors = dict[str, Tensor]


@dataclass(eq=False)
class TrainState:
    """Weights, moments, running sums and random state as they stand, and the counters of the loop."""

    tensors: Tensors  # of `tensors_of`: the live ones
    sums: Tensor  # the meter's, of the logging interval under way
    seed: int
    total_steps: int
    facts: dict[str, str]  # digests of what the run is of (rows, tokenizer, weights), which a checkpoint records
    step: int = 0  # updates made
    pairs: int = 0  # seen
    evaluated: bool = False  # whether evaluation and samples of `step` are in the log already
    watched: list[float] = field(default_factory=list)  # stop.metric of each evaluation so far

    def __post_init__(self) -> None:
        self.first_bad = torch.full((), -1, device=self.sums.device)  # the first step that was not finite; sticky

    def begin(self, resume: "Checkpoint | None") -> None:
        """Sets the random generators for the first update; fills everything else from the checkpoint, if there is one.

        A root that a forward pass left gathered has to be resharded afterwards. Raises UserError where the checkpoint is
        of another model.
        """
        seed = self.seed, dist.rank(), resume.state["step"] if resume else 0
        of_python, of_numpy, of_torch = map(int, np.random.SeedSequence(seed).generate_state(3))
        random.seed(of_python)  # left alone the generators differ from run to run
        np.random.seed(of_numpy)
        torch.manual_seed(of_torch)
        if resume is not None:
            own = resume.load(self.tensors)
            self.sums.copy_(torch.tensor(own["sums"], dtype=self.sums.dtype))
            self.step, self.pairs, self.evaluated = (resume.state[name] for name in ("step", "pairs", "evaluated"))
            self.watched = list(resume.state.get("watched", ()))  # which runs of earlier versions lack

    @property
    def is_bad(self) -> Tensor:
        """Whether a step was not finite, on the device."""
        return self.first_bad >= 0

    def note_bad(self, grad_norm: Tensor) -> None:
        """Notes the step in hand where its gradient is not finite; no synchronisation."""
        self.first_bad = torch.where(~self.is_bad & ~grad_norm.isfinite(), self.step, self.first_bad)

    def weights_are_finite(self) -> bool:
        """Whether all weights are finite, on all ranks. A collective that waits for the device."""
        weights = [_local(tensor) for name, tensor in self.tensors.items() if name.startswith("weight/")]
        finite = torch.stack([weight.isfinite().all().to(self.sums.device) for weight in weights]).all().long()
        torch_dist.all_reduce(finite, torch_dist.ReduceOp.MIN)
        return bool(finite)

    def counts(self) -> dict[str, Any]:
        """The part that all ranks share, JSON-able."""
        return {name: getattr(self, name) for name in ("step", "total_steps", "facts", "pairs", "evaluated", "watched")}

    def own(self) -> dict[str, Any]:
        """This rank's part beside the tensors, JSON-able. Waits for the device."""
        return {"rng": rng_state(), "sums": self.sums.tolist()}


def tensors_of(
    policy: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, moving: nn.Module | None = None
) -> Tensors:
    """Weights, buffers and the optimizer's state by kind/name: the live tensors themselves, each rank's share of them.

    Call it right after the optimizer is made, before a forward pass leaves the root gathered. Without an optimizer it is
    the part that a log-prob depends on. With the weights of a reference that is `moving`. Of a model with an adapter, whose base stays as it is, the adapter alone.
    """
    tensors = {}
    for name, param in lora.named(policy) or policy.named_parameters():
        tensors[f"weight/{name}"] = param.detach()
        if optimizer is not None:
            tensors |= {f"{kind}/{name}": value for kind, value in optimizer.state[param].items()}
    tensors |= {f"buffer/{name}": buffer for name, buffer in four_bit.others(policy).items()}
    if moving is not None:
        tensors |= {f"reference/{name}": param.detach() for name, param in moving.named_parameters()}
    # Activation checkpointing, which puts this into names, may change between starts.
    return {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in tensors.items()}


def rng_state() -> dict[str, Any]:
    """The state of every global random generator of this process, JSON-able. The loop uses none; a changed loss may."""
    kind, key, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [kind, key.tolist(), *rest], "torch": _text(torch.get_rng_state())}
    return state | ({"cuda": _text(torch.cuda.get_rng_state())} if torch.cuda.is_available() else {})


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` gave, of those devices that are here."""
    version, key, gauss = state["python"]
    random.setstate((version, tuple(key), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
