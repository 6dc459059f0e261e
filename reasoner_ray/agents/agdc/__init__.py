"""Autonomous goal detection and cessation: an agent ends an episode by itself when its belief says that the goal is reached.

Shi, Wen, Zhang, Zhang, Liu and Liu, AAAI 2025 (arXiv 2409.09541).
"""
