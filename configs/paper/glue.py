"""
What the eight GLUE tasks share: the settings of the authors' scripts for RoBERTa-base, as published
with arXiv 2410.09758. Each file beside this one adds its task's rates and steps.

    python train.py --config=paper/rte.py                        data and model from the hub
    python train.py --config=paper/rte.py --data=glue_data/RTE   the benchmark's own TSV files

GLUE's dev set is the test, and a fifth of train is the upper level's. What differs from the
scripts: A, B, the head and the magnitudes train, not the whole network; the hypergradient is the
paper's, not the program's; the update is scaled by alpha / r, which the program leaves out;
gradients are clipped; Adam's eps is 1e-8, not 1e-6; magnitudes have no weight decay; the batches
are shuffled; there is no dropout.
"""

model = "FacebookAI/roberta-base"
target_modules = ("query", "value")
rank, alpha = 4, 8.0
magnitude_axis = "column"
gram_weight = 1e-5

batch_size, block_size = 32, 512
weight_decay = 0.1
adam_beta2 = 0.98
lr_floor = 0.0
eval_size = 100000  # all of each split
checkpoint_every = 1000
