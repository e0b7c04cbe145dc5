"""The hidden space of safety: what alignment did, and did not do, to each language's representation of harm.

After Verma and Bharadwaj, *The Hidden Space of Safety: Understanding Preference-Tuned LLMs in Multilingual context*
(2025, arXiv 2504.02708). Texts are embedded by a model before and after alignment; how far apart harmful and harmless
ones lie is measured per language, with intervals, and compared.

Everything that measures takes arrays and knows nothing of models; :mod:`mpo.hidden_space.embed` makes the arrays.
"""
