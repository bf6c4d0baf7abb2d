r"""The pre-tokenizers by the names that GGUF files use, and their patterns.

Inside brackets \p{L}, \p{N}, \p{P}, \p{S}, \p{M} are Unicode categories, \p{Lx} is the letters beyond ASCII.
"""

from __future__ import annotations

_SUFFIX = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}]+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'(?:[stmd]|re|ve|ll)| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# A word of small letters, perhaps after capitals; or of capitals. Letters beyond ASCII count as either.
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CASED = (_LEAD + r"[A-Z\p{Lx}]*[a-z\p{Lx}]+", _LEAD + r"[A-Z\p{Lx}]+[a-z\p{Lx}]*")
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u30ff]+"
_SENTENCE_SIGNS = "(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)"

# The letters with case that DeepSeek LLM's tokenizer lists (hexadecimal, first or first-last).
_LETTERS = """
41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a
38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf
1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d
1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4
1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f
2145-2149 214e 2183-2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d a680-a69b a722-a76f
a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3
104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
"""


def _ranges(listed: str) -> str:
    """Return the inside of a bracket expression for ranges of code points listed in hexadecimal."""
    return "".join("-".join(chr(int(code, 16)) for code in item.split("-")) for item in listed.split())


def _any_of(*alternatives: str) -> tuple[str, ...]:
    return ("|".join(alternatives),)


PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}$+<=>\^~|]+", _GPT2, r"[\p{N}]+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "starcoder": (r"[\p{N}]", _GPT2),
    "falcon": (r"[\p{P}$+<=>\^~|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "llama3": _any_of(_SUFFIX, _WORD, r"[\p{N}]{1,3}", _SIGNS, _SPACE),
    "dbrx": _any_of(_SUFFIX, _WORD, r"[\p{N}]{1,3}", _SIGNS, _SPACE),
    "qwen2": _any_of(_SUFFIX, _WORD, r"[\p{N}]", _SIGNS, _SPACE),
    "qwen35": _any_of(
        _SUFFIX,
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"[\p{N}]",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        _SPACE,
    ),
    "seed-coder": _any_of(_SUFFIX, _WORD, r"[\p{N}]", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACE),
    "bailingmoe": _any_of(_SUFFIX, _WORD, r"[\p{N}]", _SIGNS, r"\s*[\r\n]", r"\s+(?!\S)|\s+"),
    "minicpm5": (r"[\p{N}]{1,3}", *_any_of(_SUFFIX, _WORD, r"[\p{N}]+", _SIGNS, _SPACE)),
    "tekken": _any_of(*_CASED, r"[\p{N}]", _PATHS, _SPACE),
    "gpt-4o": _any_of(*(f"{word}(?:{_SUFFIX})?" for word in _CASED), r"[\p{N}]{1,3}", _PATHS, _SPACE),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_ranges(_LETTERS)}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+\Z",
        _HAN,
        r"[\p{N}]+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?[\p{L}]+", r"\s?[\p{P}]+", _HAN, r"[\p{N}]"),
    "deepseek-v3": (
        r"[\p{N}]{1,3}",
        _HAN_KANA,
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACE,
    ),
    "bloom": (f" ?[^{_SENTENCE_SIGNS}]+",),
    "viking": (f" ?[^{_SENTENCE_SIGNS}]+", r"[\p{N}]"),
}

# Families in which words that are tokens stay unmerged, and those that begin a text with BOS by habit.
WHOLE_WORDS = {"llama3", "tekken", "minicpm5"}
BOS_FIRST = {"llama3", "tekken"}

_USED_BY = {
    "default": "default",
    "gpt-2": "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert",
    "starcoder": "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    "falcon": "falcon",
    "llama3": "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "dbrx": "dbrx smaug-bpe glm4 chatglm-bpe",
    "qwen2": "qwen2 stablelm2 deepseek-r1-qwen kormo hunyuan megrez solar-open grok-2",
    "qwen35": "qwen35",
    "seed-coder": "seed-coder",
    "bailingmoe": "bailingmoe bailingmoe2 llada-moe",
    "minicpm5": "minicpm5",
    "tekken": "tekken",
    "gpt-4o": "gpt-4o llama4 kanana2 talkie minimax-m2",
    "deepseek-llm": "deepseek-llm",
    "deepseek-coder": "deepseek-coder",
    "deepseek-v3": "deepseek-v3 hunyuan-dense joyai-llm",
    "bloom": "bloom poro-chat gpt3-finnish",
    "viking": "viking",
}
NAMES: dict[str, str] = {name: family for family, names in _USED_BY.items() for name in names.split()}
