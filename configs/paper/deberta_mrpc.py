"""GLUE's MRPC on DeBERTa-v3-base, as paper/deberta_rte.py."""

from configs.paper.mrpc import *  # noqa: F403

model = "deberta-v3-base"
target_modules = ("query_proj", "value_proj")
