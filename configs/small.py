# The default run: SmolLM2-135M learns to tell good film reviews from bad, out of 200 snippets.
model = "smollm2-135m"
data = "movie-sentiment"
method = "bidora"
# hypergradient stays "unrolled": it is the paper's, and the documents' tables are made with it. It
# adds about 1 % to first_order (notebook 03) and makes a step of search cost about four of retrain.
# --hypergradient=first_order is the thrifty choice: on an AMD EPYC, in bf16, the whole run took 89
# seconds instead of 140, and its peak was 1.4 GB beyond Python and torch instead of 1.9.
search_steps, retrain_steps = 12, 54
eval_size = 200  # a shorter wait than with all 400 test examples
