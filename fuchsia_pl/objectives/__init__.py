"""What is optimised: free functions on tensors. Advantages, surrogates, KL estimators, reductions, and their sum."""
