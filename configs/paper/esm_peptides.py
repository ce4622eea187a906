"""
Peptides, antimicrobial or not, on ESM-2 of 8 million parameters. The papers fine-tune ESM on
protein tasks whose data no package holds; these peptides are a built-in set. Rates and steps are
this project's for peptides on MiniLM (docs/results.md), not tuned on ESM-2.
"""

model = "facebook/esm2_t6_8M_UR50D"
data = "peptides"
train_size = 400
target_modules = ("query", "value")
rank, alpha = 4, 8.0

block_size = 128
lower_lr = 3e-3
search_steps, retrain_steps = 20, 80
