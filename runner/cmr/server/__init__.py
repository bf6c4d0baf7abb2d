"""A server over HTTP in the manner of OpenAI's API and llama-server: one engine thread, answers as events."""
