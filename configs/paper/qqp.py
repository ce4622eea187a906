"""GLUE's QQP (accuracy, F1), with the settings of paper/glue.py."""

from configs.paper.glue import *  # noqa: F403

data = "nyu-mll/glue:qqp"
lower_lr = upper_lr = 5e-5
search_steps, retrain_steps = 30000, 30000
retrain_lr = 5e-5
