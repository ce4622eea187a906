"""
Commonsense reasoning: DoRA on LLaMA-7B (arXiv 2402.09353, table 8; at rank 16, and on LLaMA 2, its
rate is 2e-4). Put the mix of 170,420 examples of BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC and
OBQA into the folder commonsense as train.jsonl, and a test set as test.jsonl, with the keys prompt,
choices and answer. The steps are three epochs. What differs: the authors' model sees the choices in
an instruction, and is scored by the choice that it writes, not by the likelihood of each; their
warm-up takes 100 steps, and their base is in fp16.
"""

model = "huggyllama/llama-7b"
data = "commonsense"
task = "multiple_choice"
train_on_prompt = True
method = "dora"
norm_grad = "detach"
target_modules = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
rank, alpha = 32, 64.0
dropout = 0.05

batch_size, block_size = 16, 256
gradient_checkpointing = True
lower_lr = 1e-4
lr_floor = 0.0
search_steps = 6391  # with --method=bidora
retrain_steps = 25563
checkpoint_every = 1000
eval_size = 100000
