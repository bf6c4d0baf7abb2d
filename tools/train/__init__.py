"""Train the bundled models with torch, sentencepiece and gguf: see README.md here."""
