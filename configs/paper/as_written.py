"""
GLUE's CoLA by the paper's rules (arXiv 2410.09758); as_published.py has the published program's.

    python train.py --config=paper/as_written.py

The hypergradient goes through one step of the lower level at its rate; m is one number an input
column; A is Kaiming-uniform, and the update is scaled by alpha / r as in LoRA. The paper's text
gives neither steps nor rates: these are the script's.
"""

from configs.paper.cola import *  # noqa: F403

hypergradient = "unrolled"
