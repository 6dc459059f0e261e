"""The Multi-Agent Transformer (Wen et al. 2022, arXiv 2205.14953) on environment workers and DeepSpeed learners."""
