"""GLUE's MNLI (accuracy on the matched dev set), with the settings of paper/glue.py."""

from configs.paper.glue import *  # noqa: F403

data = "nyu-mll/glue:mnli"
lower_lr = upper_lr = 5e-5
search_steps, retrain_steps = 30000, 40000
retrain_lr = 7e-5
