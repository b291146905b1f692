"""Evaluations: held-out perplexity and KL, the suites of `hylo eval` (recall, RULER, common sense), comparisons, HTML pages."""
