"""GLUE's QNLI (accuracy) with the settings of paper/glue.py; search alone, as in the script."""

from configs.paper.glue import *  # noqa: F403

data = "nyu-mll/glue:qnli"
lower_lr = upper_lr = 2e-5
search_steps, retrain_steps = 20000, 0
