"""The papers this package implements, as BibTeX."""

from __future__ import annotations

MPO_BIBTEX = """\
@inproceedings{zhao-etal-2025-mpo,
  title     = {{MPO}: Multilingual Safety Alignment via Reward Gap Optimization},
  author    = {Zhao, Weixiang and Hu, Yulin and Deng, Yang and Wu, Tongtong and Zhang, Wenxuan and Guo, Jiahe
               and Zhang, An and Zhao, Yanyan and Qin, Bing and Chua, Tat-Seng and Liu, Ting},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics
               (Volume 1: Long Papers)},
  pages     = {23564--23587},
  year      = {2025},
  address   = {Vienna, Austria},
  publisher = {Association for Computational Linguistics},
  eprint    = {2505.16869},
  archivePrefix = {arXiv}
}"""

HIDDEN_SPACE_BIBTEX = """\
@misc{verma-bharadwaj-2025-hidden-space,
  title  = {The Hidden Space of Safety: Understanding Preference-Tuned {LLMs} in Multilingual context},
  author = {Verma, Nikhil and Bharadwaj, Manasa},
  year   = {2025},
  eprint = {2504.02708},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CL}
}"""
