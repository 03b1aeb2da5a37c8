"""What metrics are, in words: for cards and pages."""

METRICS = {
    "rougeL_recall": "ROUGE-L recall of decoded answers against the true ones (lower on `forget`, higher elsewhere)",
    "probability": "probability of the true answer, a token, estimated over draws of masks",
    "truth_ratio": "TOFU's truth ratio (arXiv 2401.06121) of wrong answers to a rewording of the true one",
    "degeneracy": "share of answers that are empty, repetitive or made of special tokens",
    "exact_memorization": "share of the answer's tokens that decoding at its true length gets right",
    "extraction_strength": "share of the answer that need not be revealed for the model to complete it",
    "model_utility": "harmonic mean of the figures of the sets to keep",
    "forget_quality": "p-value of the hypothesis that the truth ratios are those of a model that never saw the rows",
}
