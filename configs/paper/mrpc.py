"""GLUE's MRPC (accuracy, F1) with the settings of paper/glue.py; search alone, as in the script."""

from configs.paper.glue import *  # noqa: F403

data = "nyu-mll/glue:mrpc"
lower_lr = upper_lr = 2e-5
search_steps, retrain_steps = 28000, 0
