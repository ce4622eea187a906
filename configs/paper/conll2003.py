"""
Named entities of CoNLL-2003 on RoBERTa-base, as in the paper's token classification. The data needs
a licence: put eng.train, eng.testa and eng.testb into the folder conll2003. The paper does not give
its rates and steps for this task, so these are those of paper/cola.py: choose them on the dev set.
"""

from configs.paper.cola import *  # noqa: F403

data = "conll2003"
