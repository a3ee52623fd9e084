"""A Llama in llama.cpp's one-file format, written from a folder of ours by the `gguf` package."""

import json
from pathlib import Path

import gguf
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(source: Path, path: Path) -> Path:
    """Write the text-only Llama in folder `source` to `path`, in float32, tokeniser and chat template included."""
    model = AutoModelForCausalLM.from_pretrained(source)
    out = gguf.GGUFWriter(path, "llama")
    _sizes(out, model.config)
    _words(out, source)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
        kind = next((heads[k] for k in heads if k in name), None)
        out.add_tensor(_renamed(name), (_interleaved(tensor, kind) if kind else tensor).contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def _sizes(out: gguf.GGUFWriter, config: object) -> None:
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)


def _words(out: gguf.GGUFWriter, source: Path) -> None:
    words = AutoTokenizer.from_pretrained(source)
    model = json.loads(words.backend_tokenizer.to_str())["model"]
    spelled = words.convert_ids_to_tokens(range(len(words)))
    special = set(words.all_special_ids)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(spelled)
    out.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(words))])
    out.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]])
    out.add_bos_token_id(words.bos_token_id)
    out.add_eos_token_id(words.eos_token_id)
    out.add_pad_token_id(words.pad_token_id)
    out.add_unk_token_id(words.unk_token_id)
    out.add_chat_template(words.chat_template)


def _renamed(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, kind = name.rpartition(".")
    if module in whole:
        return f"{whole[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_LAYER[part]}.{kind}"


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates pairs of neighbours, transformers pairs half a head apart: reorder the rows of a head."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
