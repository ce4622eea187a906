# The default run: SmolLM2-135M learns to tell good from bad film reviews out of 200 snippets, on a laptop.
model = "smollm2-135m"
data = "movie-sentiment"
method = "bidora"
