"""GLUE's CoLA (Matthews correlation), with the settings of paper/glue.py."""

from configs.paper.glue import *  # noqa: F403

data = "nyu-mll/glue:cola"
lower_lr = upper_lr = 5e-5
search_steps, retrain_steps = 20000, 30000
retrain_lr = 3e-5
