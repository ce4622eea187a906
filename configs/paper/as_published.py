r"""
GLUE's CoLA by the rules of the published program: github.com/t2ance/BiDoRA, commit e7922af, with
Betty 0.2.1. docs/published.md says where each of these stands there.

    python -m research.published --config=paper/as_published.py --transposed --network --noise \
        --all_weights

The four effects are no settings of train.py, since no one should want them: without them this
config is the program on a base that is not transposed, that stays frozen, and without dropout.
Still different: gradients are clipped, Adam's eps is 1e-8, not 1e-6, and the program's retraining
begins at A's first random numbers, not at new ones.
"""

from configs.paper.as_written import *  # noqa: F403

hypergradient = "identity_difference"  # the coefficient of the indirect term is 1, not the rate
magnitude_axis = "row"  # of the transposed weight: the program's columns scale outputs
init = "normal_b"  # the program's A ~ N(0, 1) is B of the transposed weight
alpha = 4.0  # as rank: the program never applies its alpha of 8
shuffle = False
upper_weight_decay = 0.1
