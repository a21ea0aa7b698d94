"""The language model of a multimodal checkpoint, as a causal LM of its own: python -m rpo.model.language_model PATH DIR."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rpo.errors import UserError
from rpo.model.stored import left_behind, lost_of, stored_tensors
from rpo.text import first_line


@torch.no_grad()
def take_out(path: str, folder: str) -> None:
    """Writes the language model of the checkpoint at `path`, its head and tokenizer to the new `folder`, dtype as it was.

    Raises UserError: no such checkpoint, none with a language model of a class of its own, a folder that exists, or logits
    of a text that are not the whole model's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if Path(folder).exists():
        raise UserError(f"{folder}: is there already; give a new folder")
    try:
        whole, info = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", weights_only=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # files and the library: each its own type
        raise UserError(f"{path}: cannot be loaded ({first_line(error)}); give a folder or Hub name") from None
    if bad := sorted(info["missing_keys"]) + lost_of(info["unexpected_keys"]):
        raise UserError(
            f"{path}: {type(whole).__name__} and the file differ by {bad[0]} ({len(bad)} such); give a whole model"
        )
    whole.eval()
    inner = [module for name, module in whole.named_modules() if name.rpartition(".")[2] == "language_model"]
    lm, left = inner[0] if inner else whole, left_behind(whole, stored_tensors(path, None))
    if not inner and not left:
        raise UserError(f"{path}: {type(whole).__name__} has no language_model; give it as model.path as it is")
    if lm.get_output_embeddings() is None:  # the backbone alone
        lm = AutoModelForCausalLM.from_config(
            whole.config.get_text_config(), dtype=whole.dtype, trust_remote_code=False
        ).eval()
        lm.base_model.load_state_dict(inner[0].state_dict())
        lm.get_output_embeddings().load_state_dict(whole.get_output_embeddings().state_dict())
        lm.generation_config = whole.generation_config
    ids_BT = torch.arange(4, 20)[None] % lm.config.get_text_config().vocab_size
    own, theirs = (model(input_ids=ids_BT, use_cache=False).logits.float() for model in (lm, whole))
    if not (own - theirs).abs().max() <= 1e-3 * theirs.abs().max():
        raise UserError(f"{path}: {type(lm).__name__} alone gives other logits than {type(whole).__name__}")
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if left:  # Qwen3.5, of which AutoModelForCausalLM loads no more than its language model
        print(f"{folder}: {type(lm).__name__}, without {len(left)} other tensors of {path} ({left[0]}, ...)")


if __name__ == "__main__":
    try:
        if len(sys.argv) != 3:
            raise UserError("usage: python -m rpo.model.language_model PATH DIR")
        take_out(*sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
