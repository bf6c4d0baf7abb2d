"""Read the training texts as clean, cased documents without duplicates, one list for each source."""

import re
from pathlib import Path

from tools.train.truecase import Truecaser

MARK = "<|endoftext|>"
FILES = {
    "stories": "tinystories-train-2.1MB.txt",
    "lowercase": "tinystories-train-lowercase-4.2MB.txt",
    "simple": "pratham-books-en.txt",
    "tales": "fairytaleqa-stories.txt",
    "classics": "classic-children-books.txt",
}
PLAIN = str.maketrans(dict(zip("“”‘’`—–", "\"\"'''--", strict=True)) | {"…": "...", "\ufeff": ""})
GARBLED = {"â€œ": '"', "â€\x9d": '"', "â€™": "'", "â€˜": "'", "â€”": "-", "â€¦": "...", "â€": '"'}
ALLOWED = re.compile(r"[\n -~]*")


def read_sources(folder):
    """Return {source: documents} from the texts in `folder`; a missing file gives an empty source."""
    raw = {name: _read(Path(folder) / file) for name, file in FILES.items()}
    stories = [_paragraphs(d) for d in _documents(raw["stories"])]
    more = [_paragraphs(d) for d in _recased(raw["lowercase"], stories)]
    return {
        "stories": [d for d in stories + more if len(d) > 200 and ALLOWED.fullmatch(d)],
        "simple": [_unwrap(d) for d in _documents(raw["simple"]) if "Story ID |" not in d],
        "tales": [_unwrap(d) for d in _documents(raw["tales"])],
        "classics": [c for d in _documents(raw["classics"]) for c in _chapters(d)],
    }


def _read(path):
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    for wrong, right in GARBLED.items():
        text = text.replace(wrong, right)
    return text.translate(PLAIN)


def _documents(text):
    return [d.strip() for d in text.split(MARK) if d.strip()]


def _paragraphs(text):
    """Return one blank line between paragraphs, as TinyStories is published."""
    return "\n\n".join(re.sub(r" +", " ", p).strip() for p in text.split("\n") if p.strip())


def _unwrap(text):
    """Return paragraphs (between blank lines) with their hard line breaks joined."""
    return "\n\n".join(" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if p.strip())


def _recased(lowercase, stories):
    """Return the stories of the lower-cased file that the cased file lacks, with capitals restored."""
    known = {_key(s) for s in stories}
    lines = re.split(r"(?<!\n)\n(?!\n)", lowercase)
    caser = Truecaser(stories)
    return [caser.restore(d.strip()) for d in lines if d.strip() and _key(d) not in known]


def _key(text):
    return re.sub(r"[^a-z]", "", text.lower())[:80]


def _chapters(book, size=6000):
    """Return a book as pieces of about `size` characters cut between paragraphs, without headings."""
    book = re.sub(r"^(#.*|-+)$", "", book, flags=re.M).replace("_", "").replace("--", " - ")
    pieces, piece = [], ""
    for paragraph in _unwrap(book).split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) > size:
            pieces.append(piece.strip())
            piece = ""
    return [p for p in [*pieces, piece.strip()] if p]
