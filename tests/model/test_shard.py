"""rpo.model.shard: layers that are meant to run compiled do, and as many are counted as do; what is gathered when."""

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from rpo.data.batch import packed_batch, padded_batch
from rpo.model import attention, shard
from tests.helpers import like_cuda
from tests.helpers.models import VOCABULARY, make_lm, prepared
from tests.helpers.rows import LENGTHS, make_rows


def gradient(policy, batch):
    policy(batch).sum().backward()
    grads = [param.grad.to_local().clone() for param in policy.parameters()]
    policy.zero_grad()
    return grads


@pytest.mark.slow
def test_layers_stay_compiled(group, monkeypatch):
    """Two kinds of layers, a live reference, padded rows and packed rows by varlen are more graphs than torch's limit of 8.

    All layers run compiled all the same, and their gradients are the eager ones'.
    """
    like_cuda.admit(monkeypatch, "varlen")
    like_cuda.compile_by(monkeypatch, "eager")
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    policy, reference = (prepared(make_lm("gemma3_text", **layers), group, compile=True) for _ in range(2))
    reference.requires_grad_(False)
    rows = make_rows(LENGTHS, vocab_size=VOCABULARY)
    for make in (padded_batch, packed_batch):
        for some in (np.arange(1), np.arange(len(LENGTHS))):
            batch = make(rows, some)
            with torch.no_grad():
                reference(batch)
                policy(batch)
            compiled = gradient(policy, batch)
            assert policy.compiled_layers == reference.compiled_layers == 2, make.__name__
    assert like_cuda.CALLS["forward"] and like_cuda.CALLS["backward"]
    eager = prepared(make_lm("gemma3_text", **layers), group)
    torch.testing.assert_close(compiled, gradient(eager, batch))


def test_the_block_mask_is_there_before_the_layers(group, monkeypatch):
    """FlexAttention's mask of a row is made before the first layer, whose graph making it would break."""

    def flex(*args, scale, softcap):
        assert "block_mask" in vars(args[-1])
        return attention.sdpa(*args, scale=scale, softcap=softcap)

    like_cuda.admit(monkeypatch, "flex")
    monkeypatch.setitem(attention.BACKENDS, "flex", flex)
    policy = prepared(make_lm(), group)
    assert policy.attention == "flex"
    gradient(policy, packed_batch(make_rows(LENGTHS, vocab_size=VOCABULARY), np.arange(2)))


def test_an_error_leaves_no_layer_gathered(group):
    """Where memory runs out while it samples, or compares gradients, a policy's layers are resharded and recompute again."""
    policy = prepared(make_lm(), group, activation_checkpointing="full")
    wrappers = [module for module in policy.modules() if hasattr(module, "checkpoint_fn")]
    recomputing = [wrapper.checkpoint_fn for wrapper in wrappers]
    batch = padded_batch(make_rows(LENGTHS, vocab_size=VOCABULARY), np.arange(2))
    blocks = (shard.gathered(policy, reshard_after_forward=True), shard.not_recomputing(policy))
    for block in blocks:
        with pytest.raises(MemoryError), torch.no_grad(), block:
            policy(batch)
            raise MemoryError
        with torch.no_grad():
            policy(batch)  # with reshard_after_forward again
        assert len(wrappers) == 2 and [wrapper.checkpoint_fn for wrapper in wrappers] == recomputing
        assert all(isinstance(p, DTensor) for wrapper in wrappers for p in wrapper.parameters())


@pytest.mark.slow
def test_layers_that_compile_nothing_are_not_counted(group, monkeypatch):
    """A graph break within a checkpointed layer (packed rows on a CPU) leaves it eager, and the count says so."""
    like_cuda.compile_by(monkeypatch, "eager")
    policy = prepared(make_lm(), group, compile=True, activation_checkpointing="full")
    rows = make_rows(LENGTHS, vocab_size=VOCABULARY)
    counts = []
    for make in (padded_batch, packed_batch):
        policy(make(rows, np.arange(2)))
        counts.append(policy.compiled_layers)
    assert counts == [2, 0]
