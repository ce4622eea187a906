"""
Commonsense reasoning: DoRA on LLaMA-7B at rank 32 (arXiv 2402.09353, table 8; at rank 16, and on
LLaMA 2, its rate is 2e-4), whose 170,420 examples mix the training sets of BoolQ, PIQA, SIQA,
HellaSwag, WinoGrande, ARC and OBQA. Bring them as the folder commonsense: train.jsonl, and one of
the eight test sets as test.jsonl, of lines {"prompt", "choices", "answer"}. 31,954 steps are three
epochs.

What differs from the authors' program: it shows all choices in an instruction, learns to write
"the correct answer is …", and is scored by what it writes, where choices are scored by their
likelihood here. Its warm-up takes 100 steps, not a tenth of all, and its base is in fp16.
"""

model = "huggyllama/llama-7b"
data = "commonsense"
task = "multiple_choice"
method = "dora"
norm_grad = "detach"  # section 4.3
target_modules = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
rank = 32
alpha = 64.0
dropout = 0.05
train_on_prompt = True

batch_size = 16
block_size = 256
gradient_checkpointing = True
lower_lr = 1e-4
lr_floor = 0.0
search_steps = 6391  # for --method=bidora: a fifth of the steps
retrain_steps = 25563
checkpoint_every = 1000
eval_size = 100000
