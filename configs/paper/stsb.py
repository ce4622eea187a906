"""GLUE's STS-B with the settings of paper/glue.py; search alone, as in the script."""

from configs.paper.glue import *  # noqa: F403

data = "nyu-mll/glue:stsb"
lower_lr = upper_lr = 1e-5
search_steps, retrain_steps = 12000, 0
