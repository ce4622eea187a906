"""
Data to text: the E2E challenge (arXiv 1706.09254), on GPT-2 medium. Put trainset.csv, devset.csv
and testset_w_refs.csv into the folder e2e-dataset. Rank, alpha, batches and the beam search are
those of LoRA's experiments (arXiv 2106.09685, table 11), which the papers on BiDoRA and BiLoRA
follow; 26,000 steps are five epochs. LoRA adapts queries and values; GPT-2's c_attn is one layer
for queries, keys and values, and is adapted whole.
"""

model = "openai-community/gpt2-medium"
data = "e2e-dataset"
task = "generation"
target_modules = ("c_attn",)
rank, alpha = 4, 32.0
magnitude_axis = "column"

batch_size, block_size = 8, 512
lower_lr = upper_lr = 2e-4
weight_decay = 0.01
search_steps, retrain_steps = 5000, 21000
checkpoint_every = 1000
eval_size = 100000

num_beams = 10
length_penalty = 0.9
no_repeat_ngram_size = 4
max_new_tokens = 64
