"""GLUE's RTE (accuracy), with the settings of paper/glue.py."""

from configs.paper.glue import *  # noqa: F403

data = "nyu-mll/glue:rte"
lower_lr = upper_lr = 1e-5
search_steps, retrain_steps = 15000, 15000
retrain_lr = 3e-5
