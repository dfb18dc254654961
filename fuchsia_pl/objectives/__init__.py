"""The objective as pure functions of tensors: credit, surrogates, KL estimators, corrections, reductions, and their sum."""
