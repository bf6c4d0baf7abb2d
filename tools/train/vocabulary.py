"""One sentencepiece vocabulary for the family: BPE with byte fallback, split digits and chat marks."""

import io
from itertools import accumulate

import sentencepiece

CONTROL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
VISIBLE = ["<think>", "</think>"]
TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- set text = message['content'] -%}"
    "{%- if message['role'] == 'assistant' -%}{%- set text = text.split('</think>')[-1] -%}{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + text + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}"
    "{%- if enable_thinking is defined -%}"
    "{{- '<think>' if enable_thinking else '<think></think>' -}}"
    "{%- endif -%}"
    "{%- endif -%}"
)


def train_vocabulary(texts, size):
    """Return the bytes of a sentencepiece BPE model of `size` pieces trained on `texts`."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=out, model_type="bpe", vocab_size=size, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        control_symbols=CONTROL, user_defined_symbols=VISIBLE, character_coverage=1.0, num_threads=2,
        minloglevel=2, max_sentence_length=20000,
    )  # fmt: skip
    return out.getvalue()


class Vocabulary:
    """Encode text and chat marks to ids and back."""

    def __init__(self, model_bytes):
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        self.bos, self.eos = self.model.bos_id(), self.model.eos_id()
        self.marks = {mark: self.model.piece_to_id(mark) for mark in CONTROL}
        self.end = self.marks["<|end|>"]

    def __len__(self):
        return self.model.vocab_size()

    def encode(self, text):
        """Return the ids of plain `text`, with no begin or end mark."""
        return self.model.encode(text)

    def placed(self, text):
        """Return (id, the byte of `text` in which it ends) of each piece of plain `text`."""
        ids = self.encode(text)
        sizes = (1 if self.model.is_byte(i) else len(self._text(i).encode()) for i in ids)
        return [(i, end - 1) for i, end in zip(ids, accumulate(sizes), strict=True)]

    def _text(self, i):
        return self.model.id_to_piece(i).replace("\u2581", " ")

    def decode(self, ids):
        """Return the text of `ids`; control marks vanish."""
        return self.model.decode([int(i) for i in ids])
