"""What objectives and metrics are, in words and formulas: for cards and pages."""

from typing import NamedTuple


class Method(NamedTuple):
    """How a forget objective is explained."""

    title: str
    arxiv: str
    formula: str
    words: str


METHODS = {
    "mdu": Method(
        "Masked Diffusion Unlearning",
        "2605.18253",
        r"\mathcal L_\text{forget}=\mathbb E_t\Big[\tfrac1{|M_t|}\sum_{i\in M_t}\mathrm{KL}\big(p_\theta(\cdot\mid x,"
        r"y_t)_i\;\big\|\;\mathrm{softmax}(\tau\cdot\mathrm{logits}_{\theta_0}(m,y_t)_i)\big)\Big]",
        "The prediction for a pair (x, y) to forget was pulled towards what the model predicts when it cannot see the "
        "prompt, flattened by tau: 0 is the uniform distribution, 1 the plain prompt-masked prediction.",
    ),
    "ga": Method(
        "Gradient ascent",
        "2210.01504",
        r"\mathcal L_\text{forget}=-\mathbb E_t\Big[\tfrac1{t\,|y|}\sum_{i\in M_t}-\log p_\theta(y_i\mid x,y_t)\Big]",
        "The masked-diffusion loss of the pairs (x, y) to forget was raised.",
    ),
    "npo": Method(
        "Negative preference optimisation",
        "2404.05868",
        r"\mathcal L_\text{forget}=-\tfrac2\beta\log\sigma\big(-\beta\,(\mathcal B_{\theta_0}-\mathcal B_\theta)\big),"
        r"\quad\mathcal B_\theta=\mathbb E_t\Big[\tfrac1t\sum_{i\in M_t}-\log p_\theta(y_i\mid x,y_t)\Big]",
        "The pairs (x, y) to forget were treated as rejected answers; the masked-diffusion bound stands for -log p.",
    ),
    "simnpo": Method(
        "SimNPO",
        "2410.07163",
        r"\mathcal L_\text{forget}=-\tfrac2\beta\log\sigma\big(\tfrac\beta{|y|}\mathcal B_\theta-\gamma\big),"
        r"\quad\mathcal B_\theta=\mathbb E_t\Big[\tfrac1t\sum_{i\in M_t}-\log p_\theta(y_i\mid x,y_t)\Big]",
        "The pairs (x, y) to forget were treated as rejected answers, without a reference model.",
    ),
    "wga": Method(
        "Weighted gradient ascent",
        "2502.19301",
        r"\mathcal L_\text{forget}=-\mathbb E_t\Big[\tfrac1{t\,|y|}\sum_{i\in M_t}-p_i^\alpha\log p_i\Big],"
        r"\quad p_i=p_\theta(y_i\mid x,y_t)",
        "The masked-diffusion loss of the pairs (x, y) to forget was raised, each token weighted by its probability.",
    ),
    "dpo": Method(
        "Direct preference optimisation",
        "2305.18290",
        r"\mathcal L_\text{forget}=-\log\sigma\big(\beta\,[(\mathcal B_{\theta_0}-\mathcal B_\theta)(y^+)"
        r"-(\mathcal B_{\theta_0}-\mathcal B_\theta)(y)]\big),\quad\mathcal B_\theta=\mathbb E_t\Big[\tfrac1t"
        r"\sum_{i\in M_t}-\log p_\theta(y_i\mid x,y_t)\Big]",
        "A preferred answer y+ (a refusal, say) was put above the one to forget.",
    ),
}
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
