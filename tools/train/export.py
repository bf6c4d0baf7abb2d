"""Write a trained model as GGUF and read one back into torch."""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from tools.train.model import Llama, Shape
from tools.train.vocabulary import TEMPLATE

NAMES = {"f32": Type.F32, "f16": Type.F16, "q8_0": Type.Q8_0}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def write_gguf(path, shape, weights, vocabulary, kind="q8_0", name="tiny"):
    """Write `weights` (a Llama's state) with matrices of type `kind` and norms in F32."""
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, shape, name, kind)
    _write_tokens(writer, vocabulary)
    for key, tensor in weights.items():
        data = tensor.detach().float().cpu().numpy()
        if key.endswith(("attn_q", "attn_k")):
            data = interleave(data, shape.head_dim)
        _add(writer, f"{key}.weight", np.ascontiguousarray(data), NAMES[kind] if data.ndim == 2 else Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer, name, data, kind):
    """Add one tensor as `kind`; rows that Q8_0 cannot hold stay F16."""
    if kind == Type.Q8_0 and data.shape[-1] % 32:
        kind = Type.F16
    writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)


def _describe(writer, shape, name, kind):
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"CMR {name}")
    writer.add_description("Trained by tools/train on simple English; see models/README.md")
    writer.add_license("cdla-sharing-1.0")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if shape.exits:
        writer.add_array("cmr.early_exit_layers", [int(e) for e in shape.exits])


def _write_tokens(writer, vocabulary):
    model = vocabulary.model
    ids = range(len(vocabulary))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([model.id_to_piece(i).encode() for i in ids])
    writer.add_token_scores([float(model.get_score(i)) for i in ids])
    writer.add_token_types([_token_type(vocabulary, i) for i in ids])
    writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_eot_token_id(vocabulary.end)
    writer.add_unk_token_id(model.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)


def _token_type(vocabulary, i):
    model, types = vocabulary.model, gguf.TokenType
    if model.is_unknown(i):
        return types.UNKNOWN
    if model.is_control(i):
        return types.CONTROL
    if model.is_byte(i):
        return types.BYTE
    return types.USER_DEFINED if model.id_to_piece(i) in ("<think>", "</think>") else types.NORMAL


def interleave(rows, head_dim):
    """Reorder query or key rows from halves to neighbouring pairs, the rotary pairing of GGUF's llama."""
    heads = rows.shape[0] // head_dim
    return rows.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def separate(rows, head_dim):
    """Undo `interleave`."""
    heads = rows.shape[0] // head_dim
    return rows.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def read_gguf(path):
    """Return (Llama, pieces) from a GGUF that `write_gguf` made, its matrices dequantized to float32."""
    reader = gguf.GGUFReader(path)
    shape = _shape(reader)
    model = Llama(shape)
    state = {}
    for tensor in reader.tensors:
        key = tensor.name.removesuffix(".weight")
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        data = separate(data, shape.head_dim) if key.endswith(("attn_q", "attn_k")) else data
        state[key] = torch.from_numpy(np.array(data, np.float32))
    model.load_state_dict(state)
    return model, reader.fields["tokenizer.ggml.tokens"].contents()


def _shape(reader):
    def value(key, default=None):
        found = reader.fields.get(key)
        return found.contents() if found else default

    return Shape(
        vocab=value("llama.vocab_size"),
        width=value("llama.embedding_length"),
        layers=value("llama.block_count"),
        heads=value("llama.attention.head_count"),
        kv_heads=value("llama.attention.head_count_kv"),
        ffn=value("llama.feed_forward_length"),
        context=value("llama.context_length"),
        exits=list(value("cmr.early_exit_layers", [])),
        theta=value("llama.rope.freq_base"),
        eps=value("llama.attention.layer_norm_rms_epsilon"),
    )
