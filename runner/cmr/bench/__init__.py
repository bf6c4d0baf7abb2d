"""Speed, memory and divergence of models on this machine, also against llama.cpp, measured in turns."""
