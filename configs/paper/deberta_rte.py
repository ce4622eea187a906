"""
GLUE's RTE on DeBERTa-v3-base. The rates and steps are those of RoBERTa (paper/rte.py), not tuned.

The hub's repository holds pickled weights, which are not read. Convert them once, into a folder:

    from transformers import AutoModel, AutoTokenizer
    for kind in (AutoModel, AutoTokenizer):
        kind.from_pretrained("microsoft/deberta-v3-base").save_pretrained("deberta-v3-base")
"""

from configs.paper.rte import *  # noqa: F403

model = "deberta-v3-base"
target_modules = ("query_proj", "value_proj")
