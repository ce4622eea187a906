# The default run: SmolLM2-135M learns to tell good film reviews from bad, out of 200 snippets.
model = "smollm2-135m"
data = "movie-sentiment"
method = "bidora"
search_steps = 12  # a step of search costs about four of retrain
retrain_steps = 54
eval_size = 200  # a shorter wait than with all 400 test examples
