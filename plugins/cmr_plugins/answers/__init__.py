"""What plugins that answer from stored answers share: the key, the folder, and when two prompts ask the same."""
